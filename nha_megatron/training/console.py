"""The lines a person watches: one a logged step, and one an event."""

from __future__ import annotations

import sys
from typing import Any, TextIO


def write_text(stream: TextIO, text: str) -> None:
    """Writes and flushes. What the stream cannot encode is escaped, and what it cannot take (a full disk, a closed pipe) is lost: no run
    ends for a line on the console."""
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except (OSError, ValueError):
        return


def print_line(text: str) -> None:
    """`print` that never raises."""
    write_text(sys.stdout, text + "\n")


class Console:
    """Writes progress to a stream.

        step  120/2000 | loss 4.2131 | grad 0.83 | lr 3.0e-04 | 12.3k tok/s | MFU 41.2% | 3.1 GiB | ETA 2m 13s

    On a terminal a step's line replaces the one before; events (evaluations, checkpoints) stay. Elsewhere every line stays.
    """

    def __init__(self, total_steps: int, every: int, stream: TextIO | None = None) -> None:
        self._total = total_steps
        self._every = every
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._pending = 0

    def step(self, record: dict[str, Any], seconds_left: float) -> None:
        step = record["step"]
        if step % self._every and step != self._total:
            return
        line = progress_line(record, self._total, seconds_left)
        if self._live:
            # Spaces up to the length of the line before erase its tail.
            write_text(self._stream, "\r" + line.ljust(self._pending))
            self._pending = len(line)
        else:
            write_text(self._stream, line + "\n")

    def event(self, text: str) -> None:
        self.close()
        write_text(self._stream, text + "\n")

    def close(self) -> None:
        if self._pending:
            write_text(self._stream, "\n")
            self._pending = 0


def progress_line(record: dict[str, Any], total_steps: int, seconds_left: float) -> str:
    width = len(str(total_steps))
    parts = [
        f"step {record['step']:>{width}}/{total_steps}",
        f"loss {record['loss']:.4f}",
        f"grad {record['grad_norm']:.2f}",
        f"lr {record['lr']:.1e}",
        f"{_thousands(record['tokens_per_second'])} tok/s",
    ]
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}")
    parts += [f"{record['memory'] / 2**30:.1f} GiB", f"ETA {duration(seconds_left)}"]
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """`45s`, `2m 13s`, `5h 07m`, `3d 04h`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02d}h"
    if hours:
        return f"{hours}h {m:02d}m"
    if minutes:
        return f"{minutes}m {s:02d}s"
    return f"{s}s"


def _thousands(number: float) -> str:
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.1f}{letter}"
    return f"{number:.0f}"
