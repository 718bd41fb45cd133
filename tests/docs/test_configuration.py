"""The configuration reference is that of the fields."""

from __future__ import annotations

import subprocess
import sys

from tests.docs.pages import ROOT

PROGRAM = ROOT / "docs" / "generate_configuration.py"


def test_the_page_is_what_the_fields_say() -> None:
    checked = subprocess.run([sys.executable, str(PROGRAM), "--check"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_every_field_has_a_description() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 80
    assert not [row for row in rows if row.endswith("|  |")]
