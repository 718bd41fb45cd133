"""Folders appear and vanish in one step; the newest complete checkpoint is never deleted."""

from pathlib import Path

import pytest

from nha_megatron.checkpoint import CheckpointError, resolve
from nha_megatron.checkpoint.files import (
    make_partial,
    partial_directory,
    prepare_root,
    publish,
    published_steps,
    retain,
    step_directory,
    write_latest,
)


def make(root: Path, *steps: int, manifest: bool = True) -> None:
    for step in steps:
        step_directory(root, step).mkdir(parents=True)
        if manifest:
            (step_directory(root, step) / "manifest.json").write_text("{}")


def test_steps_are_numbers_not_names(tmp_path: Path) -> None:
    make(tmp_path, 1000, 90, 200)
    (tmp_path / "step_7").write_text("a file")
    (tmp_path / "step_8_copy").mkdir()
    assert published_steps(tmp_path) == [90, 200, 1000]
    assert published_steps(tmp_path / "absent") == []


@pytest.mark.parametrize(("keep", "left"), [(1, [40]), (2, [30, 40]), (9, [10, 20, 30, 40])])
def test_retention_keeps_the_newest(tmp_path: Path, keep: int, left: list[int]) -> None:
    make(tmp_path, 10, 20, 30, 40)
    retain(tmp_path, keep, step=40)
    assert published_steps(tmp_path) == left


def test_a_broken_newer_folder_does_not_push_out_the_newest_complete_one(tmp_path: Path) -> None:
    make(tmp_path, 10, 20)
    make(tmp_path, 30, manifest=False)
    retain(tmp_path, 1, step=20)
    assert published_steps(tmp_path) == [20, 30]


def test_a_damaged_later_checkpoint_does_not_push_out_the_one_just_saved(tmp_path: Path) -> None:
    make(tmp_path, 300, 330, 347)  # 347 failed its checksum, so the run went on from 300 and has saved 330
    retain(tmp_path, 1, step=330)
    assert published_steps(tmp_path) == [330, 347]


def test_leftovers_of_a_crash_are_removed_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, 10)
    make_partial(partial_directory(tmp_path, 20))
    (tmp_path / ".step_5.replaced").mkdir()
    (tmp_path / "notes").mkdir()
    prepare_root(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["notes", "step_10"]


def test_publishing_replaces_a_folder_of_that_name(tmp_path: Path) -> None:
    make(tmp_path, 10)
    partial = partial_directory(tmp_path, 10)
    make_partial(partial)
    (partial / "new").write_text("content")
    publish(partial, step_directory(tmp_path, 10))
    assert [entry.name for entry in step_directory(tmp_path, 10).iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_10"]


def test_latest_names_the_folder(tmp_path: Path) -> None:
    write_latest(tmp_path, 10)
    write_latest(tmp_path, 20)
    assert (tmp_path / "latest").read_text() == "step_20\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["latest"]


def test_a_path_may_name_the_checkpoint_its_folder_or_its_run(tmp_path: Path) -> None:
    make(tmp_path / "checkpoints", 10, 20)
    make(tmp_path / "checkpoints", 30, manifest=False)
    newest = tmp_path / "checkpoints" / "step_20"
    assert resolve(tmp_path) == resolve(tmp_path / "checkpoints") == resolve(newest) == newest
    assert resolve(tmp_path / "checkpoints" / "step_10").name == "step_10"


def test_a_wrong_path_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        resolve(tmp_path)


def test_a_link_is_removed_without_what_it_leads_to(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    make(elsewhere, 10)
    make(root, 20, 30)
    step_directory(root, 10).symlink_to(step_directory(elsewhere, 10))
    partial_directory(root, 5).symlink_to(elsewhere)  # left by a version that could not remove it
    assert not prepare_root(root)
    retain(root, 2, step=30)
    assert sorted(entry.name for entry in root.iterdir()) == ["step_20", "step_30"]
    assert published_steps(elsewhere) == [10]


def test_what_cannot_be_removed_is_said_and_blocks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 10, 20)
    make_partial(partial_directory(tmp_path, 30))

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    for _ in range(2):  # this start, and the next
        assert "could not be removed" in prepare_root(tmp_path)[0]
    assert "could not be removed" in retain(tmp_path, 1, step=20)[0]
    for content in ("first", "second"):  # a step that is saved, and saved again
        partial = partial_directory(tmp_path, 30)
        make_partial(partial)
        (partial / content).touch()
        publish(partial, step_directory(tmp_path, 30))
    assert published_steps(tmp_path) == [20, 30] and [entry.name for entry in step_directory(tmp_path, 30).iterdir()] == ["second"]
    assert len(prepare_root(tmp_path)) == 3
