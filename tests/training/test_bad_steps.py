"""Bad steps of a whole run: skipped on all ranks, counted, and at the limit the run ends with the checkpoint from before."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nha_megatron.checkpoint import verify
from nha_megatron.engine.megatron import MegatronEngine
from nha_megatron.training.guards import TrainingError
from nha_megatron.training.loop import require_finite_weights
from tests.distributed import RankPool
from tests.engine import programs
from tests.training import small_run

EXPLOSIVE = {"lr": 1e30, "warmup_steps": 0, "clip_grad": 0.0}


def pretrain_with_bad_steps(plain: dict[str, Any], bad_steps: Sequence[int], rank: int = 1) -> str | None:
    """Program of the rank pool: the whole job, in which the backward of `bad_steps` (counted from its start) makes NaN on one rank."""
    honest: Callable[..., Any] = MegatronEngine._accumulate_gradients
    steps = iter(range(1, 1000))

    def accumulate(engine: MegatronEngine, batches: Any) -> Any:
        result = honest(engine, batches)
        if next(steps) in bad_steps and dist.get_rank() == rank:
            # After the reduction: only this rank's part of the gradient is hurt, as by a fault of its device.
            engine.model_chunks[0].buffers[0].grad_data.fill_(math.nan)
        return result

    MegatronEngine._accumulate_gradients = accumulate  # type: ignore[method-assign]
    try:
        return small_run.pretrain_on_rank(plain)
    finally:
        MegatronEngine._accumulate_gradients = honest  # type: ignore[method-assign]


def settings(folder: Path, name: str = "run", **sections: Any) -> dict[str, Any]:
    return small_run.settings(folder, logging={"directory": str(folder / name)}, **sections)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_run.write_corpus(tmp_path)
    return tmp_path


def test_one_bad_step_is_skipped_by_all_ranks_and_the_run_goes_on(ranks: RankPool, folder: Path) -> None:
    plain = settings(folder, training={"steps": 5})
    assert ranks.run(2, pretrain_with_bad_steps, plain=plain, bad_steps=[3]) == [None, None]
    records = small_run.metrics(folder)
    assert [record["skipped"] for record in records] == [0, 0, 1, 1, 1]
    assert records[2]["grad_norm"] is None and records[2]["loss"] is not None
    # The checkpoint of step 3 waits for an update that is applied.
    assert sorted(path.name for path in (folder / "run" / "checkpoints").glob("step_*")) == ["step_4", "step_5"]
    assert all(weight.isfinite().all() for weight in small_run.weights(folder).values())


def test_at_the_limit_the_run_ends_and_resumes_from_the_checkpoint_before(ranks: RankPool, folder: Path) -> None:
    plain = settings(folder, guards={"skip_limit": 2}, checkpoint={"every": 2})
    messages = ranks.run(2, pretrain_with_bad_steps, plain=plain, bad_steps=[4, 5, 6])
    assert messages[0] == messages[1] and messages[0] is not None
    assert "gradient norm nan: training stopped, because 3 of the last 64 updates could not be applied" in messages[0]
    assert [path.name for path in (folder / "run" / "checkpoints").glob("step_*")] == ["step_2"]
    verify(folder / "run" / "checkpoints" / "step_2")

    # The fault is gone: the run goes on as one that never had it.
    assert ranks.run(2, small_run.pretrain_on_rank, plain=plain) == [None, None]
    assert ranks.run(2, small_run.pretrain_on_rank, plain=settings(folder, "sound")) == [None, None]
    assert small_run.losses(folder) == small_run.losses(folder, "sound")
    ours, theirs = small_run.weights(folder), small_run.weights(folder, "sound")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_count_goes_on_after_a_resume(ranks: RankPool, folder: Path) -> None:
    plain = settings(folder, guards={"skip_limit": 1}, training={"steps": 3})
    assert ranks.run(2, pretrain_with_bad_steps, plain=plain, bad_steps=[2]) == [None, None]
    plain["training"]["steps"] = 6
    messages = ranks.run(2, pretrain_with_bad_steps, plain=plain, bad_steps=[1])
    assert messages[0] == messages[1] and "of step 4" in messages[0] and "2 of the last 64 updates" in messages[0]


def check_weights(bad_rank: int | None) -> str | None:
    """Program: what `require_finite_weights` says when one rank has an infinite weight."""
    engine = programs.make_engine(programs.tiny_config())
    if dist.get_rank() == bad_rank:
        dict(engine.named_parameters())["decoder.final_layernorm.weight"].data[1] = math.inf
    try:
        require_finite_weights(engine, 7)
    except TrainingError as error:
        return str(error)
    return None


def test_a_run_that_ends_on_a_skipped_step_saves_finite_weights_only(ranks: RankPool) -> None:
    assert ranks.run(2, check_weights, bad_rank=None) == [None, None]
    messages = ranks.run(2, check_weights, bad_rank=1)
    assert messages[0] == messages[1] and "step 7, which was skipped, and its weights are not finite: nothing was saved" in messages[0]


def test_without_skips_allowed_the_first_bad_step_ends_the_run(ranks: RankPool, folder: Path) -> None:
    messages = ranks.run(2, small_run.pretrain_on_rank, plain=settings(folder, optimizer=EXPLOSIVE, guards={"skip_limit": 0}))
    assert messages[0] == messages[1] and "of step 2 is" in messages[0] and "guards.skip_limit is 0" in messages[0]
    assert [record["step"] for record in small_run.metrics(folder)] == [1]
