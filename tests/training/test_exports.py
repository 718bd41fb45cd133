"""Exports beside training: one at a time, failures are said, and nothing of them ends a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nha_megatron.config import ConfigError
from nha_megatron.training.exports import BackgroundExport
from tests.distributed import RankPool
from tests.training import small_run


def exporter(tmp_path: Path, program: str, said: list[str]) -> BackgroundExport:
    checkpoint = {"every": 2, "export_every": 4}
    exports = BackgroundExport(small_run.config(tmp_path, checkpoint=checkpoint, training={"steps": 9}), said.append)
    exports.command = lambda checkpoint, out: [sys.executable, "-S", "-c", program, str(out)]  # type: ignore[method-assign]
    return exports


def test_what_is_due_is_exported_and_the_end_of_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    exports = exporter(tmp_path, "import os, sys; os.mkdir(sys.argv[1])", said)
    for step in (2, 4, 6):
        exports.saved(tmp_path / f"step_{step}", step)
    exports.finish()
    exports.saved(tmp_path / "step_9", 9)
    exports.finish()
    folder = tmp_path / "run" / "exported"
    assert sorted(path.name for path in folder.iterdir()) == ["step_4", "step_9"]
    assert said == [f"exported {folder / name}" for name in ("step_4", "step_9")]


def test_a_failure_is_said_with_its_log(tmp_path: Path) -> None:
    said: list[str] = []
    exports = exporter(tmp_path, "raise SystemExit('no room')", said)
    exports.saved(tmp_path / "step_4", 4)
    exports.finish()
    log = tmp_path / "run" / "exported" / "step_4.log"
    assert said == [f"warning: {log.with_suffix('')} could not be exported, status 1: see {log}"] and "no room" in log.read_text()


def test_a_run_that_ends_early_waits_for_no_export(tmp_path: Path) -> None:
    said: list[str] = []
    exports = exporter(tmp_path, "import time; time.sleep(60)", said)
    exports.saved(tmp_path / "step_4", 4)
    exports.close()
    assert len(said) == 1 and "the run ends before" in said[0]


def test_exports_are_made_from_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.export_every 5 is not a multiple of checkpoint\.every 2"):
        small_run.config(tmp_path, checkpoint={"every": 2, "export_every": 5})


@pytest.mark.slow
def test_a_run_leaves_a_model_directory(ranks: RankPool, tmp_path: Path) -> None:
    small_run.write_corpus(tmp_path)
    plain = small_run.settings(tmp_path, training={"steps": 2}, checkpoint={"every": 2, "export_every": 2})
    assert ranks.run(1, small_run.pretrain_on_rank, plain=plain) == [None]
    assert {path.name for path in (tmp_path / "run" / "exported" / "step_2").iterdir()} >= {"config.json", "model.safetensors"}
