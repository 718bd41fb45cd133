"""A large input in parts that are encoded and published one by one, so that an interrupted preparation goes on where it was.

    PREFIX.parts/00000.tokens   the documents of the part, one after the other, in the type of the token files
                 00000.lengths  int64, of each document
                 00000.json     written last: what the part was made from, and its counts

A part is known by what it was made from: files with their sizes and times, the tokenizer, the field. One that was made from something else
is made again. The division depends on the files alone, so several nodes that see them can make different parts of one input.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nha_megatron.config.json_text import read_json
from nha_megatron.data.compressed import COMPRESSIONS
from nha_megatron.data.encode import Encoded
from nha_megatron.data.rows import Counts
from nha_megatron.data.sources import Span, is_one_value, kind_of
from nha_megatron.publish import aside, remove_leftovers, sync, write_text

PART_BYTES = 2**30  # of input files, some minutes of one process
_READ_TOKENS = 2**20

Part = tuple[Span, ...]


def divide(files: Sequence[Path]) -> list[Part]:
    """Runs of files, about PART_BYTES each; files of lines that are larger are cut between lines."""
    parts: list[Part] = []
    part: list[Span] = []
    filled = 0
    for file in files:
        size = file.stat().st_size
        pieces = max(1, round(size / PART_BYTES)) if _may_be_cut(file, size) else 1
        for piece in range(pieces):
            start, stop = size * piece // pieces, size * (piece + 1) // pieces
            part.append(Span(file) if pieces == 1 else Span(file, start, stop))
            filled += stop - start
            if filled >= PART_BYTES:
                parts.append(tuple(part))
                part, filled = [], 0
    if part:
        parts.append(tuple(part))
    return parts


def _may_be_cut(file: Path, size: int) -> bool:
    return size > PART_BYTES and kind_of(file) == "json" and file.suffix.lower() not in COMPRESSIONS and not is_one_value(file)


def signature(part: Part, about: dict[str, object]) -> str:
    """Hash of all that decides what is in a part."""
    spans = []
    for span in part:
        status = span.path.stat()
        spans.append([str(span.path), status.st_size, status.st_mtime_ns, span.start, span.stop])
    return hashlib.sha256(json.dumps([1, spans, about], sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class PartFile:
    """A part on disk."""

    folder: Path
    number: int

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.number:05d}.{suffix}"

    def read(self, signature: str) -> Counts | None:
        """What the part counted; None if there is no such part, or it was made from something else."""
        try:
            record = read_json(self._path("json").read_text(encoding="utf-8"))
            sizes = [self._path(suffix).stat().st_size for suffix in ("tokens", "lengths")]
            if record["signature"] == signature and record["sizes"] == sizes:
                return Counts(**record["counts"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def write(self, encoded: Iterable[Encoded], signature: str, dtype: np.dtype, seen: Callable[[Encoded], None]) -> Counts:
        """Makes the part; nothing is left behind when that fails."""
        counts = Counts()
        finals = [self._path(suffix) for suffix in ("tokens", "lengths")]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path("json").unlink(missing_ok=True)
        for final in finals:
            remove_leftovers(final)
        partials = [aside(final) for final in finals]
        try:
            with partials[0].open("wb") as tokens, partials[1].open("wb") as lengths:
                for block in encoded:
                    tokens.write(block.tokens.astype(dtype).tobytes())
                    lengths.write(block.lengths.tobytes())
                    counts.add(block.counts)
                    seen(block)
                for file in (tokens, lengths):
                    file.flush()
                    os.fsync(file.fileno())
            for partial, final in zip(partials, finals, strict=True):
                partial.replace(final)
        finally:
            for partial in partials:
                partial.unlink(missing_ok=True)
        record = {"signature": signature, "counts": dataclasses.asdict(counts), "sizes": [final.stat().st_size for final in finals]}
        write_text(self._path("json"), json.dumps(record) + "\n")
        sync(self.folder)
        return counts

    def documents(self, dtype: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens, lengths) of runs of documents, in order."""
        lengths = np.fromfile(self._path("lengths"), dtype=np.int64)
        if lengths.size == 0:
            return
        tokens = np.memmap(self._path("tokens"), dtype=dtype, mode="r")
        ends = np.cumsum(lengths)
        first = start = 0
        while first < lengths.size:
            last = max(first + 1, int(np.searchsorted(ends, start + _READ_TOKENS, side="right")))
            stop = int(ends[last - 1])
            yield np.asarray(tokens[start:stop]), lengths[first:last]
            first, start = last, stop
