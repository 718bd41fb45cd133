"""The same engine on CUDA: against the CPU from the same weights, and two GPUs against one."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch

from tests.distributed import RankPool
from tests.engine.programs import make_engine, micro_batches, tiny_config, train

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

CUDA = {"device": "cuda"}


def train_from(weights: dict[str, torch.Tensor], training: dict[str, Any]) -> list[float]:
    config = tiny_config(training=training)
    engine = make_engine(config)
    engine.load_weights(weights)
    return [engine.train_step(micro_batches(config, engine.layout, step), config.optimizer.lr).loss for step in range(5)]


def test_cuda_trains_like_the_cpu(ranks: RankPool) -> None:
    # In a process of its own: a process that trained on the CPU keeps the remedies for it.
    with closing(RankPool()) as cpu_ranks:
        (cpu,) = cpu_ranks.run(1, train, config=tiny_config())
    (losses,) = ranks.run(1, train_from, backend="nccl", weights=cpu["weights"], training=CUDA)
    # Other kernels, and on CUDA possibly tf32 (10 bits) in the attention: 1e-3 of each logit, averaged over 256 tokens.
    assert losses == pytest.approx(cpu["losses"], rel=2e-3)


@two_gpus
@pytest.mark.parametrize(
    "parallel",
    [{"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}, {}, {"context": 2}],
    ids=str,
)
def test_two_gpus_train_like_one(ranks: RankPool, parallel: dict[str, Any]) -> None:
    (one,) = ranks.run(1, train, backend="nccl", config=tiny_config(training=CUDA))
    results = ranks.run(2, train, backend="nccl", config=tiny_config(training=CUDA, parallel=parallel))
    assert results[0]["losses"] == results[1]["losses"]
    assert results[0]["losses"] == pytest.approx(one["losses"], rel=2e-3)  # as above
    for result in results:
        for name, gradient in result["gradients"].items():
            # A lost or doubled term would be of the gradient's own size.
            assert (gradient - one["gradients"][name]).norm() < 1e-2 * one["gradients"][name].norm().clamp(min=1e-9), name
