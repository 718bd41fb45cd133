"""`tools/predict_context_parallel.py`: the files of this repository predict the runs on two and four GPUs, and only then anything else."""

import json
import re
from pathlib import Path

import pytest
from matplotlib import image

from tools.predict_context_parallel import main

REPOSITORY = Path(__file__).parents[2]
TWO_GPUS = REPOSITORY / "docs" / "results" / "context_parallel_two_nvidia_h200.json"
FOUR_GPUS = TWO_GPUS.with_name("context_parallel_four_nvidia_h200.json")


def rows(markdown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if re.match(r"\| \d", line)]


def test_the_measured_times_are_predicted_within_15_percent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "cost.png"
    assert main(["--output", str(picture)]) == 0
    validated, not_measured = capsys.readouterr().out.split("Not measured")

    runs = {2: json.loads(TWO_GPUS.read_text()), 4: json.loads(FOUR_GPUS.read_text())}
    measured = {(row["tokens_per_rank"], ranks): row["all_ranks_ms"] for ranks, run in runs.items() for row in run["rows"]}
    printed = {(int(row[0].replace(",", "")), int(row[1])): row for row in rows(validated)}
    assert printed.keys() == measured.keys() == {(tokens, ranks) for tokens in (16384, 65536) for ranks in (2, 4)}
    for run, (_, _, shown, predicted, error, _) in printed.items():
        assert float(shown) == pytest.approx(measured[run], abs=0.005)  # two decimals are printed
        assert abs(float(predicted) / measured[run] - 1) < 0.15
        assert float(error.rstrip("%")) == pytest.approx(100 * (float(predicted) / measured[run] - 1), abs=0.5)

    table = rows(not_measured)
    assert [row[0] for row in table] == ["128k", "1M", "1M", "1M", "4M", "8M"]
    for row in table:  # six parts with two decimals and their sum with one
        assert sum(map(float, row[2:8])) == pytest.approx(float(row[8]), abs=0.085)
    assert image.imread(picture).shape[0] > 300


def test_a_model_that_is_further_off_extrapolates_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(TWO_GPUS.read_text())
    content["rows"][1]["all_ranks_ms"] *= 1.3
    (tmp_path / "slower.json").write_text(json.dumps(content))
    assert main(["--two-gpus", str(tmp_path / "slower.json"), "--output", str(tmp_path / "cost.png")]) == 1
    printed = capsys.readouterr()
    assert "at 65536 tokens a rank over 2, allowed 15%: nothing is extrapolated" in printed.err
    assert "Not measured" not in printed.out and not (tmp_path / "cost.png").exists()


def test_the_worst_case_is_predicted_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow_gates = TWO_GPUS.with_name("context_parallel_two_nvidia_h200_slow_gates.json")
    assert main(["--two-gpus", str(slow_gates), "--output", str(tmp_path / "cost.png")]) == 0
    assert all(abs(float(row[4].rstrip("%"))) < 15 for row in rows(capsys.readouterr().out.split("Not measured")[0]))


def over_four_ranks(folder: Path, **changes: object) -> Path:
    """A run over four ranks, made up: with the times of two."""
    content = json.loads(TWO_GPUS.read_text())
    content["ranks"] = 4
    content["layer"] |= changes
    (folder / "four.json").write_text(json.dumps(content))
    return folder / "four.json"


def test_runs_over_more_ranks_are_predicted_from_the_operator_on_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    four = over_four_ranks(tmp_path)
    assert main(["--more-gpus", str(four), "--output", str(tmp_path / "cost.png")]) == 0
    printed = rows(capsys.readouterr().out.split("Not measured")[0])
    assert [(row[0], row[1]) for row in printed] == [("16,384", "2"), ("65,536", "2"), ("16,384", "4"), ("65,536", "4")]
    assert all(float(more[3]) > float(two[3]) for two, more in zip(printed[:2], printed[2:], strict=True))
    assert all(abs(float(row[4].rstrip("%"))) < 15 for row in printed)


def test_runs_of_another_layer_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--more-gpus", str(over_four_ranks(tmp_path, kv_heads=4, heads=16)), "--output", str(tmp_path / "cost.png")]) == 2
    assert main(["--more-gpus", str(over_four_ranks(tmp_path, gates="slow")), "--output", str(tmp_path / "cost.png")]) == 2
    assert main(["--two-gpus", str(over_four_ranks(tmp_path)), "--output", str(tmp_path / "cost.png")]) == 2
    assert "must be of two ranks" in capsys.readouterr().err


def test_a_run_whose_kernels_are_not_listed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(TWO_GPUS.read_text())
    content["kernels"] = [kernel for kernel in content["kernels"] if kernel["name"] != "sum_log_gates"]
    (tmp_path / "short.json").write_text(json.dumps(content))
    assert main(["--two-gpus", str(tmp_path / "short.json"), "--output", str(tmp_path / "cost.png")]) == 2
    assert "lacks 'sum_log_gates'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--two-gpus", "absent.json"], "absent.json cannot be read"),
        (["--operator", str(TWO_GPUS)], "lacks 'shape'"),
        (["--two-gpus", str(REPOSITORY / "README.md")], "README.md is not JSON"),
        (["--adapter-gb-per-s", "0"], "bandwidth of a link in GB/s is 0.0"),
        (["--rails", "9"], "8 ranks in a node with 9 adapters"),
    ],
    ids=["absent", "no-operator", "not-json", "bandwidth", "rails"],
)
def test_nonsense_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main([*arguments, "--output", str(tmp_path / "cost.png")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cost.png").exists()
