"""`nha-megatron verify DIR`: one line a checkpoint, and an exit status."""

from __future__ import annotations

from pathlib import Path

import pytest

from nha_megatron.cli.main import main


def verify(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    status = main(["verify", str(path)])
    said = capsys.readouterr()
    return status, (said.out + said.err).splitlines()


def test_all_sound(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = verify(finished_run / "run", capsys)
    assert status == 0 and len(lines) == 3
    assert lines[0].startswith("sound      step_2: 256 tokens, 0.00 GiB in 5 files of 2 ranks")
    assert lines[1].startswith("sound      step_4: 512 tokens")
    assert lines[2] == "a run would continue from step_4"
    assert verify(finished_run / "run" / "checkpoints", capsys) == (status, lines)
    assert verify(finished_run / "run" / "checkpoints" / "step_2", capsys) == (0, lines[:1])


def test_the_folder_one_stands_in(finished_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished_run / "run" / "checkpoints" / "step_4")
    status, (line,) = verify(Path("."), capsys)
    assert status == 0 and line.startswith("sound      step_4: 512 tokens")


def test_a_damaged_one_is_named_and_the_one_before_is_taken(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = folder / "run" / "checkpoints"
    (checkpoints / "step_4" / "common.pt").unlink()
    (checkpoints / ".step_6.partial").mkdir()
    status, lines = verify(folder / "run", capsys)
    assert status == 1
    assert lines[1] == "damaged    step_4: common.pt is missing"
    assert lines[2].startswith("unfinished step_6: ") and lines[3] == "a run would continue from step_2"


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines = verify(tmp_path, capsys)
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: checkpoint ") and "is not a checkpoint" in lines[0]


@pytest.mark.parametrize("arguments", [["verify"], ["verify", "a", "b"], ["verify", "a", "--fast"]])
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2 and "usage: " in capsys.readouterr().err
