"""The programs in examples/ and the README's Python run on a CPU, as a reader would start them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.docs.pages import ROOT, python_blocks

EXAMPLES = ROOT / "examples"


def run(*command: str, folder: Path) -> str:
    """What a program prints. It must end well, on the CPU and without a network."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=folder, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme(tmp_path: Path) -> None:
    (block,) = python_blocks(ROOT / "README.md")
    assert len(block.strip().splitlines()) <= 10
    difference = re.search(r"tensor\((\S+?)[,)]", run("-c", block, folder=tmp_path))
    assert difference is not None and float(difference[1]) < 1e-5


def test_the_operator_alone(tmp_path: Path) -> None:
    printed = run(str(EXAMPLES / "operator_alone.py"), folder=tmp_path)
    differences = [float(number) for number in re.findall(r"differs by (\S+)", printed)]
    assert len(differences) == 2 and max(differences) < 1e-5


def test_a_model_built_and_run(tmp_path: Path) -> None:
    printed = run(str(EXAMPLES / "build_model.py"), folder=tmp_path)
    losses = [float(number) for number in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 5 and losses[-1] < losses[0]


def test_a_run_from_python_and_its_export_loaded(tmp_path: Path) -> None:
    printed = run(str(EXAMPLES / "train.py"), str(tmp_path / "work"), folder=tmp_path)
    first, last = map(float, re.findall(r"^loss ([\d.]+) -> ([\d.]+)$", printed, re.MULTILINE)[0])
    assert last < first - 1
    printed = run(str(EXAMPLES / "load_export.py"), str(tmp_path / "work" / "exported"), folder=tmp_path)
    assert "[5, 6, 7, 8] goes on with [9, 10, 11, 12" in printed  # the corpus counts upwards
