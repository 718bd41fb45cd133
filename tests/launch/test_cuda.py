"""The launch scripts on two GPUs: health check over NCCL, DeepSpeed's launcher, a frozen rank, a signal."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.launch.slurm_cluster import PATIENCE_S, ROOT, submit_environment
from tests.launch.test_torchrun import ENDLESS, ranks_of, running, steps, wait_for, write_run
from tests.optional import needs_deepspeed
from tests.training import small_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_run.write_corpus(tmp_path)
    return tmp_path


def write_cuda_run(folder: Path, training: dict[str, Any], **sections: dict[str, Any]) -> Path:
    return write_run(folder, training={"device": "cuda", "precision": "bf16", **training}, **sections)


def health(folder: Path, processes: int) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "launch" / "torchrun.sh"), "health", "run.yaml"]
    environment = submit_environment(NPROC_PER_NODE=str(processes))
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


def test_two_gpus_are_measured_over_nccl(folder: Path) -> None:
    write_cuda_run(folder, {})
    done = health(folder, 2)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)  # the measurements, for `pytest -rP`
    _, row, verdict = done.stdout.strip().splitlines()
    assert row.endswith("ok") and torch.cuda.get_device_name() in row
    rate = re.search(r"all-reduce over 2 ranks: right, (\S+) GB/s bus bandwidth", verdict)
    assert rate and float(rate[1]) > 1  # the slowest link between two devices of a host, PCIe through the host, has 5 and more


def test_a_device_too_few_is_named_before_nccl_starts(folder: Path) -> None:
    devices = torch.cuda.device_count()
    write_cuda_run(folder, {"global_batch_size": 4 * (devices + 1)}, parallel={})
    done = health(folder, devices + 1)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"broken: node \S+, rank {devices}: .*the host shows {devices} CUDA device", done.stdout), done.stdout
    assert "Traceback" not in done.stderr


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_launcher_and_engine(folder: Path, stage: int) -> None:
    """No compiler is needed: the optimizer is torch's, not one that DeepSpeed would compile first."""
    engine = {"steps": 4, "engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage}}}
    write_cuda_run(folder, engine, parallel={}, checkpoint={"every": 2, "asynchronous": True})
    with running(folder, "deepspeed.sh", "run.yaml", CUDA_HOME=str(folder / "no compiler here"), PYTHONUNBUFFERED="1") as job:
        status = job.wait(PATIENCE_S)
    said = (folder / "log").read_text()
    assert status == 0 and f"engine deepspeed, ZeRO stage {stage}" in said and "Traceback" not in said, said
    assert len(small_run.losses(folder)) == 4
    assert (folder / "run" / "checkpoints" / "latest").read_text() == "step_4\n"


def test_a_frozen_rank_is_named_and_the_run_goes_on(folder: Path) -> None:
    """The other rank waits inside of NCCL, on its device."""
    metrics = write_cuda_run(folder, {"steps": 2000, "stall_seconds": 20}, checkpoint={"every": 5}, optimizer={"schedule": "constant"})
    with running(folder, "torchrun.sh", "run.yaml") as job:
        wait_for(lambda: steps(metrics) >= 6, folder)
        frozen = ranks_of(job)[1]
        frozen.suspend()
        wait_for(lambda: "missing: rank 1 (" in (folder / "log").read_text(), folder)
        wait_for(lambda: re.search(r"resumed from .*/step_\d+: step", (folder / "log").read_text()), folder)
        reached = steps(metrics)
        wait_for(lambda: steps(metrics) > reached, folder)


def test_a_signal_saves_before_the_end(folder: Path) -> None:
    metrics = write_cuda_run(folder, ENDLESS["training"], optimizer=ENDLESS["optimizer"], checkpoint={"every": 100000})
    with running(folder, "torchrun.sh", "run.yaml") as job:
        wait_for(lambda: steps(metrics) >= 2, folder)
        (launcher,) = [child for child in psutil.Process(job.pid).children() if "torch.distributed.run" in child.cmdline()]
        launcher.send_signal(signal.SIGTERM)
        job.wait(PATIENCE_S)
    assert (folder / "run" / "checkpoints" / "latest").read_text() == f"step_{steps(metrics)}\n", (folder / "log").read_text()
