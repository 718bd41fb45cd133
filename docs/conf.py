"""Sphinx builds these pages: `make docs`, or `python -m sphinx --fail-on-warning docs build/docs`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "docs")]

import docstrings  # noqa: E402  beside this file

import nha_megatron  # noqa: E402
from nha_megatron.known_warnings import silence_known_warnings  # noqa: E402

silence_known_warnings()
logging.getLogger("megatron.core.distributed.fsdp").setLevel(logging.WARNING)  # announces itself on import, which autodoc does

project = "nha_megatron"
author = "The nha_megatron authors"
version = release = nha_megatron.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3  # a link to a heading that is not there is a warning, and warnings fail the build
suppress_warnings = ["myst.header"]  # included files begin at another level
nitpicky = False

default_role = "literal"  # docstrings write code in single backticks
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

highlight_language = "none"  # drawings and shell lines; Python is fenced as such
html_theme = "furo"
html_title = f"nha_megatron {version}"
templates_path: list[str] = []


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", docstrings.process, priority=400)  # before napoleon
