"""What launchers leave in the environment: numbers that are none, variables that are missing, limits too low. One message each."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml

from nha_megatron.cli.main import main
from tests.training import small_run

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NHA_EXIT_NOTE")
HERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}

REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "rank alone": ({"RANK": "0"}, "RANK is set, but WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"),
    "no address": ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK is set, but MASTER_ADDR, MASTER_PORT not"),
    "empty address": ({"RANK": "0", "WORLD_SIZE": "1", **HERE, "MASTER_ADDR": ""}, "RANK is set, but MASTER_ADDR not"),
    "empty world": ({"WORLD_SIZE": ""}, "WORLD_SIZE is '', must be a whole number from 1"),
    "no world": ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', must be a whole number from 1"),
    "world without rank": ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but RANK is not set"),
    "local rank": ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', must be a whole number from 0"),
    "negative local rank": ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
    "rank no number": ({"RANK": "x", "WORLD_SIZE": "1", **HERE}, "RANK is 'x'"),
    "rank beyond": ({"RANK": "3", "WORLD_SIZE": "1", **HERE}, "RANK is 3 and WORLD_SIZE 1: ranks are counted from 0 to 0"),
    "port": ({"RANK": "0", "WORLD_SIZE": "1", **HERE, "MASTER_PORT": "zz"}, "MASTER_PORT is 'zz', must be a whole number from 0 to 65535"),
    "name": ({"RANK": "0", "WORLD_SIZE": "1", **HERE, "MASTER_ADDR": "no..host"}, "MASTER_ADDR 'no..host' does not resolve"),
}


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("time.sleep", lambda _: None)
    small_run.write_corpus(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small_run.settings(tmp_path)))
    return str(tmp_path / "run.yaml")


@pytest.mark.parametrize("command", ["pretrain", "health"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_launcher_that_says_half_of_it(
    case: str, command: str, run_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment, message = REFUSED[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main([command, run_file]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("error:") == 1 and "Traceback" not in said
    assert not (Path(run_file).parent / "run" / "checkpoints").exists()


@pytest.mark.parametrize("command", ["pretrain", "health"])
def test_too_few_open_files(command: str, run_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    assert main([command, run_file]) == 2
    assert "may open 64 files, a rank needs at least 256: raise the limit (ulimit -n 4096" in capsys.readouterr().err


def test_the_limit_of_open_files_is_raised_to_what_is_allowed(run_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: set_to.append(limits))
    assert main(["pretrain", run_file, "data.path=nowhere"]) == 2
    assert set_to == [(4096, 4096)]


def refuse_below(folder: Path, read: Callable[[object], object], path: object = ".") -> object:
    if str(path).startswith(str(folder)):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return read(path)


@pytest.mark.parametrize("command", [["verify"], ["export"]])
def test_a_folder_that_cannot_be_read(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)

    # Root may read everything: a mode of 000 would prove nothing.
    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, partial(refuse_below, tmp_path / "run", getattr(os, name)))
    assert main([*command, str(tmp_path / "run"), *([str(tmp_path / "out")] if command == ["export"] else [])]) == 2
    said = capsys.readouterr().err
    assert f"checkpoint {tmp_path / 'run'} cannot be read: Permission denied: " in said and said.count("error:") == 1


@pytest.mark.parametrize("name", ["x" * 300, "circle/a", "file/a"])
def test_paths_that_no_file_can_have(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "file").touch()
    for command in (["verify"], ["export"], ["generate", "--prompt", "a"]):
        assert main([*command, str(tmp_path / name), *([str(tmp_path / "out")] if command == ["export"] else [])]) == 2, command
        said = capsys.readouterr().err
        assert said.count("error:") == 1 and "Traceback" not in said


def test_ctrl_c_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nha_megatron.checkpoint.VerifyReport", interrupt)
    assert main(["verify", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted\n"
