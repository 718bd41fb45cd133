"""`nha-megatron check|pretrain`: exit status, output and the one message."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from nha_megatron.cli.main import main
from nha_megatron.config import OneRankError, load_config
from nha_megatron.estimate.counts import num_parameters
from nha_megatron.training.guards import TrainingError
from tests.config.cases import BASE

EXAMPLES = sorted(Path(__file__).parents[2].glob("configs/*.yaml"))


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A configuration in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return str(path)


def make_token_files(directory):
    (directory / "data").mkdir()
    for suffix in (".bin", ".idx", ".json"):
        (directory / "data" / f"train{suffix}").touch()


def test_check_prints_the_resolved_configuration_and_facts(base, capsys):
    assert main(["check", base, "training.steps=20"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert yaml.safe_load(output.out)["training"]["steps"] == 20
    assert f"# {'':2}parameters: 185,152, without embeddings 152,384" in output.out
    assert "layout of 1 ranks, the fewest" in output.out
    assert "1,024 a step, 20,480 in 20 steps" in output.out  # 8 sequences of 128 tokens
    assert "on pipeline stage 0: weights" in output.out


def test_what_check_prints_is_a_configuration(base, capsys, tmp_path):
    main(["check", base])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(base)


def test_check_describes_a_given_world_wherever_the_option_stands(base, capsys):
    for arguments in (["--world-size", "4", base, "parallel.context=2"], [base, "--world-size", "4", "parallel.context=2"]):
        assert main(["check", *arguments]) == 0
        out = capsys.readouterr().out
        assert "tensor 1 x context 2 x data 2 x pipeline 1" in out and "layout of 4 ranks\n" in out
        assert "context parallelism: a rank sends" in out


def test_check_passes_without_data_and_says_what_is_missing(base, capsys, tmp_path):
    assert main(["check", base, "data.tokenizer=tok", "data.path=[{path: data/train, weight: 1}, {path: other, weight: 1}]"]) == 0
    out = capsys.readouterr().out
    assert "data.path 'data/train': no file data/train.bin" in out
    assert "data.path 'other': no file other.bin, other.idx, other.json; make it with `nha-megatron prepare`" in out
    assert "data.tokenizer 'tok': no such directory" in out
    make_token_files(tmp_path)
    assert main(["check", base]) == 0
    assert "not found" not in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["model.num_head=3"], ["--world-size", "0"], ["--world-size", "3"]])
def test_a_mistake_is_one_message_and_status_2(base, capsys, arguments):
    assert main(["check", base, *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1


def test_pretrain_refuses_before_it_loads_torch(base, capsys, monkeypatch, tmp_path):
    assert main(["pretrain", base]) == 2
    message = capsys.readouterr().err
    assert "files not found (working directory" in message and "no file data/train.bin" in message

    make_token_files(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["pretrain", base]) == 2
    assert "world size 3" in capsys.readouterr().err


def test_of_many_ranks_only_the_first_prints(base, capsys, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "1")
    assert main(["pretrain", base, "training.steps=0"]) == 2
    assert capsys.readouterr().err == ""
    assert waits  # a launcher that ends all ranks at once leaves the first one time to print
    monkeypatch.setenv("RANK", "0")
    assert main(["pretrain", base, "training.steps=0"]) == 2
    assert "training.steps: given 0" in capsys.readouterr().err


def test_what_one_rank_alone_knows_that_rank_prints(base, capsys, monkeypatch, tmp_path):
    def fail(config):
        raise OneRankError("sample 7 is damaged")

    make_token_files(tmp_path)
    monkeypatch.setattr("nha_megatron.training.run.pretrain", fail)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(["pretrain", base]) == 2
    assert capsys.readouterr().err == "error: rank 1: sample 7 is damaged\n"


def test_pretrain_accepts_what_the_deepspeed_launcher_appends(base, capsys):
    assert main(["pretrain", "--local_rank=0", base, "training.steps=0"]) == 2
    assert "training.steps" in capsys.readouterr().err


def test_pretrain_hands_over_the_configuration_and_reports_a_run_that_was_given_up(base, capsys, monkeypatch, tmp_path):
    make_token_files(tmp_path)
    seen = []
    monkeypatch.setattr("nha_megatron.training.run.pretrain", seen.append)
    assert main(["pretrain", base, "training.steps=20"]) == 0
    assert seen == [load_config(base, ["training.steps=20"])]

    def fail(config):
        raise TrainingError("the loss of step 3 is nan")

    monkeypatch.setattr("nha_megatron.training.run.pretrain", fail)
    assert main(["pretrain", base]) == 3
    assert capsys.readouterr().err == "error: the loss of step 3 is nan\n"
    # Under launch/*.sh the status goes through a note, and the launcher starts nothing again.
    note = tmp_path / "note"
    monkeypatch.setenv("NHA_EXIT_NOTE", str(note))
    assert main(["pretrain", base]) == 0 and note.read_text() == "3\n"


@pytest.mark.parametrize("arguments", [[], ["train"], ["check"], ["check", "run.yaml", "--steps=3"]])
def test_a_wrong_command_line_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_the_module_runs_as_a_program(base):
    good = subprocess.run([sys.executable, "-m", "nha_megatron", "check", base], capture_output=True, text=True, timeout=60)
    assert (good.returncode, good.stderr) == (0, "")
    bad = subprocess.run([sys.executable, "-m", "nha_megatron", "check", base, "model.tau=0"], capture_output=True, text=True, timeout=60)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == f"error: {base}: model.tau: given 0, must be greater than 0\n"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_configurations_are_valid(path, base, capsys):
    # Run from an empty directory: the examples are complete, their data is not there.
    assert main(["check", str(path)]) == 0
    assert "no file data/" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("quickstart", 2e6, 6e6),
        ("nha-340m", 3.1e8, 3.9e8),
        ("nha-1.3b", 1.2e9, 1.4e9),
        ("nha-8b-128k", 7.5e9, 8.5e9),
        ("nha-3b-hybrid", 2.8e9, 3.2e9),
    ],
)
def test_the_examples_have_the_size_in_their_name(name, low, high):
    [path] = [path for path in EXAMPLES if path.stem == name]
    assert low <= num_parameters(load_config(path).model) <= high
