"""The DeepSpeed engine on CUDA: two GPUs against the Megatron engine on one, and exact resume."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import RankPool
from tests.engine import programs
from tests.engine.deepspeed.programs import optimizer_without_a_compiler, train, zero
from tests.engine.deepspeed.test_resharding import load_and_train, train_and_save
from tests.engine.programs import tiny_config
from tests.optional import needs_deepspeed

pytestmark = [pytest.mark.gpu, needs_deepspeed]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module")
def own_ranks() -> Iterator[RankPool]:
    """Processes of their own: DeepSpeed is set up for one kind of device in the life of a process."""
    with closing(RankPool()) as pool:
        yield pool


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_nothing_is_compiled_and_adam_is_fused(own_ranks: RankPool, stage: int) -> None:
    config = tiny_config(training={"device": "cuda", "precision": "bf16", **zero(stage)})
    assert own_ranks.run(1, optimizer_without_a_compiler, backend="nccl", config=config) == [("AdamW", True)]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_gpu_trains_like_megatron(own_ranks: RankPool, stage: int, precision: str) -> None:
    settings = {"device": "cuda", "precision": precision}
    (expected,) = own_ranks.run(1, programs.train, backend="nccl", config=tiny_config(training=settings))
    (result,) = own_ranks.run(1, train, backend="nccl", config=tiny_config(training=settings | zero(stage)))
    # The same kernels; the update is a fused one, and gradients are scaled before the backward instead of after.
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-3 if precision == "fp32" else 5e-3)
    assert result["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-2 if precision == "fp32" else 5e-2)


@two_gpus
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "sequence": True}, {"context": 2}], ids=str)
def test_two_gpus_train_like_one(own_ranks: RankPool, stage: int, parallel: dict[str, Any]) -> None:
    settings = {"device": "cuda"}
    (expected,) = own_ranks.run(1, programs.train, backend="nccl", config=tiny_config(training=settings))
    results = own_ranks.run(2, train, backend="nccl", config=tiny_config(training=settings | zero(stage), parallel=parallel))
    assert results[0]["losses"] == results[1]["losses"]
    assert results[0]["losses"] == pytest.approx(expected["losses"], rel=2e-3)  # test_cuda.py
    assert results[0]["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-2)


@two_gpus
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_gpus_resume_bit_for_bit(own_ranks: RankPool, tmp_path: Path, stage: int) -> None:
    sections = {"training": {"device": "cuda", "precision": "bf16", **zero(stage)}}
    expected = own_ranks.run(2, train_and_save, backend="nccl", sections=sections, folder=str(tmp_path))
    assert own_ranks.run(2, load_and_train, backend="nccl", sections=sections, folder=str(tmp_path)) == expected
