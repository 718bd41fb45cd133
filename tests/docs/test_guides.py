"""Code in a guide is that of the file it names, so that the guide does not go stale."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import ROOT, python_blocks

GUIDES = sorted((ROOT / "docs").glob("how_to_*.md"))


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_code_is_that_of_the_file(guide: Path) -> None:
    for block in python_blocks(guide):
        head, _, code = block.partition("\n")
        file = ROOT / head.removeprefix("# ")
        assert head.startswith("# ") and file.is_file(), f"{guide.name}: the first line of a block names its file, given {head!r}"
        assert code.rstrip() in file.read_text(encoding="utf-8"), f"{guide.name}: this is not in {file.name}:\n{code}"
