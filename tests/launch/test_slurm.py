"""A real cluster: submit, run on two nodes, survive what clusters do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed import RankPool
from tests.launch.slurm_cluster import ROOT, Job, SlurmCluster
from tests.optional import needs_deepspeed
from tests.training import small_run

STEPS = 24
TIME = ("--time", "0:20:00")
TWO_NODES = ("--nodes", "2", *TIME)


def write_run(folder: Path, **sections: dict[str, Any]) -> Path:
    """A corpus and run.yaml for two context-parallel ranks; returns the path of its metrics."""
    small_run.write_corpus(folder)
    sections = {"parallel": {"context": 2}, "checkpoint": {"every": 1000}, "training": {"steps": STEPS}, **sections}
    (folder / "run.yaml").write_text(yaml.safe_dump(small_run.settings(folder, **sections)))
    return folder / "run" / "metrics.jsonl"


def uninterrupted(ranks: RankPool, folder: Path) -> list[float]:
    """Losses of the same run on two ranks that nobody disturbs."""
    plain = yaml.safe_load((folder / "run.yaml").read_text())
    plain["logging"]["directory"] = str(folder / "reference")
    assert ranks.run(2, small_run.pretrain_on_rank, plain=plain) == [None, None]
    return small_run.losses(folder, "reference")


def log_of(job: Job) -> str:
    return job.log.read_text()


def restarts(cluster: SlurmCluster, job: Job) -> int:
    return int(cluster.show(job.id)["Restarts"])


def test_warned_saved_requeued_and_finished_with_the_curve_of_an_undisturbed_run(
    cluster: SlurmCluster, ranks: RankPool, tmp_path: Path
) -> None:
    metrics = write_run(tmp_path)
    job = cluster.submit(tmp_path, *TWO_NODES, "--no-health")
    cluster.wait_for_steps(job, metrics, 1)
    cluster.run("scancel", "--signal=USR1", "--batch", job.id)  # what the time limit and preemption send
    cluster.wait_until(lambda: restarts(cluster, job) == 1, job, "the requeue")
    saved = json.loads(metrics.read_text().splitlines()[-1])["step"]
    expected = uninterrupted(ranks, tmp_path)  # while the job waits for its turn
    assert cluster.wait_for_end(job) == "COMPLETED", log_of(job)

    said = log_of(job)
    assert saved < STEPS, "the warning came too late to test anything"
    assert f"stopped by SIGUSR1 after step {saved}, which is saved" in said
    assert "saved; asking SLURM to requeue" in said and "not requeued" not in said
    assert f"resumed from {tmp_path}/run/checkpoints/step_{saved}" in said
    assert small_run.losses(tmp_path) == expected  # same layout, same machine: bit for bit
    assert (job.log.parent / "outcome").read_text() == f"complete {job.id}\n"


@pytest.mark.slow
def test_health_check_then_training_by_the_frozen_code(cluster: SlurmCluster, tmp_path: Path) -> None:
    metrics = write_run(tmp_path, training={"steps": 2})
    job = cluster.submit(tmp_path, *TWO_NODES)
    assert cluster.wait_for_end(job) == "COMPLETED", log_of(job)
    said = log_of(job)
    for node in ("n1", "n2"):
        assert re.search(rf"^{node} +\d +cpu .* (ok|slow)$", said, re.MULTILINE), said
    assert "all-reduce over 2 ranks: right" in said
    assert len(metrics.read_text().splitlines()) == 2
    code = job.log.parent / "code"
    assert f"code {code}" in said and (code / "REVISION").read_text().strip()


@pytest.mark.slow
def test_a_path_of_characters_that_slurm_means_something_by(cluster: SlurmCluster, tmp_path: Path) -> None:
    folder = tmp_path / "it's_100%_%j_#1"
    folder.mkdir()
    metrics = write_run(folder, training={"steps": 2}, parallel={})
    job = cluster.submit(folder, "--nodes", "1", *TIME, "--no-health")
    (submission,) = (folder / "run" / "submissions").iterdir()
    job.log = submission / f"job-{job.id}.log"  # what was said is quoted for a shell
    assert cluster.wait_for_end(job) == "COMPLETED"
    assert "complete" in log_of(job) and len(metrics.read_text().splitlines()) == 2


@pytest.mark.slow
def test_the_batch_script_without_the_submit_helper(cluster: SlurmCluster, tmp_path: Path) -> None:
    metrics = write_run(tmp_path, training={"steps": 2})
    job = cluster.batch(tmp_path, "--nodes=2", "--time=20", "launch/slurm/train.sbatch", str(tmp_path / "run.yaml"))
    assert cluster.wait_for_end(job) == "COMPLETED", log_of(job)
    assert f"torchrun, code {ROOT}" in log_of(job) and "all-reduce over 4 ranks: right" in log_of(job)  # one per GPU
    assert len(metrics.read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_stop_by_the_user_saves_and_is_not_requeued(cluster: SlurmCluster, tmp_path: Path) -> None:
    metrics = write_run(tmp_path, training={"steps": 100000}, optimizer={"schedule": "constant"})
    job = cluster.submit(tmp_path, *TWO_NODES, "--no-health")
    cluster.wait_for_steps(job, metrics, 2)
    cluster.run("scancel", "--signal=TERM", "--batch", job.id)
    assert cluster.wait_for_end(job) == "FAILED"  # SLURM's word for any status but 0
    assert cluster.show(job.id)["ExitCode"] == "75:0" and restarts(cluster, job) == 0
    assert (job.log.parent / "outcome").read_text() == f"stopped {job.id}\n"
    saved = len(metrics.read_text().splitlines())
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step_{saved}\n"


@pytest.mark.slow
def test_cancel(cluster: SlurmCluster, tmp_path: Path) -> None:
    metrics = write_run(tmp_path, training={"steps": 100000}, optimizer={"schedule": "constant"}, checkpoint={"every": 2})
    job = cluster.submit(tmp_path, *TWO_NODES, "--no-health")
    cluster.wait_for_steps(job, metrics, 3)
    cluster.run("scancel", job.id)
    assert cluster.wait_for_end(job) == "CANCELLED"
    assert small_run.weights(tmp_path)  # what it leaves can be loaded


@pytest.mark.slow
def test_a_killed_node_costs_the_steps_since_the_checkpoint(cluster: SlurmCluster, ranks: RankPool, tmp_path: Path) -> None:
    metrics = write_run(tmp_path, checkpoint={"every": 5})
    job = cluster.submit(tmp_path, *TWO_NODES, "--no-health")
    cluster.wait_for_steps(job, metrics, 7)
    node = cluster.show(job.id)["NodeList"].replace("n[", "n").split("-")[0].split(",")[0]
    cluster.crash(node)
    try:
        cluster.wait_until(lambda: restarts(cluster, job) == 1, job, "the requeue")
        expected = uninterrupted(ranks, tmp_path)
        assert cluster.wait_for_end(job) == "COMPLETED", log_of(job)
    finally:
        cluster.boot(node)
    assert node not in re.findall(r"n\d", cluster.show(job.id)["NodeList"])
    assert f"resumed from {tmp_path}/run/checkpoints/step_" in log_of(job)
    assert small_run.losses(tmp_path) == expected


@pytest.mark.slow
def test_a_chain_goes_on_where_requeue_is_not_allowed(cluster: SlurmCluster, tmp_path: Path) -> None:
    metrics = write_run(tmp_path)
    (tmp_path / "site.yaml").write_text("requeue: false\nexclusive: false\n")
    first = cluster.submit(tmp_path, *TWO_NODES, "--no-health", "--site", "site.yaml", "--chain", "3")
    ids = (first.log.parent / "jobs").read_text().split()
    cluster.wait_for_steps(first, metrics, 2)
    cluster.run("scancel", "--signal=USR1", "--batch", first.id)
    second, third = (Job(number, first.log.with_name(f"job-{number}.log"), "") for number in ids[1:])
    assert cluster.wait_for_end(first) == "FAILED" and cluster.show(first.id)["ExitCode"] == "75:0"
    assert [cluster.wait_for_end(second), cluster.wait_for_end(third)] == ["COMPLETED", "COMPLETED"]
    assert (first.log.parent / "outcome").read_text() == f"saved {ids[0]}\ncomplete {ids[1]}\n"
    assert f"nothing to do: job {ids[1]} left the run complete" in log_of(third)
    assert len(small_run.losses(tmp_path)) == STEPS


@pytest.mark.slow
@needs_deepspeed
def test_deepspeed_launcher_on_two_nodes(cluster: SlurmCluster, ranks: RankPool, tmp_path: Path) -> None:
    metrics = write_run(tmp_path)
    job = cluster.submit(tmp_path, *TWO_NODES, "--no-health", "--launcher", "deepspeed", DS_ACCELERATOR="cpu")
    cluster.wait_for_steps(job, metrics, 2)
    cluster.run("scancel", "--signal=USR1", "--batch", job.id)
    assert cluster.wait_for_end(job) == "COMPLETED", log_of(job)
    assert restarts(cluster, job) == 1
    assert small_run.losses(tmp_path) == uninterrupted(ranks, tmp_path)
