"""Docstrings of this project are plain text with drawings; Sphinx reads reStructuredText. A drawing becomes a literal block."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

_SECTION = re.compile(r"(Args|Returns|Raises|Attributes|Yields):$")


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Handler of autodoc's event: changes `lines` in place."""
    lines[:] = with_literal_blocks(lines)


def with_literal_blocks(lines: Sequence[str]) -> list[str]:
    """Puts `::` before every indented block that is no section of a Google docstring (Args, Returns, ...).

    >>> with_literal_blocks(["Who sees what:", "", "    a -> b", "", "Args:", "    x: a number"])
    ['Who sees what:', '', '::', '', '    a -> b', '', 'Args:', '    x: a number']
    """
    return list(_marked(lines))


def _marked(lines: Sequence[str]) -> Iterator[str]:
    in_section = in_drawing = False
    previous = ""
    for line in lines:
        indented = line.startswith("    ")
        if line and not indented:
            in_section, in_drawing = bool(_SECTION.match(line)), False
        elif indented and not in_section and not in_drawing and not previous:
            in_drawing = True
            yield from ("::", "")
        yield line
        previous = line
