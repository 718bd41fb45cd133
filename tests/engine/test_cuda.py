"""The same engine on CUDA: against the CPU from the same weights, and two GPUs against one, exact to rounding.

The models here have heads that the fused kernels do not take, so attention runs in PyTorch. test_cuda_kernels.py has the kernels.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch

from tests.distributed import RankPool
from tests.engine.programs import make_engine, micro_batches, tiny_config, train
from tests.engine.test_parallel_parity import CP, INTERLEAVED, PP, SP, TP, assert_same_training, join_stages

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

CUDA = {"device": "cuda"}


def train_from(weights: dict[str, torch.Tensor], training: dict[str, Any]) -> list[float]:
    config = tiny_config(training=training)
    engine = make_engine(config)
    engine.load_weights(weights)
    return [engine.train_step(micro_batches(config, engine.layout, step), config.optimizer.lr).loss for step in range(5)]


def test_cuda_trains_like_the_cpu(ranks: RankPool) -> None:
    # In a process of its own: a process that trained on the CPU keeps the workarounds for it.
    with closing(RankPool()) as cpu_ranks:
        (cpu,) = cpu_ranks.run(1, train, config=tiny_config())
    (losses,) = ranks.run(1, train_from, backend="nccl", weights=cpu["weights"], training=CUDA)
    # The same sums in another order, as between layouts on the CPU (test_parallel_parity.py).
    assert losses == pytest.approx(cpu["losses"], rel=5e-5)


@two_gpus
@pytest.mark.parametrize("parallel", [TP, SP, PP, INTERLEAVED, {}, CP], ids=str)
def test_two_gpus_train_like_one(ranks: RankPool, parallel: dict[str, Any]) -> None:
    """float32 without tf32: losses, every gradient and a curve of 5 steps, to the tolerances of the CPU."""
    (one,) = ranks.run(1, train, backend="nccl", config=tiny_config(training=CUDA))
    results = ranks.run(2, train, backend="nccl", config=tiny_config(training=CUDA, parallel=parallel))
    assert_same_training(join_stages(results), one)
