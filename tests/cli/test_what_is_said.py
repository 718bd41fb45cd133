"""What `check` and the overrides tell a user, and output that cannot show it."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nha_megatron.checkpoint import SaveError
from nha_megatron.cli.main import main
from nha_megatron.config import ConfigError, load_config, with_overrides
from nha_megatron.known_warnings import silence_known_warnings
from nha_megatron.training import hardware
from nha_megatron.training.console import Console
from tests.training import small_run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    small_run.write_corpus(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(small_run.settings(tmp_path)))
    return path


def checked(capsys: pytest.CaptureFixture[str], file: Path, *overrides: str) -> str:
    assert main(["check", str(file), *overrides]) == 0
    output = capsys.readouterr().out
    yaml.safe_load(output)
    return output


def test_check_prints_tokens_at_hand_and_warns_of_many_epochs(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = file.parent / "train"
    once = checked(capsys, file)
    assert f"{train}: 1,603 tokens at hand, 768 read by the run: 47.9%" in once and "teach little" not in once
    often = checked(capsys, file, "training.steps=1000", f"data.validation={train}", "training.validate_every=10")
    assert "128,000 read by the run: 79.9 times" in often and "teach little" in often
    assert "holds the same tokens as" in often
    # Two stages of one corpus, under another name, are counted together.
    stages = f"training.stages=[{{from_tokens: 3200, path: '{train}'}}]"
    assert "6,400 read by the run: 3.99 times" in checked(capsys, file, "training.steps=50", stages)


def test_check_names_an_update_that_changes_nothing(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "the learning rate of step 6, the last of its schedule, is 0" in checked(capsys, file)
    assert "changes nothing" not in checked(capsys, file, "optimizer.min_lr=1e-4")
    assert "changes nothing" not in checked(capsys, file, "optimizer.schedule=constant")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("runs/a #2", "runs/a #2"), ("#2", "#2"), ('"runs/a" ', "runs/a"), ("runs/a#2", "runs/a#2"), ("'a #2'", "a #2")],
)
def test_an_override_is_what_was_typed(file: Path, text: str, expected: str) -> None:
    assert load_config(file, [f"logging.directory={text}"]).logging.directory == expected


def test_a_comment_after_a_list_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="'# two' would be a comment"):
        load_config(file, ["optimizer.betas=[0.9, 0.95] # two"])
    with pytest.raises(ConfigError, match=r"given '5 # five', must be a whole number"):
        load_config(file, ["training.steps=5 # five"])


def test_paths_are_expanded_or_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("SCRATCH", "/scratch/x")
    monkeypatch.delenv("ABSENT", raising=False)
    config = load_config(file)
    for given, expected in (("~/x", "/home/somebody/x"), ("$SCRATCH/x", "/scratch/x/x"), ("${SCRATCH}y", "/scratch/xy"), ("./~", "./~")):
        changed = with_overrides(config, [f"logging.directory={given}", f"data.path={given}", f"checkpoint.path={given}"])
        assert {changed.logging.directory, changed.data.path, changed.checkpoint.path} == {expected}
    with pytest.raises(ConfigError, match="the environment has no variable ABSENT"):
        with_overrides(config, ["logging.directory=$ABSENT/x"])
    with pytest.raises(ConfigError, match="there is no user 'nobody-here'"):
        with_overrides(config, ["data.path=~nobody-here/x"])


@pytest.mark.parametrize(("text", "steps"), [("1e5", 100_000), ("1.0E+5", 100_000), ("2.5e1", 25)])
def test_a_whole_number_may_be_written_as_a_real_one(file: Path, text: str, steps: int) -> None:
    value = load_config(file, [f"training.steps={text}"]).training.steps
    assert type(value) is int and value == steps
    with pytest.raises(ConfigError, match=r"given 1\.5, must be a whole number"):
        load_config(file, ["training.steps=1.5"])
    assert load_config(file, ["optimizer.lr=1e0"]).optimizer.lr == 1.0


class Unencodable(io.TextIOWrapper):
    """A terminal in latin-1."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="latin-1")

    @property
    def shown(self) -> str:
        return self.buffer.getvalue().decode("latin-1")  # type: ignore[attr-defined]


def test_a_path_that_standard_output_cannot_print_ends_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Unencodable()
    Console(10, 1, stream).event("saved runs/日本")
    assert stream.shown == "saved runs/\\u65e5\\u672c\n"
    stream = Unencodable()
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["check", str(file), "data.path=data/日本"]) == 0
    stream.flush()
    assert "\\u65e5\\u672c" in stream.shown


def test_a_console_that_takes_nothing_ends_nothing() -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    console = Console(10, 1, Full())
    console.event("a line")
    console.close()


def test_lines_of_dependencies_that_say_nothing_are_not_shown() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        silence_known_warnings()
        warnings.warn("`load_state_dict` is deprecated and will be removed in future versions.", FutureWarning, stacklevel=1)
        warnings.warn(
            "When using sequence parallelism it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS to 1",
            UserWarning,
            stacklevel=1,
        )
        warnings.warn("another", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["another"]
    for name, line, kept in (
        ("megatron.core.transformer.transformer_layer", "Unknown MLP type: <class 'x'>. Using default kwargs.", False),
        ("DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.", False),
        ("DeepSpeed", "another", True),
    ):
        assert bool(logging.getLogger(name).filter(logging.LogRecord(name, 30, "", 1, line, None, None))) is kept


def test_a_chip_without_a_rate_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    device: Any = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Z900")
    assert "no MFU" in (line := hardware.why_no_mfu(device) or "") and "NVIDIA Z900" in line
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert hardware.why_no_mfu(device) is None and hardware.why_no_mfu(torch.device("cpu")) is None


def test_a_run_that_cannot_be_saved_is_no_mistake_of_the_user(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pretrain(_: object) -> None:
        raise SaveError("checkpoint step_6 could not be written: No space left on device")

    monkeypatch.setattr("nha_megatron.training.run.pretrain", pretrain)
    monkeypatch.delenv("RANK", raising=False)
    assert main(["pretrain", str(file)]) == 1
    assert capsys.readouterr().err == "error: checkpoint step_6 could not be written: No space left on device\n"
