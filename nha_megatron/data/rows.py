"""From blocks of an input file to documents. Runs in the worker processes: imports little.

A JSON line is read without a schema: only the field with the text matters, and the text is what stands there. What other fields hold, and
whether they hold the same kind of thing in the next line, changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nha_megatron.config import ConfigError
from nha_megatron.config.json_text import read_json

_MISSING = object()
# From so many rows on a share of missing texts is a finding, and reading on to the end would cost hours.
_ENOUGH_ROWS = 10_000


@dataclass(frozen=True)
class Texts:
    """Documents that have been read already; `where` names them in messages. `left_out`: rows that came to no document."""

    where: str
    texts: list[str]
    left_out: Counts = field(default_factory=lambda: Counts())

    def documents(self) -> Documents:
        counts = Counts(rows=len(self.texts))
        counts.add(self.left_out)
        return Documents(self.texts, counts)

    @property
    def size(self) -> int:
        return sum(map(len, self.texts))


@dataclass(frozen=True)
class JsonLines:
    """Whole lines of a file. `line`: the number of the first, counted from 1 at `start` bytes into the file."""

    path: str
    start: int
    line: int
    data: bytes
    text_field: str

    def documents(self) -> Documents:
        found = Documents([], Counts())
        for number, line in enumerate(self.data.split(b"\n"), self.line):
            if not line or line.isspace():
                continue
            try:
                row = read_row(line)
            except ValueError as error:
                raise ConfigError(f"{self._where(number)}: not JSON ({error}). Repair the line or leave it out.") from None
            problem = found.add_row(row, self.text_field)
            if problem:
                raise ConfigError(f"{self._where(number)}: {problem}")
            if found.counts.missing == 1 and not found.counts.example:
                found.counts.example = f"{self._where(number)} has {_names(row)}"
        return found

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def where(self) -> str:
        return self._where(self.line)

    def _where(self, number: int) -> str:
        if self.start:  # a part of a large file: only a message needs to know how many lines lie before it
            with open(self.path, "rb") as file:
                left = self.start
                while left > 0 and (block := file.read(min(left, 2**22))):
                    number += block.count(b"\n")
                    left -= len(block)
        return f"{self.path}, line {number}"


Block = Texts | JsonLines


@dataclass
class Counts:
    """What has been read: `missing` rows without the field, `empty` documents without any character but white space."""

    rows: int = 0
    missing: int = 0
    empty: int = 0
    example: str = ""
    """Where the first row without the field stands, and which fields it has."""

    def add(self, other: Counts) -> None:
        self.rows += other.rows
        self.missing += other.missing
        self.empty += other.empty
        self.example = self.example or other.example

    def require(self, text_field: str, allow_missing: float, complete: bool = True) -> None:
        """Raises ConfigError when more rows than that share lack the field. `complete`: everything has been read."""
        if self.missing > allow_missing * self.rows and (complete or self.rows >= _ENOUGH_ROWS):
            raise ConfigError(
                f"there is no field {text_field!r} in {self.missing:,} of {self.rows:,} rows; {self.example}. Choose another --text-field, "
                f"or raise --allow-missing ({allow_missing:g} of the rows now) if rows without text are meant to be left out."
            )


@dataclass
class Documents:
    """The texts of a block, in order."""

    texts: list[str]
    counts: Counts = field(default_factory=Counts)

    def add_row(self, row: Any, text_field: str) -> str | None:
        """What is wrong with the row, if anything is."""
        if not isinstance(row, dict):
            return f"the row is {_kind(row)}, not an object with fields. Give JSON lines such as {{{json.dumps(text_field)}: ...}}."
        self.counts.rows += 1
        text = row.get(text_field, _MISSING)
        if text is _MISSING:
            self.counts.missing += 1
        elif text is None:
            self.texts.append("")
        elif not isinstance(text, str):
            return f"field {text_field!r} holds {_kind(text)}, not text. Choose another --text-field; there are: {', '.join(row)}."
        elif not is_unicode(text):
            return f"field {text_field!r} holds half a pair of surrogates (such as \\ud83d alone), which is no character."
        else:
            self.texts.append(text)
        return None


def read_rows(content: Any, path: str, text_field: str) -> Documents:
    """The rows of a JSON file that is one list (of objects, or of texts) or one object."""
    found = Documents([], Counts())
    for number, row in enumerate(content if isinstance(content, list) else [content], 1):
        problem = found.add_row({text_field: row} if isinstance(row, str) else row, text_field)
        if problem:
            raise ConfigError(f"{path}, entry {number}: {problem}")
        if found.counts.missing == 1 and not found.counts.example:
            found.counts.example = f"{path}, entry {number} has {_names(row)}"
    return found


# An integer is replaced by the number of its digits: its value is for nobody, and one of thousands of digits is not refused.
_DECODER = json.JSONDecoder(parse_int=len)


def read_row(line: bytes) -> Any:
    """One line of JSON. Raises ValueError."""
    try:
        return _DECODER.decode(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_whole(data: bytes) -> Any:
    """A whole JSON file. Raises ValueError."""
    return read_json(data.decode("utf-8"))


def is_unicode(text: str) -> bool:
    """JSON can spell half of a character, which no encoding has."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _names(row: Iterable[str]) -> str:
    return f"fields: {', '.join(row)}" if row else "no fields"


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
