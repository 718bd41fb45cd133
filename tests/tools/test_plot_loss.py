"""`tools/plot_loss.py`: a picture of the curve, or one message."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import image

TOOL = Path(__file__).parents[2] / "tools" / "plot_loss.py"


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    records = [{"step": step, "loss": 5 / step} | ({"validation_loss": 5.5 / step} if step % 5 == 0 else {}) for step in range(1, 21)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 21, "lo')
    return tmp_path


def colours(picture: Path) -> set[tuple[int, int, int]]:
    pixels = (image.imread(picture)[:, :, :3] * 255).round().astype(int)
    return {tuple(pixel) for pixel in pixels.reshape(-1, 3).tolist()}


def test_the_picture_shows_training_validation_and_baseline(run: Path) -> None:
    result = call(str(run), "--baseline", "4.2")
    assert (result.returncode, result.stdout.strip()) == (0, str(run / "loss.png"))
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)} <= colours(run / "loss.png")


def test_without_a_baseline_there_is_no_such_line(run: Path) -> None:
    assert call(str(run / "metrics.jsonl"), "--output", str(run / "deep" / "curve.png")).returncode == 0
    assert (0x00, 0x9E, 0x73) not in colours(run / "deep" / "curve.png")


def test_a_loss_that_was_not_finite_is_a_gap(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[7] = json.dumps({"step": 8, "loss": None}) + "\n"
    (run / "metrics.jsonl").write_text("".join(lines))
    result = call(str(run))
    assert result.returncode == 0, result.stderr
    assert (0x00, 0x72, 0xB2) in colours(run / "loss.png")


def test_a_run_without_metrics_is_one_message(tmp_path: Path) -> None:
    result = call(str(tmp_path))
    assert result.returncode == 2 and "metrics.jsonl does not exist" in result.stderr and "Traceback" not in result.stderr
