"""The start-up health check: who is named, and what one process really measures."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nha_megatron.cluster import health
from nha_megatron.cluster.health_report import RankReport, judge, table
from tests.launch.slurm_cluster import PATIENCE_S, ROOT, submit_environment
from tests.launch.test_torchrun import write_run
from tests.training import small_run

VERSIONS = {"torch": "2.13", "NCCL": "2.30"}


def sound(nodes: int = 4, per_node: int = 2) -> list[RankReport]:
    """A healthy cluster whose nodes differ by a few percent."""
    return [
        RankReport(rank, f"n{rank // per_node}", "H100", None, 700.0 + 7 * rank, 900.0, 40.0 - rank, 0.001 * rank, VERSIONS)
        for rank in range(nodes * per_node)
    ]


def test_a_sound_cluster() -> None:
    assert judge(sound()) == []
    lines = table(sound(), []).splitlines()
    assert len(lines) == 5 and all(line.endswith("ok") for line in lines[1:])
    assert lines[2].split() == ["n1", "2-3", "H100", "714", "900", "37", "+0.00", "ok"]


CASES = {
    "no device": ({"error": "training.device is 'cuda', but the host shows 0 CUDA devices"}, True, "shows 0 CUDA devices"),
    "another version": ({"versions": {**VERSIONS, "NCCL": "2.27"}}, True, "NCCL is 2.27, on most nodes 2.30"),
    "a slow device": ({"matmul_tflops": 300.0}, False, "matrix products at 300 TFLOP/s"),
    "a slow link": ({"network_gb_per_s": 3.0}, False, "network at 3 GB/s"),
    "a wrong clock": ({"clock_offset_s": -90.0}, False, "its clock is -90.0 s off"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_one_bad_node_is_named(case: str) -> None:
    changes, broken, text = CASES[case]
    reports = sound()
    reports[5] = replace(reports[5], **changes)  # type: ignore[arg-type]
    (finding,) = judge(reports)
    assert (finding.host, finding.rank, finding.broken) == ("n2", 5, broken) and text in str(finding)
    verdicts = [line.split()[-1] for line in table(reports, [finding]).splitlines()[1:]]
    assert verdicts == ["ok", "ok", "broken" if broken else "slow", "ok"]


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 8])
def test_partners_agree_and_everybody_has_one(nodes: int) -> None:
    for round_number in range(1 if nodes == 2 else 2):
        chosen = [health.partners(node, nodes)[round_number] for node in range(nodes)]
        assert all(partner < 0 or (chosen[partner] == node and partner != node) for node, partner in enumerate(chosen))
    assert all(max(health.partners(node, nodes)) >= 0 for node in range(nodes))


def test_a_slow_node_does_not_drag_its_partners_down() -> None:
    """Every partner of a node has another partner, when there are four nodes or more and their number is even."""
    for nodes in (4, 6, 8):
        for slow in range(nodes):
            best = [max(0.1 if slow in (node, partner) else 1.0 for partner in health.partners(node, nodes)) for node in range(nodes)]
            assert [node for node in range(nodes) if best[node] < 1.0] == [slow]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not dist.is_initialized()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_measures_itself(alone: None, tmp_path: Path) -> None:
    said: list[str] = []
    assert health.check_health(small_run.config(tmp_path), said.append)
    assert len(said) == 2 and said[0].splitlines()[1].split()[2] == "cpu"
    assert os.listdir(tmp_path / "run") == []  # nothing is left behind


def test_a_disk_that_cannot_be_written_stops_the_job(alone: None, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    said: list[str] = []
    assert not health.check_health(small_run.config(tmp_path), said.append)
    assert said[0].splitlines()[1].endswith("broken") and "broken: node" in said[1] and "run" in said[1]


def test_a_device_that_computes_wrongly_is_broken(alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, **options: ones(*size, **options) * 1.5)
    said: list[str] = []
    assert not health.check_health(small_run.config(tmp_path), said.append)
    assert "a matrix product came out wrong" in said[1]


def health_of_two_processes(folder: Path, device: str) -> subprocess.CompletedProcess[str]:
    write_run(folder, training={"device": device})
    environment = submit_environment(NPROC_PER_NODE="2", CUDA_VISIBLE_DEVICES="")
    command = [str(ROOT / "launch" / "torchrun.sh"), "health", "run.yaml"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


@pytest.mark.parametrize("device", ["cuda", pytest.param("cpu", marks=pytest.mark.slow)])
def test_two_processes_give_one_table_and_one_status(tmp_path: Path, device: str) -> None:
    small_run.write_corpus(tmp_path)
    done = health_of_two_processes(tmp_path, device)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("node") and lines[1].split()[1] == "0-1" and "Traceback" not in done.stderr
    if device == "cpu":
        verdict = lines[1].split()[-1]  # "slow" on a machine that is busy with something else
        assert done.returncode == 0 and verdict in ("ok", "slow") and lines[2].startswith("all-reduce over 2 ranks: right"), done.stdout
    else:  # no rank has the device that it wants
        assert done.returncode == 1 and lines[1].endswith("broken"), done.stdout
        assert [line.split(", rank ")[1][0] for line in lines[2:]] == ["0", "1"] and "shows 0 CUDA device" in lines[2]
