"""torchrun.sh and deepspeed.sh: which command they run, and what they make of its end. A stand-in plays Python."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.launch.slurm_cluster import ROOT

# Writes down what it was called with. `check` and the search for deepspeed succeed unless a test says otherwise.
FAKE_PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$FAKE_LOG"
case "$*" in
    *"nha_megatron check"*) exit "${FAKE_CHECK:-0}" ;;
    *find_spec*) exit "${FAKE_DEEPSPEED:-0}" ;;
    *sys.prefix*) echo /the/prefix; exit ;;
    *distributed.run*|*launcher.runner*) ;;
esac
env > "$FAKE_LOG.env"
[ -z "${FAKE_HOSTFILE:-}" ] || cat $(printf '%s\\n' "$@" | sed -n 's/^--hostfile=//p') > "$FAKE_LOG.hosts"
[ -z "${FAKE_NOTE:-}" ] || echo "$FAKE_NOTE" > "$NHA_EXIT_NOTE"
if [ -n "${FAKE_RANKS:-}" ]; then
    "$REAL_PYTHON" -SE "$FAKE_RANK" 0 & "$REAL_PYTHON" -SE "$FAKE_RANK" 1 &
    echo $$ > "$FAKE_LOG.launcher"
    wait
    exit
fi
[ -z "${FAKE_WAIT:-}" ] || { touch "$FAKE_LOG.ready"; sleep "$FAKE_WAIT"; }
exit "${FAKE_STATUS:-0}"
"""

# A rank, as nha_megatron/exit_status.py introduces it. The scripts ignore SIGUSR1 for it; training listens to it all the same.
FAKE_RANK = """
import os, pathlib, signal, sys, time
rank, kind = sys.argv[1], os.environ["FAKE_RANKS"]
place = pathlib.Path(os.environ["NHA_EXIT_NOTE"]).with_name("rank_" + rank)
def save(*_):
    open(os.environ["FAKE_LOG"] + ".asked" + rank, "a").write("asked")
    place.with_suffix(".training").rename(place.with_suffix(".ended-75"))
    os._exit(0)
if kind == "saves":
    signal.signal(signal.SIGUSR1, save)
place.with_suffix(".new").write_text(f"{os.getpid()}\\n")
place.with_suffix(".new").rename(place.with_suffix(".starting" if kind == "starts" else ".training"))
open(os.environ["FAKE_LOG"] + ".ready" + rank, "w").close()
time.sleep(60)
"""


