"""The figure of the README is what its script draws."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

FIGURES = ROOT / "docs" / "figures"


def test_the_figure_is_drawn_by_its_script(tmp_path: Path) -> None:
    pinned = re.search(r"^matplotlib==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    if pinned is None or version("matplotlib") != pinned[1]:
        pytest.skip("another matplotlib than constraints.txt names: it may draw letters otherwise")
    subprocess.run([sys.executable, str(FIGURES / "draw_layer.py"), "--output", str(tmp_path / "layer.svg")], check=True)
    assert (tmp_path / "layer.svg").read_bytes() == (FIGURES / "layer.svg").read_bytes()
