"""A checkpoint that cannot be written is one message on every rank, and leaves the ones before as they were."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nha_megatron.checkpoint import CheckpointError, CheckpointSaver, Progress, verify
from nha_megatron.checkpoint import saver as saver_module
from nha_megatron.checkpoint import shards as shards_module
from nha_megatron.config import CheckpointConfig
from tests.checkpoint.programs import (
    pretrain_on_a_slow_disk,
    pretrain_with_a_failing_call,
    pretrain_with_a_file_limit,
    save_half_a_tensor,
    save_with_a_fault_of_the_program,
)
from tests.distributed import RankPool
from tests.training import small_run

LIMIT = 30_000  # bytes; a rank's part of the small run's checkpoint has 250,000


def settings(folder: Path, **checkpoint: Any) -> dict[str, Any]:
    return small_run.settings(folder, training={"steps": 6}, checkpoint={"every": 2, "keep": 9, **checkpoint}, parallel={"tensor": 2})


def checkpoints(folder: Path) -> list[str]:
    return sorted(entry.name for entry in (folder / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("rank", "asynchronous"),
    [
        pytest.param(0, False, id="rank0-waiting"),
        pytest.param(1, True, id="rank1-background"),
        pytest.param(0, True, id="rank0-background", marks=pytest.mark.slow),
        pytest.param(1, False, id="rank1-waiting", marks=pytest.mark.slow),
        pytest.param(None, False, id="all-waiting", marks=pytest.mark.slow),
        pytest.param(None, True, id="all-background", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_at_the_end_of_the_run(ranks: RankPool, folder: Path, rank: int | None, asynchronous: bool) -> None:
    """The run of `folder` goes on from step 4; its last checkpoint is the one that fails."""
    plain = settings(folder, asynchronous=asynchronous)
    for message, said in ranks.run(2, pretrain_with_a_file_limit, plain=plain, limit=LIMIT, rank=rank):
        assert said == [] and message is not None
        assert "step_6 could not be written" in message and "File too large" in message and "checkpoints before are untouched" in message
        assert [f"rank {r}: " in message for r in (0, 1)] == [rank in (r, None) for r in (0, 1)], message
    assert verify(folder / "run" / "checkpoints" / "step_4").step == 4
    assert checkpoints(folder) == ["latest", "step_2", "step_4"]
    assert (folder / "run" / "checkpoints" / "latest").read_text() == "step_4\n"
    # With room again, the same command goes on from there.
    assert ranks.run(2, small_run.pretrain_on_rank, plain=plain) == [None, None]
    assert verify(folder / "run" / "checkpoints" / "step_6").step == 6


@pytest.fixture
def new(tmp_path: Path) -> Path:
    small_run.write_corpus(tmp_path)
    return tmp_path


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.slow), True], ids=["waiting", "background"])
def test_training_goes_on_and_the_next_checkpoint_is_written(ranks: RankPool, new: Path, asynchronous: bool) -> None:
    plain = settings(new, asynchronous=asynchronous)
    for message, said in ranks.run(2, pretrain_with_a_file_limit, plain=plain, limit=LIMIT, rank=0, lifted_after=1):
        assert message is None
        warning, *saved = said
        assert "step_2 could not be written" in warning and "rank 0: File too large" in warning and "failure 1 of 3 in a row" in warning
        assert [line.split(":")[0] for line in saved] == ["step 4", "step 6"]
    assert checkpoints(new) == ["latest", "step_4", "step_6"]
    assert len(small_run.losses(new)) == 6


@pytest.mark.slow
def test_too_many_failures_in_a_row_end_the_run(ranks: RankPool, new: Path) -> None:
    for message, said in ranks.run(2, pretrain_with_a_file_limit, plain=settings(new, attempts=2), limit=LIMIT, rank=0):
        assert message is not None and "step_4 could not be written" in message
        assert len(said) == 1 and "step_2 could not be written" in said[0]
    assert checkpoints(new) == []


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("write.make_partial", marks=pytest.mark.slow),
        pytest.param("shards.save_config", marks=pytest.mark.slow),
        "write.write_manifest",
        pytest.param("write.publish", marks=pytest.mark.slow),
        pytest.param("write.write_latest", marks=pytest.mark.slow),
        pytest.param("write.retain", marks=pytest.mark.slow),
    ],
)
def test_a_failure_of_rank_0_alone_reaches_all(ranks: RankPool, new: Path, where: str) -> None:
    for message, said in ranks.run(2, pretrain_with_a_failing_call, plain=settings(new), where=where):
        assert message is None
        is_saved = where in ("write.write_latest", "write.retain")
        assert ("step_4 is saved, but" if is_saved else "step_4 could not be written") in said[1]
        assert "No space left on device" in said[1] and said[1].startswith("warning: ")
    assert checkpoints(new) == ["latest", "step_2", *["step_4"] * is_saved, "step_6"]
    for step in (2, 6):
        verify(new / "run" / "checkpoints" / f"step_{step}")


def test_shards_that_do_not_make_a_whole_are_not_taken_for_a_failing_disk(ranks: RankPool, tmp_path: Path) -> None:
    """Training must not go on: with megatron-core 0.16.1 rank 0 alone knows of it, and the others wait in a collective."""
    assert ranks.run(1, save_half_a_tensor, root=str(tmp_path)) == ["CheckpointingException"]


def test_after_a_fault_of_the_program_no_rank_waits_and_no_folder_is_left(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, save_with_a_fault_of_the_program, root=str(tmp_path)) == ["ZeroDivisionError", "CheckpointError"]
    assert list(tmp_path.iterdir()) == []


class UnwritablePendingSave:
    """Every checkpoint is written in no time, and fails when it is to be published."""

    started = 0.0

    def __init__(self, root: Path, engine: Any, progress: Progress, *_: Any) -> None:
        self.progress = progress

    def advance(self) -> tuple[bool, int, int]:
        return True, 1, 1

    def finish(self, keep: int) -> Path:
        raise CheckpointError(f"step {self.progress.step} failed")


def test_the_last_checkpoint_is_tried_though_the_one_before_failed_too_often(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(saver_module, "PendingSave", UnwritablePendingSave)
    said: list[str] = []
    engine: Any = None
    saver = CheckpointSaver(tmp_path, engine, {}, CheckpointConfig(asynchronous=True, attempts=1), said.append)
    saver.save(Progress(1, 64))
    with pytest.raises(CheckpointError, match="step 2 failed"):
        saver.save(Progress(2, 128), last=True)
    assert said == ["warning: step 1 failed"]


def test_a_large_write_is_made_durable_and_counted_slice_by_slice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise the stall watch would take a long fsync at the end for a hung run."""
    monkeypatch.setattr(shards_module, "_SYNC_BYTES", 4)
    counts: list[int] = []
    monkeypatch.setattr(os, "fdatasync", lambda _: counts.append(stream.count))
    with (tmp_path / "file").open("wb", buffering=0) as file:
        stream = shards_module._Stream(file)
        for part in (b"ab", b"cdefghij", b"k"):
            stream.write(part)
    assert counts == [2, 4] and stream.count == 11  # before the bytes that the sync is for: 4 and 8 lie in the file then
    assert (tmp_path / "file").read_bytes() == b"abcdefghijk"


