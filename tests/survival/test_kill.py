"""Kill any rank at any moment: every checkpoint that is there is sound, and the run goes on as if nothing had happened.

`make test` kills 3 times; `make test-slow` 37 times more by count and clock, over both engines, and two runs under torchrun 3 times each.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nha_megatron.checkpoint import verify
from nha_megatron.checkpoint.files import published_steps
from tests.distributed import RankPool  # the fixture `ranks` of some tests: it makes the fork server load torch first
from tests.launch.slurm_cluster import PATIENCE_S
from tests.launch.test_torchrun import ranks_of, running, wait_for
from tests.optional import needs_deepspeed
from tests.survival.processes import choose_kills, run
from tests.training import small_run

ENGINES: dict[str, dict[str, Any]] = {
    "megatron": {},
    **{f"zero{stage}": {"engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage}}} for stage in (1, 2, 3)},
}
LAYOUTS: dict[str, dict[str, Any]] = {"dp2": {}, "tp2": {"tensor": 2}, "cp2": {"context": 2}, "pp2": {"pipeline": 2}}


def settings(folder: Path, engine: str, layout: str, asynchronous: bool, name: str, steps: int, **training: Any) -> dict[str, Any]:
    return small_run.settings(
        folder,
        training={"steps": steps, **ENGINES[engine], **training},
        parallel=LAYOUTS[layout],
        optimizer={"schedule": "constant"},  # so that the curve does not depend on the number of steps
        checkpoint={"every": 1, "keep": 2, "asynchronous": asynchronous},
        logging={"directory": str(folder / name)},
    )


def kill_and_resume(folder: Path, seed: int, kills: int, engine: str, layout: str, **training: Any) -> None:
    """Starts one run again after every kill, then lets it finish; compares it with a run that nobody disturbs.

    Starts differ in whether checkpoints are asynchronous, which must make no difference. `training`: more of that section.
    """
    small_run.write_corpus(folder)
    checkpoints = folder / "killed" / "checkpoints"
    for number, kill in enumerate(choose_kills(seed, kills, world=2)):
        assert run(settings(folder, engine, layout, number % 2 == 0, "killed", steps=100_000, **training), 2, kill), kill
        for step in published_steps(checkpoints):
            assert verify(checkpoints / f"step_{step}").step == step, kill

    steps = max(published_steps(checkpoints), default=0) + 2
    run(settings(folder, engine, layout, True, "killed", steps, **training), 2)
    run(settings(folder, engine, layout, False, "whole", steps, **training), 2)
    killed, whole = (small_run.metrics(folder, name) for name in ("killed", "whole"))
    assert [record["step"] for record in killed] == list(range(1, steps + 1))
    for key in ("loss", "grad_norm", "lr", "tokens"):
        assert [record[key] for record in killed] == [record[key] for record in whole], key
    ours, theirs = small_run.weights(folder, "killed"), small_run.weights(folder, "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()


def test_three_kills(ranks: RankPool, tmp_path: Path) -> None:
    kill_and_resume(tmp_path, seed=1, kills=3, engine="megatron", layout="dp2")


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "layout"), enumerate(LAYOUTS), ids=LAYOUTS)
def test_seven_kills(ranks: RankPool, tmp_path: Path, seed: int, layout: str) -> None:
    kill_and_resume(tmp_path, seed=10 + seed, kills=7, engine="megatron", layout=layout)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize(("seed", "engine", "layout"), [(20, "zero1", "dp2"), (21, "zero2", "cp2"), (22, "zero3", "tp2")])
def test_three_kills_under_zero(ranks: RankPool, tmp_path: Path, seed: int, engine: str, layout: str) -> None:
    kill_and_resume(tmp_path, seed, kills=3, engine=engine, layout=layout)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["megatron", pytest.param("zero1", marks=needs_deepspeed)])
def test_torchrun_starts_the_ranks_again_after_each_of_three_kills(ranks: RankPool, tmp_path: Path, engine: str) -> None:
    kill_under_torchrun(tmp_path, engine, steps=40)
    run(settings(tmp_path, engine, "dp2", asynchronous=False, name="whole", steps=40), 2)
    assert small_run.losses(tmp_path, "killed") == small_run.losses(tmp_path, "whole")


def kill_under_torchrun(folder: Path, engine: str, steps: int, kills: int = 3, **training: Any) -> None:
    """One launch of launch/torchrun.sh, whose ranks are killed while a checkpoint is being written, and which finishes all the same."""
    small_run.write_corpus(folder)
    chance = random.Random(3)
    plain = settings(folder, engine, "dp2", asynchronous=True, name="killed", steps=steps, **training)
    (folder / "run.yaml").write_text(yaml.safe_dump(plain))
    checkpoints = folder / "killed" / "checkpoints"
    with running(folder, "torchrun.sh", "run.yaml", MAX_RESTARTS=str(kills)) as job:
        for start in range(kills):
            said = "world 2 = "  # by every start, when its engine is built
            wait_for(lambda: (folder / "log").read_text().count(said) > start, folder)  # noqa: B023
            wait_for(lambda: list(checkpoints.glob(".step_*.partial")), folder)
            time.sleep(chance.uniform(0, 0.2))
            ranks_of(job)[chance.randrange(2)].kill()
        assert job.wait(PATIENCE_S) == 0, (folder / "log").read_text()
