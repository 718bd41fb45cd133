"""The command `nha-megatron`: what it has, its help and examples, and what it says to a name it does not know."""

import argparse
import shlex
import subprocess
import sys

import pytest

import nha_megatron
from nha_megatron.cli.main import COMMANDS, main

EXAMPLES = [(name, line) for name, command in COMMANDS.items() for line in command.EXAMPLE.splitlines()]


def loaded_by(statement: str) -> set[str]:
    """Modules of a fresh interpreter after the statement."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    for name in ("check", "pretrain", "health", "verify", "submit", "prepare", "train-tokenizer", "export", "generate", "example"):
        assert any(line.split()[:1] == [name] for line in lines), name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"nha-megatron {nha_megatron.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith(f"usage: nha-megatron {name} ")
    assert f"\nexample:\n  {COMMANDS[name].EXAMPLE.splitlines()[0]}\n" in text


@pytest.mark.parametrize(("name", "line"), EXAMPLES, ids=[f"{name}-{index}" for index, (name, _) in enumerate(EXAMPLES)])
def test_an_example_is_a_line_that_works(name: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(COMMANDS[name], "run", lambda arguments: seen.append(arguments) or 0)
    command, _, _ = line.partition(" > ")
    for start in ("nha-megatron ", "torchrun --nproc-per-node=8 -m nha_megatron "):
        if command.startswith(start):
            assert main(shlex.split(command.removeprefix(start))) == 0
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a command: "),
        (["chekc"], "unknown command 'chekc'; did you mean 'check'?"),
        (["tokenizer"], "unknown command 'tokenizer'; did you mean 'train-tokenizer'?"),
        (["xyz"], "unknown command 'xyz'; allowed: example, "),
        (["--quiet"], "unrecognized arguments: --quiet"),
        (["check", "run.yaml", "--steps=3"], "unknown option --steps=3; overrides are written section.key=value"),
        (["verify", "run", "--fast"], "unknown option --fast"),
        (["verify", "run", "other"], "'other' is one argument too many"),
    ],
)
def test_a_line_that_is_none(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and "usage: nha-megatron" in error


def test_help_and_refusals_wait_for_no_library() -> None:
    """The parser of every command is made from all of them: none loads what takes seconds."""
    assert not loaded_by("import nha_megatron.cli.main") & {"torch", "transformers", "tokenizers", "datasets", "pydantic"}


def test_the_public_names() -> None:
    assert "torch" not in loaded_by("import nha_megatron; nha_megatron.load_config")
    assert sorted(nha_megatron.__all__) == dir(nha_megatron)
    for name in nha_megatron.__all__:
        assert getattr(nha_megatron, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = nha_megatron.train
