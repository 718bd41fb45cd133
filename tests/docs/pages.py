"""Pages of the project as text: links, anchors, code, and the files and commands that they name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "launch" / "README.md", *(ROOT / "docs").rglob("*.md")]
)

_FENCE = re.compile(r"^(`{3,}).*?^\1\s*$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]+`")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+?)\s*$", re.MULTILINE)
_INCLUDE = re.compile(r"^```\{include\} (\S+)", re.MULTILINE)


def links(page: Path) -> Iterator[str]:
    """Targets of the page's links to places in the repository."""
    for target in _LINK.findall(_CODE.sub("", _FENCE.sub("", page.read_text(encoding="utf-8")))):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(page: Path) -> set[str]:
    """Names of the page's headings in links, as GitHub and Sphinx make them; those of files that it includes too."""
    text = page.read_text(encoding="utf-8")
    found = {_slug(heading) for heading in _HEADING.findall(_FENCE.sub("", text))}
    for included in _INCLUDE.findall(text):
        found |= anchors(page.parent / included)
    return found


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def named_paths(page: Path) -> Iterator[str]:
    """Files and folders of the repository that stand in single backticks."""
    tops = {entry.name for entry in ROOT.iterdir() if entry.is_dir() and entry.name not in {"runs", "data", "build"}}
    for code in _CODE.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        word = code.strip("`").split()[0]
        if word.split("/")[0] in tops and re.fullmatch(r"[\w./*-]+", word) and "/" in word:
            yield word


def command_lines(page: Path, program: str) -> Iterator[str]:
    """Lines of code that start with `program`, without prompt, comment and redirection."""
    for line in page.read_text(encoding="utf-8").splitlines():
        line = line.strip().removeprefix("$ ")
        if line.startswith(program + " "):
            yield re.split(r"\s#\s|\s>\s", line)[0].strip()


def python_blocks(page: Path) -> Iterator[str]:
    """Fenced Python of a page."""
    yield from re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
