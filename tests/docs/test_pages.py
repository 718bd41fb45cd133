"""What the pages say of the repository is so: links lead somewhere, files and commands exist, versions agree."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
import yaml

import nha_megatron
from tests.docs.pages import PAGES, ROOT, anchors, command_lines, links, named_paths

README = ROOT / "README.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(file), f"{target}: no such heading"


def test_files_that_pages_name_exist() -> None:
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which speaks of what was
    missing = [(page.name, path) for page in pages for path in named_paths(page) if not any(ROOT.glob(path.rstrip("/")))]
    assert not missing


def test_every_claim_names_a_test_or_a_script() -> None:
    rows = [line for line in (ROOT / "docs" / "verification.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    claims = [row for row in rows if not row.startswith("| claim")]
    assert claims and all("`tests/" in row or "`kernels/benchmarks/" in row for row in claims)


def test_the_readme_can_be_read_in_one_go() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    order = [
        "Two commands",
        "Install",
        "Ten lines of Python",
        "Train, convert, talk",
        "Results",
        "What is supported",
        "Where things are",
        "Links",
    ]
    assert headings == order
    assert "source .venv/bin/activate" in text


def test_commands_are_accepted() -> None:
    from nha_megatron.cli.command import describe
    from nha_megatron.cli.main import COMMANDS

    lines = [line for page in PAGES for line in command_lines(page, "nha-megatron")]
    assert len(lines) > 10
    named = {name for page in PAGES for name in re.findall(r"`nha-megatron ([a-z]\S*?)[ `]", page.read_text(encoding="utf-8"))}
    assert named <= set(COMMANDS)
    for line in lines:
        name, *rest = shlex.split(line)[1:]
        if name == "--help":
            continue
        assert name in COMMANDS, line
        parser = argparse.ArgumentParser(prog=name, exit_on_error=False)
        describe(parser, COMMANDS[name])
        parser.parse_intermixed_args([word for word in rest if word != "..."])


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        named = {line.split()[1] for line in command_lines(page, "make")}
        assert named <= targets, page


def test_versions_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    released = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert citation["version"] == released[0] == nha_megatron.__version__


def test_every_result_has_the_same_form() -> None:
    for page in sorted((ROOT / "docs" / "results").glob("*.md")):
        if page.stem in ("index", "kernels"):
            continue
        text = page.read_text(encoding="utf-8")
        assert all(f"| {row} |" in text for row in ("hardware", "versions", "commit", "command")), page.name
        assert f"({page.name})" in (page.parent / "index.md").read_text(encoding="utf-8"), f"{page.name} is not in the list"


def test_the_glossary_has_the_words_of_the_project() -> None:
    terms = set(re.findall(r"^- \*\*(.+?)\*\*:", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"slot", "window", "halo", "memory", "piece", "slab", "phase", "stage", "exchange"} <= terms
