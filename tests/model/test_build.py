"""From configuration to model: sizes as predicted, windows where the pattern says, precision and recomputation as asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nha_megatron.config import load_config
from nha_megatron.engine.layout import create_layout
from nha_megatron.estimate.counts import num_parameters
from nha_megatron.layers.nha.layer import NativeHybridAttention
from nha_megatron.model.build import build_meta_model, transformer_config
from tests.distributed import RankPool
from tests.engine.programs import CPU, make_engine, tiny_config

CONFIGURATIONS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def build_on_meta(path: str | None, model: dict[str, Any] | None = None) -> tuple[int, int, set[str]]:
    config = load_config(path, []) if path else tiny_config(model=model or {})
    groups = create_layout(tiny_config(), CPU).groups
    built = build_meta_model(config, groups)
    parameters = sum(parameter.numel() for parameter in built.parameters())
    return parameters, num_parameters(config.model), {parameter.device.type for parameter in built.parameters()}


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_configurations_build_with_the_predicted_number_of_parameters(ranks: RankPool, path: Path) -> None:
    ((parameters, predicted, devices),) = ranks.run(1, build_on_meta, path=str(path))
    assert parameters == predicted
    assert devices == {"meta"}


@pytest.mark.parametrize(
    "model",
    [{"qk_norm": "rms"}, {"qkv_bias": True}, {"output_norm": "none"}, {"tie_embeddings": True}, {"head_dim": 24, "num_kv_heads": 4}],
    ids=str,
)
def test_every_option_is_counted(ranks: RankPool, model: dict[str, Any]) -> None:
    ((parameters, predicted, _),) = ranks.run(1, build_on_meta, path=None, model=model)
    assert parameters == predicted


def windows_of_stage(parallel: dict[str, Any]) -> list[tuple[int, int | None]]:
    engine = make_engine(tiny_config(parallel=parallel, model={"window": "16,full,0,7"}))
    layers = [module for chunk in engine.model_chunks for module in chunk.modules() if isinstance(module, NativeHybridAttention)]
    return [(layer.layer_number, layer.options.window) for layer in layers]


def test_windows_follow_the_layers_over_stages(ranks: RankPool) -> None:
    assert ranks.run(2, windows_of_stage, parallel={"pipeline": 2}) == [[(1, 16), (2, None)], [(3, 0), (4, 7)]]
    interleaved = ranks.run(2, windows_of_stage, parallel={"pipeline": 2, "virtual_pipeline": 2})
    assert interleaved == [[(1, 16), (3, 0)], [(2, None), (4, 7)]]


def test_megatron_configuration() -> None:
    plain = transformer_config(tiny_config())
    assert plain.params_dtype is torch.float32 and plain.recompute_granularity is None and plain.calculate_per_token_loss
    # Both neighbours of a stage are one rank when there are two stages: batched messages would be mixed up.
    interleaved = transformer_config(tiny_config(parallel={"pipeline": 2, "virtual_pipeline": 2}))
    assert interleaved.overlap_p2p_comm and not interleaved.batch_p2p_comm
    assert transformer_config(tiny_config(training={"recompute": "full"})).recompute_granularity == "full"
    assert transformer_config(tiny_config(training={"precision": "bf16"})).params_dtype is torch.bfloat16
