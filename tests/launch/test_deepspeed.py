"""Real runs of `engine: deepspeed` under both launchers, each in processes of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.launch.slurm_cluster import PATIENCE_S
from tests.launch.test_torchrun import running, write_run
from tests.optional import needs_deepspeed
from tests.training import small_run

pytestmark = needs_deepspeed


def train(folder: Path, script: str, *overrides: str, **extra: str) -> str:
    """Runs a launch script to the end; returns what it said."""
    with running(folder, script, "run.yaml", *overrides, **extra) as job:
        status = job.wait(PATIENCE_S)
    said = (folder / "log").read_text()
    assert status == 0, said
    return said


def deepspeed_run(folder: Path, stage: int, steps: int) -> None:
    small_run.write_corpus(folder)
    zero = {"zero_optimization": {"stage": stage}}
    write_run(folder, training={"steps": steps, "engine": "deepspeed", "deepspeed": zero}, checkpoint={"every": 2}, parallel={})


def test_deepspeed_launcher_and_engine(tmp_path: Path) -> None:
    deepspeed_run(tmp_path, stage=3, steps=3)
    said = train(tmp_path, "deepspeed.sh", DS_ACCELERATOR="cpu")
    assert "engine deepspeed, ZeRO stage 3" in said and "Traceback" not in said
    assert len(small_run.losses(tmp_path)) == 3
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_3\n"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_goes_on_under_the_other_launcher(tmp_path: Path, stage: int) -> None:
    """Six steps under torchrun; what a kill after step 5 would have left of them, finished under DeepSpeed's launcher: bit for bit."""
    deepspeed_run(tmp_path, stage, steps=6)
    train(tmp_path, "torchrun.sh")
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_6")
    said = train(tmp_path, "deepspeed.sh", f"logging.directory={tmp_path / 'cut'}", DS_ACCELERATOR="cpu")
    assert "cut/checkpoints/step_4: step 4" in said
    assert small_run.losses(tmp_path, "cut") == small_run.losses(tmp_path)
