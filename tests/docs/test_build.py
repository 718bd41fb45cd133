"""The pages build without a warning, and drawings in docstrings survive."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT


@pytest.mark.slow
def test_pages_build(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="pip install '.[docs]'")
    pytest.importorskip("myst_parser", reason="pip install '.[docs]'")
    pytest.importorskip("furo", reason="pip install '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", str(ROOT / "docs"), str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert "the M slots          |   the window, exactly" in api


def test_drawings_become_literal_blocks() -> None:
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    assert spec is not None and spec.loader is not None
    docstrings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docstrings)
    given = ["Who sees what:", "", "    a -> b", "      -> c", "", "Text.", "", "Args:", "    x: a number", "        of tokens"]
    wanted = ["Who sees what:", "", "::", "", "    a -> b", "      -> c", "", "Text.", "", "Args:", "    x: a number", "        of tokens"]
    assert docstrings.with_literal_blocks(given) == wanted
