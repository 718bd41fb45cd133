"""Fields that were renamed: the old name means the same and is noticed once; both names are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nha_megatron.config import ConfigError, RunConfig, dump_config, load_config, parse_config, with_overrides
from nha_megatron.config import renamed as renamed_module
from tests.config.cases import BASE

NOTICE = "note: guards.window is now called guards.window_steps; the old name still works\n"


@pytest.fixture(autouse=True)
def nothing_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renamed_module, "_noticed", set())
    monkeypatch.delenv("RANK", raising=False)


def run(**guards: int) -> RunConfig:
    return parse_config(yaml.safe_load(BASE) | {"guards": guards})


def test_the_old_name_means_the_same_with_one_line_of_notice(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(window=32) == run(window=32) == run(window_steps=32)
    assert capsys.readouterr() == ("", NOTICE)


def test_one_process_of_a_job_says_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(window=32).guards.window_steps == 32
    assert capsys.readouterr().err == ""


def test_the_new_name_is_written_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert "window_steps: 64" in dump_config(run(window_steps=64)) and capsys.readouterr().err == ""


def test_both_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="guards: window is the old name of window_steps, and both are given; remove window"):
        run(window=32, window_steps=32)


@pytest.mark.parametrize("in_the_file", ["window", "window_steps"])
@pytest.mark.parametrize("on_the_command_line", ["window", "window_steps"])
def test_an_override_wins_under_either_name(tmp_path: Path, in_the_file: str, on_the_command_line: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(BASE + f"guards:\n  {in_the_file}: 32\n")
    assert load_config(path, [f"guards.{on_the_command_line}=16"]).guards.window_steps == 16
    assert with_overrides(load_config(path), [f"guards.{on_the_command_line}=16"]).guards.window_steps == 16


def test_a_wrong_value_is_refused_under_the_new_name() -> None:
    with pytest.raises(ConfigError, match=r"guards\.window_steps: given 2, must be at least 8"):
        run(window=2)
