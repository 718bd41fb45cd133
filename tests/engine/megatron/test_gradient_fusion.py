"""Gradient accumulation fusion: when it is on, and that it changes no gradient.

The extension is replaced by its definition in PyTorch: main_grad += output gradients^T @ inputs. Products are rounded as without it,
so that equal means bit for bit.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from nha_megatron.config import ConfigError
from nha_megatron.config.gradient_fusion import EXTENSION
from nha_megatron.config.inputs import missing_inputs
from nha_megatron.engine.megatron.gradient_fusion import choose_gradient_fusion
from nha_megatron.estimate.report import check_report
from tests.config.cases import run
from tests.distributed import RankPool
from tests.engine.programs import tiny_config, train
from tests.engine.test_parallel_parity import join_stages

CUDA = torch.device("cuda", 0)


class Extension(ModuleType):
    """Stands in for the extension, and counts its calls."""

    def __init__(self) -> None:
        super().__init__(EXTENSION)
        self.calls = 0

    def wgrad_gemm_accum_fp32(self, inputs: Tensor, output_gradients: Tensor, main_grad: Tensor) -> None:
        assert main_grad.dtype is torch.float32 and inputs.dim() == output_gradients.dim() == 2
        self.calls += 1
        main_grad += output_gradients.t() @ inputs


def train_fused(config: Any, **options: Any) -> dict[str, Any]:
    from megatron.core.tensor_parallel import layers

    from nha_megatron.engine.megatron import engine as megatron

    extension = Extension()
    with (
        mock.patch.object(layers, EXTENSION, extension, create=True),
        mock.patch.object(layers, "_grad_accum_fusion_available", True),
        mock.patch.object(megatron, "choose_gradient_fusion", lambda *_: (True, "of the test")),
    ):
        return train(config, steps=2, **options) | {"calls": extension.calls}


SP, PP, CP = {"tensor": 2, "sequence": True}, {"pipeline": 2}, {"context": 2}
DOCUMENTS = {"documents": True}


@pytest.mark.parametrize(
    ("world_size", "sections", "options"),
    [
        (1, {"model": {"tie_embeddings": True, "qkv_bias": True}, "training": {"precision": "bf16"}}, {}),
        (1, {"training": {"recompute": "full", "micro_batch_size": 2}}, DOCUMENTS),
        (2, {"parallel": CP, "model": {"window": "16,full,0,7"}, "training": {"recompute": "selective"}}, {}),
        pytest.param(2, {"parallel": SP, "training": {"precision": "bf16"}}, {}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel": PP, "model": {"tie_embeddings": True}}, {}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel": PP | {"virtual_pipeline": 2}, "training": {"recompute": "full"}}, {}, marks=pytest.mark.slow),
        pytest.param(8, {"parallel": SP | PP | CP, "training": {"micro_batch_size": 2}}, DOCUMENTS, marks=pytest.mark.slow),
    ],
    ids=["tied_bf16", "recomputed", "cp2_hybrid", "tp2_sp_bf16", "pp2_tied", "interleaved", "tp2_pp2_cp2"],
)
def test_gradients_are_those_of_separate_products(
    ranks: RankPool, world_size: int, sections: dict[str, Any], options: dict[str, Any]
) -> None:
    config = tiny_config(**sections)
    timeout = 60.0 * max(2, world_size)
    expected = join_stages(ranks.run(world_size, train, timeout=timeout, config=config, steps=2, **options))
    results = ranks.run(world_size, train_fused, timeout=timeout, config=config, **options)
    fused = join_stages(results)
    assert fused["losses"] == expected["losses"] and fused["grad_norms"] == expected["grad_norms"]
    for name, gradient in expected["gradients"].items():
        assert torch.equal(fused["gradients"][name], gradient), name
    # Five matrices of every layer on the rank (qkv, gate, projection, two of the MLP), once for each of its micro batches and backwards.
    layers = config.model.num_layers // config.parallel.pipeline
    assert [result["calls"] for result in results] == [5 * layers * 3 * config.micro_batches(world_size)] * world_size


def extension_here(monkeypatch: pytest.MonkeyPatch, here: bool) -> None:
    # None in sys.modules makes an import fail.
    extension = Extension() if here else None
    if extension is not None:
        extension.__spec__ = mock.Mock()  # what find_spec returns for a module that is loaded
    monkeypatch.setitem(sys.modules, EXTENSION, extension)


def find_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nha_megatron.config.gradient_fusion.find_spec", lambda _: None)
    extension_here(monkeypatch, False)


def test_automatic_where_cuda_and_the_extension_are(monkeypatch: pytest.MonkeyPatch) -> None:
    automatic, switched_off = run().training, run(training={"gradient_accumulation_fusion": False}).training
    extension_here(monkeypatch, True)
    assert choose_gradient_fusion(automatic, CUDA) == (True, f"{EXTENSION} is installed")
    assert not choose_gradient_fusion(automatic, torch.device("cpu"))[0]
    assert not choose_gradient_fusion(switched_off, CUDA)[0]
    assert f"on where the run uses CUDA: {EXTENSION} is installed" in check_report(run())
    assert "fusion\n#   off, by training.gradient_accumulation_fusion" in check_report(
        run(training={"gradient_accumulation_fusion": False})
    )
    assert "off, because DeepSpeed" in check_report(run(training={"engine": "deepspeed"}))


def test_asked_for_and_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find_nothing(monkeypatch)
    asked = run(training={"gradient_accumulation_fusion": True})
    assert not choose_gradient_fusion(run().training, CUDA)[0]
    assert not any(EXTENSION in line for line in missing_inputs(run()))
    assert "off, because fused_weight_gradient_mlp_cuda (NVIDIA Apex) is not installed here" in check_report(run())
    # `check --inputs`, `pretrain` and the submission of a job refuse it before a process starts; the engine where it cannot be loaded.
    (message,) = [line for line in missing_inputs(asked) if EXTENSION in line]
    assert "build NVIDIA Apex" in message and "gradient_accumulation_fusion=auto" in message
    with pytest.raises(ConfigError, match=r"is true, but not possible: .*build NVIDIA Apex"):
        choose_gradient_fusion(asked.training, CUDA)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"engine": "deepspeed"}, "true under training.engine deepspeed; not supported, because DeepSpeed takes each gradient"),
        ({"device": "cpu"}, "true with training.device cpu; the extension .* runs on CUDA devices: set it to auto"),
        ({"gradient_accumulation_fusion": "on"}, "gradient_accumulation_fusion: .*'on'"),
    ],
)
def test_what_cannot_be_is_refused(training: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(training={"gradient_accumulation_fusion": True} | training)
