"""What the tests do with the cluster: submit, wait, signal, switch nodes off."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUBMIT = ROOT / "launch" / "slurm" / "submit.py"

# A job starts Python processes that import torch, on a machine that may be busy with other tests.
PATIENCE_S = 900.0
DONE = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def submit_environment(**extra: str) -> dict[str, str]:
    """The shell of a user: this interpreter first in PATH, one thread, no package path and no launcher of the test process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NHA_", "SLURM_", "RANK", "WORLD_SIZE", "MASTER_"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **extra}


@dataclass
class Job:
    id: str
    log: Path
    text: str
    """What the submit helper said."""


@dataclass
class SlurmCluster:
    testbed: Path
    environment: dict[str, str]
    conf: Path

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env={**self.environment, "SLURM_CONF": str(self.conf)}, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, folder: Path, *arguments: str, **extra: str) -> Job:
        """Submits folder/run.yaml with the submit helper, from that folder."""
        command = [sys.executable, str(SUBMIT), "run.yaml", *arguments]
        environment = submit_environment(SLURM_CONF=str(self.conf), **extra)
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        match = re.search(r"submitted: \D*(\d+)", done.stdout)
        log = re.search(r"tail -F (\S.*?\.log)", done.stdout)
        assert match and log, done.stdout
        return Job(match[1], Path(log[1]), done.stdout)

    def batch(self, folder: Path, *arguments: str) -> Job:
        """Hands launch/slurm/train.sbatch to sbatch, as a user in the checkout would; the log is folder/log."""
        log = folder / "log"
        command = ["sbatch", "--parsable", f"--output={log}", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=submit_environment(SLURM_CONF=str(self.conf)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return Job(done.stdout.strip(), log, "")

    def show(self, job: str) -> dict[str, str]:
        """The job as slurmctld sees it."""
        pairs = (item.partition("=") for item in self.run("scontrol", "show", "job", job, "-o").split())
        return {key: value for key, equals, value in pairs if equals}

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def wait_until(self, condition: Callable[[], bool], job: Job, what: str, seconds: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            log = job.log.read_text() if job.log.exists() else "(no log)"
            assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}; job {self.show(job.id)}\n{log}"
            time.sleep(0.2)

    def wait_for_end(self, job: Job, seconds: float = PATIENCE_S) -> str:
        """Final state of the job."""
        self.wait_until(lambda: self.state(job.id) in DONE, job, "the end of the job", seconds)
        return self.state(job.id)

    def wait_for_steps(self, job: Job, metrics: Path, steps: int) -> None:
        self.wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= steps, job, f"{steps} steps in {metrics}")

    def crash(self, node: str) -> None:
        """Power off: every process of the node dies; the controller is told, instead of finding out half a minute later."""
        subprocess.run([str(self.testbed), "crash", node], env=self.environment, check=True)
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def boot(self, node: str) -> None:
        subprocess.run([str(self.testbed), "boot", node], env=self.environment, check=True)
        self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
