"""Real runs of launch/torchrun.sh and launch/deepspeed.sh on this machine: killed and frozen ranks, an interrupted run."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.launch.slurm_cluster import PATIENCE_S, ROOT, submit_environment
from tests.optional import needs_deepspeed
from tests.training import small_run

pytestmark = pytest.mark.slow
ENDLESS: dict[str, dict[str, Any]] = {"training": {"steps": 100000}, "optimizer": {"schedule": "constant"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small_run.write_corpus(tmp_path)
    return tmp_path


def write_run(folder: Path, **sections: dict[str, Any]) -> Path:
    sections = {"parallel": {"context": 2}, **sections}
    (folder / "run.yaml").write_text(yaml.safe_dump(small_run.settings(folder, **sections)))
    return folder / "run" / "metrics.jsonl"


@contextlib.contextmanager
def running(folder: Path, script: str, *arguments: str, **extra: str) -> Iterator[subprocess.Popen[bytes]]:
    """The script in the background, its output in folder/log; every process of it is gone afterwards."""
    environment = submit_environment(**{"NPROC_PER_NODE": "2", "MASTER_PORT": str(free_port()), **extra})
    with (folder / "log").open("wb") as log:
        command = [str(ROOT / "launch" / script), *arguments]
        job = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    descendants = psutil.Process(job.pid).children(recursive=True)
    try:
        yield job
    finally:
        if job.poll() is None:
            descendants = psutil.Process(job.pid).children(recursive=True)
            job.kill()
        for process in descendants:
            if process.is_running():
                process.kill()
        job.wait(30)


def free_port() -> int:
    """One that nobody listens on: several of these tests may run at once.

    Below those that the system gives to outgoing connections, one of which may take it before it is listened on.
    """
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def wait_for(condition: Callable[[], object], folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.1)


def steps(metrics: Path) -> int:
    return metrics.read_text().count("\n") if metrics.exists() else 0


def ranks_of(job: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The training processes, by rank."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.Process(job.pid).children(recursive=True):
        environment = process.environ()
        if "RANK" in environment and "nha_megatron" in process.cmdline():
            found.setdefault(int(environment["RANK"]), process)
    return [found[rank] for rank in sorted(found)]


def test_torchrun_starts_killed_ranks_again_from_the_newest_checkpoint(folder: Path) -> None:
    metrics = write_run(folder, training={"steps": 16}, checkpoint={"every": 4})
    with running(folder, "torchrun.sh", "run.yaml") as job:
        wait_for(lambda: (folder / "run" / "checkpoints" / "latest").exists(), folder)
        ranks_of(job)[1].kill()
        assert job.wait(PATIENCE_S) == 0, (folder / "log").read_text()
    assert re.search(r"resumed from .*/step_\d+: step", (folder / "log").read_text())
    assert [record["step"] for record in small_run.metrics(folder)] == list(range(1, 17)) and steps(metrics) == 16


def test_a_run_that_its_guards_give_up_is_not_started_again(folder: Path) -> None:
    """With this learning rate the gradient of step 2 is not finite, and no such step is allowed."""
    write_run(folder, optimizer={"lr": 1e30, "warmup_steps": 0, "clip_grad": 0.0}, guards={"skip_limit": 0})
    with running(folder, "torchrun.sh", "run.yaml") as job:
        assert job.wait(PATIENCE_S) == 3, (folder / "log").read_text()
    log = (folder / "log").read_text()
    assert log.count("and guards.skip_limit is 0") == 1 and "Traceback" not in log
    assert log.count("on cpu, 27,360 parameters") == 1


@pytest.mark.parametrize("rank", [0, 1])  # rank 0 holds the store that the others ask
def test_a_frozen_rank_is_named_and_the_run_goes_on(folder: Path, rank: int) -> None:
    metrics = write_run(folder, training={"steps": 12, "stall_seconds": 20}, checkpoint={"every": 2})
    with running(folder, "torchrun.sh", "run.yaml") as job:
        wait_for(lambda: steps(metrics) >= 3, folder)
        frozen = ranks_of(job)[rank]
        frozen.suspend()  # what a host that hangs looks like to the others
        wait_for(lambda: f"missing: rank {rank} (" in (folder / "log").read_text(), folder)
        assert job.wait(PATIENCE_S) == 0, (folder / "log").read_text()
    assert [record["step"] for record in small_run.metrics(folder)] == list(range(1, 13))


@pytest.mark.parametrize("script", ["torchrun.sh", pytest.param("deepspeed.sh", marks=needs_deepspeed)])
@pytest.mark.parametrize("to", ["script", "launcher"])
def test_a_signal_saves_before_the_end(folder: Path, script: str, to: str) -> None:
    """Every signal, and the process group: tests/launch/test_scripts.py."""
    metrics = write_run(folder, **ENDLESS, checkpoint={"every": 100000})
    with running(folder, script, "run.yaml", DS_ACCELERATOR="cpu") as job:
        wait_for(lambda: steps(metrics) >= 2, folder)
        words = {"torch.distributed.run", "deepspeed.launcher.runner"}
        (launcher,) = [child for child in psutil.Process(job.pid).children() if words & set(child.cmdline())]
        (psutil.Process(job.pid) if to == "script" else launcher).terminate()
        assert job.wait(PATIENCE_S) == 75, (folder / "log").read_text()
    said = (folder / "log").read_text()
    assert "after step" in said and "Traceback" not in said, said
    assert (folder / "run" / "checkpoints" / "latest").read_text() == f"step_{steps(metrics)}\n"


def test_one_node_needs_no_name(folder: Path) -> None:
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("this machine allows no namespaces (unshare)")
    write_run(folder, training={"steps": 2})
    command = ["unshare", "--uts", "bash", "-c", f"hostname no-such-name && exec {ROOT}/launch/torchrun.sh run.yaml"]
    done = subprocess.run(
        command, cwd=folder, env=submit_environment(NPROC_PER_NODE="2"), capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    assert len(small_run.losses(folder)) == 2


def test_two_nodes_of_torchrun_on_one_machine(folder: Path) -> None:
    write_run(folder, training={"steps": 3})
    meeting = {"NNODES": "2", "RDZV_ENDPOINT": f"localhost:{free_port()}", "RDZV_ID": folder.name}
    with running(folder, "torchrun.sh", "run.yaml", **meeting | {"NPROC_PER_NODE": "1"}) as first:
        environment = submit_environment(NPROC_PER_NODE="1", **meeting)
        second = subprocess.run([str(ROOT / "launch" / "torchrun.sh"), "run.yaml"], cwd=folder, env=environment, capture_output=True)
        assert (first.wait(PATIENCE_S), second.returncode) == (0, 0), (folder / "log").read_text()
    assert len(small_run.losses(folder)) == 3


@needs_deepspeed
def test_deepspeed_launcher_trains_the_same_curve(folder: Path) -> None:
    write_run(folder, training={"steps": 4})
    hosts = folder / "hosts"
    hosts.write_text("localhost slots=2\n")
    local = {"DS_ACCELERATOR": "cpu"}
    hostfile = {**local, "HOSTFILE": str(hosts), "MASTER_ADDR": "127.0.0.1"}
    for name, script, extra in (("torchrun", "torchrun.sh", {}), ("one", "deepspeed.sh", local), ("hostfile", "deepspeed.sh", hostfile)):
        with running(folder, script, "run.yaml", f"logging.directory={folder / name}", **extra) as job:
            assert job.wait(PATIENCE_S) == 0, (folder / "log").read_text()
    curve = small_run.losses(folder, "torchrun")
    assert len(curve) == 4 and small_run.losses(folder, "one") == small_run.losses(folder, "hostfile") == curve


@needs_deepspeed
def test_deepspeed_launcher_reports_a_killed_rank(folder: Path) -> None:
    """DeepSpeed's own status is 0 here (its runner drops the negative status of a killed process)."""
    metrics = write_run(folder, **ENDLESS)
    with running(folder, "deepspeed.sh", "run.yaml", DS_ACCELERATOR="cpu") as job:
        wait_for(lambda: steps(metrics) >= 1, folder)
        ranks_of(job)[1].kill()
        assert job.wait(PATIENCE_S) != 0


def test_a_mistake_is_refused_once_and_before_any_process_starts(folder: Path) -> None:
    write_run(folder, data={"path": str(folder / "nowhere")})
    command, environment = [str(ROOT / "launch" / "torchrun.sh"), "run.yaml"], submit_environment(NPROC_PER_NODE="2")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "nowhere" in done.stderr
    assert "torch.distributed" not in done.stderr
