"""A real SLURM cluster on this machine, and runs to submit to it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.slurm_cluster import SlurmCluster

ROOT = Path(__file__).resolve().parents[2]
TESTBED = ROOT / "tests" / "slurm_testbed.sh"
NODES = 3


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Nodes n1, n2, n3. Skips, with the reason, where SLURM cannot run; `NHA_TEST_REQUIRE=slurm` turns that into a failure."""
    folder = tmp_path_factory.mktemp("slurm")
    os.chmod(folder, 0o755)  # munged refuses a socket below a private folder
    for parent in folder.parents:
        if parent.stat().st_uid == os.getuid() and "pytest" in parent.name:
            os.chmod(parent, 0o755)
    environment = {**os.environ, "SLURM_TESTBED_DIR": str(folder / "testbed"), "SLURM_TESTBED_PORT": str(_free_ports(NODES + 1))}
    reason = _why_not(environment)
    if reason:
        if "slurm" in os.environ.get("NHA_TEST_REQUIRE", ""):
            pytest.fail(f"SLURM is required and cannot run here: {reason}")
        pytest.skip(f"no SLURM: {reason}")
    try:
        started = subprocess.run([str(TESTBED), "start", "-n", str(NODES), "-g", "2"], env=environment, capture_output=True, text=True)
        if started.returncode:
            pytest.fail(f"the SLURM testbed did not start: {started.stderr}")
        yield SlurmCluster(TESTBED, environment, folder / "testbed" / "slurm.conf")
    finally:
        subprocess.run([str(TESTBED), "stop"], env=environment, capture_output=True)


def _why_not(environment: dict[str, str]) -> str | None:
    if sys.platform != "linux" or os.getuid() != 0:
        return "its daemons need Linux and root"
    if not shutil.which("slurmctld", path="/usr/sbin:/sbin:" + os.environ["PATH"]) and not shutil.which("apt-get"):
        return "it is not installed, and there is no apt-get to install it"
    installed = subprocess.run([str(TESTBED), "install"], env=environment, capture_output=True, text=True)
    if installed.returncode:
        return f"tests/slurm_testbed.sh install: {installed.stderr.strip().splitlines()[-1:]}"
    if subprocess.run(["unshare", "--pid", "--mount", "--uts", "--fork", "true"], capture_output=True).returncode:
        return "this machine allows no namespaces (unshare)"
    return None


def _free_ports(count: int) -> int:
    """First of `count` consecutive ports that nothing listens on."""
    for first in range(16900 + os.getpid() % 1000, 20000, count):
        sockets = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.create_server(("", port)))
            return first
        except OSError:
            continue
        finally:
            for opened in sockets:
                opened.close()
    raise AssertionError("no free ports")
