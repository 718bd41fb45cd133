"""How a run begins in a folder that is not empty: what it refuses, what it says, and what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nha_megatron.lock import Lock
from tests.distributed import RankPool
from tests.training import small_run

SHORT = {"steps": 2, "global_batch_size": 1}


def pretrain_and_listen(plain: dict[str, Any]) -> tuple[str | None, list[str]]:
    """Program: the whole job; the message it ended with, and what it said before its first step."""
    said: list[str] = []
    with mock.patch("nha_megatron.training.run.print_line", said.append):
        return small_run.pretrain_on_rank(plain), said


@pytest.fixture
def plain(tmp_path: Path, ranks: RankPool) -> dict[str, Any]:
    """A run of two steps that has saved both."""
    small_run.write_corpus(tmp_path)
    plain = small_run.settings(tmp_path, training=SHORT, checkpoint={"every": 1}, optimizer={"warmup_steps": 0})
    assert ranks.run(1, pretrain_and_listen, plain=plain)[0][0] is None
    return plain


def test_checkpoints_that_do_not_load_are_a_refusal(plain: dict[str, Any], tmp_path: Path, ranks: RankPool) -> None:
    run, longer = tmp_path / "run", {**plain, "training": {**plain["training"], "steps": 3}}
    for step in ("step_1", "step_2"):
        (run / "checkpoints" / step / "manifest.json").write_text("{}")
    before = (run / "metrics.jsonl").read_bytes()
    message, _ = ranks.run(1, pretrain_and_listen, plain=longer)[0]
    assert message is not None and "holds 2 checkpoints, and none can be loaded" in message and "checkpoint.resume=fresh" in message
    assert (run / "metrics.jsonl").read_bytes() == before
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_1", "step_2"]

    fresh = {**longer, "checkpoint": {"every": 1, "resume": "fresh"}}
    assert ranks.run(1, pretrain_and_listen, plain=fresh)[0][0] is None
    assert [record["step"] for record in small_run.metrics(tmp_path)] == [1, 2, 3]
    assert (run / "metrics.jsonl.set_aside").read_bytes() == before
    assert {"step_1.set_aside", "step_2.set_aside", "step_2", "step_3"} <= {path.name for path in (run / "checkpoints").iterdir()}
    # Insisting once more loses nothing: the run has checkpoints that load.
    again = {**fresh, "training": {**plain["training"], "steps": 4}}
    assert ranks.run(1, pretrain_and_listen, plain=again)[0][0] is None
    assert [record["step"] for record in small_run.metrics(tmp_path)] == [1, 2, 3, 4]


def test_links_that_lead_nowhere_and_a_latest_without_checkpoints_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    small_run.write_corpus(tmp_path)
    root = tmp_path / "run" / "checkpoints"
    root.mkdir(parents=True)
    (root / "step_7").symlink_to(tmp_path / "not mounted")
    plain = small_run.settings(tmp_path, training=SHORT)
    message, _ = ranks.run(1, pretrain_and_listen, plain=plain)[0]
    assert message is not None and "none can be loaded" in message
    (root / "step_7").unlink()
    (root / "latest").write_text("step_7\n")
    message, _ = ranks.run(1, pretrain_and_listen, plain=plain)[0]
    assert message is not None and "has a file `latest`, but no checkpoint" in message


def test_a_second_run_in_a_folder_is_refused_while_the_first_lives(plain: dict[str, Any], tmp_path: Path, ranks: RankPool) -> None:
    longer = {**plain, "training": {**plain["training"], "steps": 3}}
    path = tmp_path / "run" / ".lock"
    with Lock(path, "a test"):
        message, _ = ranks.run(1, pretrain_and_listen, plain=longer)[0]
        owner = json.loads(path.read_text())
    assert message is not None and f"another run writes into this folder (process {owner['pid']} on {owner['host']}" in message
    path.write_text(json.dumps({**owner, "start": owner["start"] - 1}))  # left by a process that was killed
    assert ranks.run(1, pretrain_and_listen, plain=longer)[0][0] is None
    assert not path.exists()


def test_every_changed_value_is_said_on_resume(plain: dict[str, Any], ranks: RankPool) -> None:
    changed = {
        **plain,
        "training": {**plain["training"], "steps": 3},
        "optimizer": {**plain["optimizer"], "lr": 5e-3, "schedule": "constant"},
    }
    message, said = ranks.run(1, pretrain_and_listen, plain=changed)[0]
    assert message is None
    assert [line for line in said if line.startswith("changed since")] == [
        "changed since: training.steps was 2, is 3",
        "changed since: optimizer.lr was 0.01, is 0.005",
        "changed since: optimizer.schedule was 'cosine', is 'constant'",
    ]


def test_repetition_is_said_at_the_start(ranks: RankPool, tmp_path: Path) -> None:
    small_run.write_corpus(tmp_path)
    train = str(tmp_path / "train")
    sections: dict[str, dict[str, Any]] = {
        "training": {**SHORT, "validate_every": 2, "validate_batches": 80},
        "data": {"validation": train},
    }
    sections["optimizer"] = {"warmup_steps": 0}
    message, said = ranks.run(1, pretrain_and_listen, plain=small_run.settings(tmp_path, **sections))[0]
    assert message is None
    assert any(line.startswith(f"data: {train}: 1,603 tokens at hand, 64 read by the run") for line in said)
    warnings = [line for line in said if line.startswith("warning: ")]
    assert any("holds the same tokens as" in line for line in warnings) and any("every validation reads" in line for line in warnings)
    assert any("the learning rate of step 2, the last of its schedule, is 0" in line for line in warnings)


def test_chosen_steps_are_traced(ranks: RankPool, tmp_path: Path) -> None:
    small_run.write_corpus(tmp_path)
    plain = small_run.settings(tmp_path, training=SHORT, profiler={"start": 2, "steps": 5, "ranks": [0]})
    assert ranks.run(1, pretrain_and_listen, plain=plain)[0][0] is None
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "rank_0_steps_2_to_2.json.gz" and trace.stat().st_size > 1000
