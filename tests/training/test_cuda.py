"""Whole runs on two GPUs: guards, the reports of ranks, asynchronous checkpoints, with both engines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from nha_megatron.checkpoint import verify
from tests.checkpoint.programs import pretrain_until_signalled
from tests.distributed import RankPool
from tests.optional import needs_deepspeed
from tests.training import small_run
from tests.training.test_bad_steps import pretrain_with_bad_steps
from tests.training.test_slow_ranks import pretrain_with_a_slow_rank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

ENGINES: dict[str, dict[str, Any]] = {
    "megatron": {},
    **{f"zero{stage}": {"engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage}}} for stage in (1, 3)},
}


@pytest.fixture
def gpu_ranks() -> Iterator[RankPool]:
    """Processes of their own: one that trained on the CPU keeps the workarounds for it, and DeepSpeed is set up for one kind of device."""
    with closing(RankPool()) as pool:
        yield pool


def settings(folder: Path, training: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    small_run.write_corpus(folder)
    return small_run.settings(folder, training={"device": "cuda", "precision": "bf16", **training}, **sections)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[needs_deepspeed] * (name != "megatron")) for name in ENGINES])
def test_a_run_goes_on_where_it_ended(gpu_ranks: RankPool, tmp_path: Path, name: str) -> None:
    """Six steps in one run, and in two with an asynchronous checkpoint between: bit for bit."""
    engine = ENGINES[name]
    whole = settings(tmp_path, engine, optimizer={"schedule": "constant"}, checkpoint={"every": 2, "asynchronous": True})
    assert gpu_ranks.run(2, small_run.pretrain_on_rank, backend="nccl", plain=whole) == [None, None]
    for steps in (4, 6):
        cut = settings(
            tmp_path,
            {**engine, "steps": steps},
            optimizer={"schedule": "constant"},
            checkpoint={"every": 3, "asynchronous": True},
            logging={"directory": str(tmp_path / "cut")},
        )
        gpu_ranks.close()  # as a new start does
        assert gpu_ranks.run(2, small_run.pretrain_on_rank, backend="nccl", plain=cut) == [None, None]
    assert len(small_run.losses(tmp_path)) == 6 and small_run.losses(tmp_path, "cut") == small_run.losses(tmp_path)
    ours, theirs = small_run.weights(tmp_path, "cut"), small_run.weights(tmp_path)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert small_run.metrics(tmp_path)[-1]["memory"] > 2**20  # of the device: a context alone is not counted


def test_a_step_that_is_not_finite_is_skipped_by_all_ranks(gpu_ranks: RankPool, tmp_path: Path) -> None:
    plain = settings(tmp_path, {"steps": 5})
    assert gpu_ranks.run(2, pretrain_with_bad_steps, backend="nccl", plain=plain, bad_steps=[3]) == [None, None]
    records = small_run.metrics(tmp_path)
    assert [record["skipped"] for record in records] == [0, 0, 1, 1, 1] and records[2]["grad_norm"] is None
    assert all(weight.isfinite().all() for weight in small_run.weights(tmp_path).values())


@pytest.mark.parametrize(("place", "parallel"), [("data", {"tensor": 2}), ("mlp", {"context": 2})], ids=["data", "mlp"])
def test_a_rank_that_sleeps_is_named(gpu_ranks: RankPool, tmp_path: Path, place: str, parallel: dict[str, Any]) -> None:
    training = {"steps": 6, "global_batch_size": 2}
    plain = settings(tmp_path, training, parallel=parallel, logging={"every": 3}, optimizer={"warmup_steps": 0})
    assert gpu_ranks.run(2, pretrain_with_a_slow_rank, backend="nccl", plain=plain, rank=1, place=place) == [None, None]
    last = small_run.metrics(tmp_path)[-1]
    assert last["slowest_rank"] == 1 and last["slowest_ratio"] > 1.5  # the first interval has compilations in it


def test_a_signal_waits_for_the_checkpoint_that_is_being_written(gpu_ranks: RankPool, tmp_path: Path) -> None:
    plain = settings(tmp_path, {"steps": 100}, checkpoint={"every": 3, "keep": 9, "asynchronous": True})
    for message, said in gpu_ranks.run(2, pretrain_until_signalled, backend="nccl", plain=plain, step=4):
        assert message is None
        assert [line.split(":")[0] for line in said] == ["step 3", "step 4"]
    assert [verify(tmp_path / "run" / "checkpoints" / f"step_{step}").step for step in (3, 4)] == [3, 4]