def test_numbers_that_fail_are_told_though_the_disk_fails_too(ranks: RankPool, new: Path) -> None:
    """Step 2 gives the run up while the checkpoint of step 1 is being written, to a full disk."""
    plain = settings(new, every=1, asynchronous=True, attempts=1)
    plain |= {"optimizer": {"lr": 1e30, "warmup_steps": 0, "clip_grad": 0.0}, "guards": {"skip_limit": 0}}
    for message, _ in ranks.run(2, pretrain_with_a_file_limit, plain=plain, limit=LIMIT, rank=0):
        assert message is not None and "of step 2 is" in message and "guards.skip_limit is 0" in message


@pytest.mark.slow
def test_a_slow_disk_is_said_and_not_taken_for_a_hung_run(ranks: RankPool, new: Path) -> None:
    # Some 90 items of 0.06 s: longer than the stall watch allows a run to stand still.
    plain = settings(new) | {"training": {**settings(new)["training"], "steps": 2, "stall_seconds": 4}}
    for message, said in ranks.run(2, pretrain_on_a_slow_disk, plain=plain, seconds_per_item=0.06):
        assert message is None
        assert said[0].startswith("step 2: waiting for the checkpoint, 0.00 of 0.00 GiB") and "checkpoint.every" in said[0]
        assert said[-1].startswith("step 2: saved ")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own: its 1.9 MB hold two of the small run's checkpoints, not three."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1900k", "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full(ranks: RankPool, new: Path, small_disk: Path) -> None:
    plain = settings(new, path=str(small_disk / "checkpoints"))
    for message in ranks.run(2, small_run.pretrain_on_rank, plain=plain):
        assert (
            message is not None and "step_6 could not be written (0.0 GiB free there)" in message and "No space left on device" in message
        )
    assert sorted(entry.name for entry in (small_disk / "checkpoints").iterdir()) == ["latest", "step_2", "step_4"]
    plain["checkpoint"]["keep"] = 1  # takes effect after the next save, for which there is room once a checkpoint is gone
    subprocess.run(["rm", "-r", str(small_disk / "checkpoints" / "step_2")], check=True)
    assert ranks.run(2, small_run.pretrain_on_rank, plain=plain) == [None, None]
    assert verify(small_disk / "checkpoints" / "step_6").step == 6


def test_a_disk_that_became_read_only(ranks: RankPool, new: Path, small_disk: Path) -> None:
    plain = settings(new, path=str(small_disk / "checkpoints"))
    plain["training"]["steps"] = 2
    assert ranks.run(2, small_run.pretrain_on_rank, plain=plain) == [None, None]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    plain["training"]["steps"] = 4
    for message in ranks.run(2, small_run.pretrain_on_rank, plain=plain):
        assert message is not None and "Read-only file system" in message and str(small_disk) in message
    assert len(small_run.losses(new)) == 2  # said before training, not after hours of it
    verify(small_disk / "checkpoints" / "step_2")