class Shell:
    """Runs a launch script with the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "calls"
        self.python = folder / "python"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        self.rank = folder / "rank.py"
        self.rank.write_text(FAKE_RANK)

    def environment(self, **extra: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "TMPDIR")}
        return {
            **kept,
            "PYTHON": str(self.python),
            "FAKE_LOG": str(self.log),
            "NPROC_PER_NODE": "2",
            "FAKE_NOTE": "0",
            **self.ranks,
            **extra,
        }

    @property
    def ranks(self) -> dict[str, str]:
        return {"REAL_PYTHON": sys.executable, "FAKE_RANK": str(self.rank)}

    def run(self, script: str, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        command = [str(ROOT / "launch" / script), *arguments]
        return subprocess.run(command, env=self.environment(**extra), capture_output=True, text=True)

    def last_call(self) -> list[str]:
        return self.log.read_text().splitlines()[-1].split()

    def seen(self, name: str) -> str:
        lines = Path(f"{self.log}.env").read_text().splitlines()
        return next(line.partition("=")[2] for line in lines if line.startswith(f"{name}="))


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


SCRIPTS = ("torchrun.sh", "deepspeed.sh")


def test_one_node(shell: Shell) -> None:
    assert shell.run("torchrun.sh", "run.yaml", "training.steps=3").returncode == 0
    call = " ".join(shell.last_call())
    assert call.startswith("-m torch.distributed.run --nnodes=1 --nproc-per-node=2 --max-restarts=3 --standalone --local-addr=127.0.0.1 ")
    assert call.endswith("-m nha_megatron pretrain run.yaml training.steps=3")
    assert shell.seen("PYTHONPATH").split(":")[:2] == [str(ROOT), str(ROOT / "kernels")]
    assert shell.seen("PYTHONSAFEPATH") == "1"  # else the working directory's code comes before this one


def test_several_nodes_meet_at_the_endpoint(shell: Shell) -> None:
    extra = {"NNODES": "4", "RDZV_ENDPOINT": "n1:29400", "RDZV_ID": "77", "MAX_RESTARTS": "1"}
    assert shell.run("torchrun.sh", "run.yaml", **extra).returncode == 0
    call = " ".join(shell.last_call())
    assert "--nnodes=4 --nproc-per-node=2 --max-restarts=1 --rdzv-backend=c10d --rdzv-endpoint=n1:29400 --rdzv-id=77" in call
    assert "check --inputs --world-size 8 run.yaml" in shell.log.read_text()


def test_names_that_several_nodes_meet_by_are_tested_first(shell: Shell) -> None:
    meeting = {"NNODES": "2", "RDZV_ENDPOINT": "n1:29400"}
    assert shell.run("torchrun.sh", "run.yaml", **meeting).returncode == 0
    assert "nha_megatron.cluster.host_names RDZV_ENDPOINT=n1:29400 --own-name\n" in shell.log.read_text()
    assert shell.run("torchrun.sh", "run.yaml", **meeting, LOCAL_ADDR="10.0.0.7").returncode == 0
    assert "nha_megatron.cluster.host_names RDZV_ENDPOINT=n1:29400 LOCAL_ADDR=10.0.0.7\n" in shell.log.read_text()
    assert "--local-addr=10.0.0.7" in shell.last_call()
    done = shell.run("torchrun.sh", "run.yaml", **meeting, PYTHON=sys.executable)
    assert done.returncode == 2 and done.stderr.startswith("error: RDZV_ENDPOINT 'n1' does not resolve on ")


def test_the_name_of_the_first_node_under_deepspeed_is_tested(shell: Shell) -> None:
    extra = {"NODE_NAMES": "n1 n2", "NODE_RANK": "0", "MASTER_ADDR": "n1"}
    assert shell.run("deepspeed.sh", "run.yaml", **extra).returncode == 0
    assert "nha_megatron.cluster.host_names MASTER_ADDR=n1\n" in shell.log.read_text()


def test_several_nodes_without_an_endpoint_are_refused(shell: Shell) -> None:
    done = shell.run("torchrun.sh", "run.yaml", NNODES="2")
    assert done.returncode == 2 and "set RDZV_ENDPOINT=host:port" in done.stderr


def test_a_health_check_is_not_repeated(shell: Shell) -> None:
    assert shell.run("torchrun.sh", "health", "run.yaml").returncode == 0
    assert "--max-restarts=0" in shell.last_call() and shell.last_call()[-2:] == ["health", "run.yaml"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_usage(shell: Shell, script: str) -> None:
    done = shell.run(script)
    assert done.returncode == 2 and f"usage: {script}" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_bad_configuration_starts_nothing(shell: Shell, script: str) -> None:
    assert shell.run(script, "run.yaml", FAKE_CHECK="2").returncode == 2
    assert "nha_megatron check" in " ".join(shell.last_call())


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("launcher", "note", "status"),
    [("0", "0", 0), ("0", "3", 3), ("0", "75", 75), ("1", "", 1), ("1", "75", 1), ("0", "", 1)],
    ids=["complete", "given up", "stopped", "failed", "some stopped, some failed", "lost: DeepSpeed's launcher returns 0 after kill -9"],
)
def test_exit_status(shell: Shell, script: str, launcher: str, note: str, status: int) -> None:
    assert shell.run(script, "run.yaml", FAKE_STATUS=launcher, FAKE_NOTE=note).returncode == status


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextlib.contextmanager
def running(shell: Shell, script: str, **extra: str) -> Iterator[subprocess.Popen[str]]:
    """The script once its ranks have introduced themselves; what it says goes to its log."""
    # SIGINT as a program has it in the foreground; a shell starts its background jobs with it ignored.
    foreground = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command, environment = [str(ROOT / "launch" / script), "run.yaml"], shell.environment(**extra)
    with Path(f"{shell.log}.said").open("w") as said:
        job = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=foreground, stderr=said, text=True)
    try:
        deadline = time.monotonic() + 30
        while not all(Path(f"{shell.log}.ready{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.02)
        yield job
    finally:
        if job.poll() is None:
            job.send_signal(signal.SIGQUIT)  # ends the ranks too
            job.wait(10)


def stop(shell: Shell, script: str, number: signal.Signals, group: bool = False, **extra: str) -> tuple[int, str]:
    """Signals the script; its status, and what it said."""
    with running(shell, script, **extra) as job:
        (os.killpg if group else os.kill)(job.pid, number)
        return job.wait(30), Path(f"{shell.log}.said").read_text()


@pytest.mark.parametrize("group", [False, True], ids=["alone", "group"])
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_request_to_stop_reaches_the_ranks_and_not_the_launcher(shell: Shell, script: str, number: signal.Signals, group: bool) -> None:
    status, said = stop(shell, script, number, group, FAKE_RANKS="saves")
    assert status == 75 and f"SIG{number.name[3:]}: asking the processes to save" in said
    assert all(Path(f"{shell.log}.asked{rank}").exists() for rank in (0, 1)) and "Traceback" not in said


@pytest.mark.parametrize("script", SCRIPTS)
def test_before_training_there_is_nothing_to_wait_for(shell: Shell, script: str) -> None:
    started = time.monotonic()
    status, said = stop(shell, script, signal.SIGINT, FAKE_RANKS="starts")
    assert status == 75 and "before training began" in said and time.monotonic() - started < 20


def test_ranks_that_do_not_save_in_time_are_ended(shell: Shell) -> None:
    status, said = stop(shell, "torchrun.sh", signal.SIGTERM, FAKE_RANKS="hangs", STOP_TIMEOUT="1")
    assert status == 1 and "not saved within STOP_TIMEOUT, 1 s" in said


def test_ranks_outlive_their_launcher_and_save(shell: Shell) -> None:
    with running(shell, "torchrun.sh", FAKE_RANKS="saves") as job:
        os.kill(int(Path(f"{shell.log}.launcher").read_text()), signal.SIGKILL)
        assert job.wait(30) == 75


def test_deepspeed_on_one_node(shell: Shell) -> None:
    assert shell.run("deepspeed.sh", "run.yaml", "training.steps=3").returncode == 0
    call = " ".join(shell.last_call())
    assert "-m deepspeed.launcher.runner" in call and "--num_gpus=2" in call
    assert call.endswith("--no_local_rank --module nha_megatron pretrain run.yaml training.steps=3")


def test_deepspeed_keeps_the_visible_devices(shell: Shell) -> None:
    assert shell.run("deepspeed.sh", "run.yaml", CUDA_VISIBLE_DEVICES="2,5").returncode == 0
    assert not any(word.startswith("--num_gpus") for word in shell.last_call())
    done = shell.run("deepspeed.sh", "run.yaml", CUDA_VISIBLE_DEVICES="2,5,6")
    assert done.returncode == 2 and "name as many devices as processes" in done.stderr


def test_deepspeed_with_one_launcher_per_node(shell: Shell) -> None:
    extra = {"NODE_NAMES": "n1 n2 n3 ", "SLURM_NODEID": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29111", "FAKE_HOSTFILE": "1"}
    assert shell.run("deepspeed.sh", "run.yaml", **extra).returncode == 0
    call = " ".join(shell.last_call())
    assert "--master_port=29111 --no_ssh --node_rank=1" in call and "--master_addr=n1" in call
    assert Path(f"{shell.log}.hosts").read_text() == "n1 slots=2\nn2 slots=2\nn3 slots=2\n"
    assert "--world-size 6" in shell.log.read_text()


def test_deepspeed_does_not_take_other_peoples_devices(shell: Shell) -> None:
    extra = {"NODE_NAMES": "n1 n2", "NODE_RANK": "0", "MASTER_ADDR": "n1", "CUDA_VISIBLE_DEVICES": "4,5"}
    done = shell.run("deepspeed.sh", "run.yaml", **extra)
    assert done.returncode == 2 and "would replace by 0,1" in done.stderr


def test_deepspeed_with_a_hostfile(shell: Shell, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# two nodes\nn1 slots=4\n\nn2 slots=4\n")
    assert shell.run("deepspeed.sh", "run.yaml", HOSTFILE=str(hosts), MASTER_ADDR="n1").returncode == 0
    assert f"--hostfile={hosts} --no_ssh_check --master_addr=n1" in " ".join(shell.last_call())
    assert "--world-size 8" in shell.log.read_text()
    done = shell.run("deepspeed.sh", "run.yaml", HOSTFILE="nowhere")
    assert done.returncode == 2 and "HOSTFILE nowhere: no such file" in done.stderr


def test_deepspeed_that_is_not_installed(shell: Shell) -> None:
    done = shell.run("deepspeed.sh", "run.yaml", FAKE_DEEPSPEED="1")
    assert done.returncode == 2 and "deepspeed is not installed in /the/prefix" in done.stderr
