"""What is published appears complete under its name, or not at all: written aside, made durable, renamed.

.NAME.partial-HOST-PID     being written; left by a command that was killed, and removed by the next one
.NAME.replaced-HOST-PID    the folder that had the name before, for the moment between two renames
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nha_megatron.config import ConfigError


def reason_of(error: OSError) -> str:
    """The system's words, with the file where it is known."""
    words = error.strerror or str(error)
    return f"{words}: {error.filename}" if error.filename else words


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """What goes wrong with the disk in the block becomes one message: a full disk, a quota, missing rights."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{what} could not be written ({reason_of(error)}{_free(folder)}). What was there before is untouched") from error


def _free(folder: Path) -> str:
    with suppress(OSError):
        while not folder.exists():
            folder = folder.parent
        return f"; {shutil.disk_usage(folder).free / 2**30:.1f} GiB free there"
    return ""


def aside(final: Path, kind: str = "partial") -> Path:
    """Where to write what will be called `final`."""
    return final.with_name(f".{final.name}.{kind}-{platform.node()}-{os.getpid()}")


def remove_leftovers(final: Path, only_writer: bool = False) -> None:
    """Removes what killed commands left beside `final`, and gives a folder back its name if one died between the two renames.

    only_writer: the caller holds a lock, so that nobody else writes `final`; otherwise only what dead processes of this host left goes.
    """
    if not final.parent.is_dir():
        return
    # also as version 0.2 called them: .NAME.partial-PID and .NAME.PID.partial
    pattern = re.compile(rf"\.{re.escape(final.name)}\.(?:(partial|replaced)-(?:(.*)-)?(\d+)|(\d+)\.(partial|replaced))(?:\.\w+)?")
    for entry in sorted(final.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match is None or not (only_writer or _is_dead(match[2], int(match[3] or match[4]))):
            continue
        if "replaced" in (match[1], match[5]) and not final.exists():
            entry.rename(final)
        elif entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _is_dead(host: str | None, pid: int) -> bool:
    if host not in (None, platform.node()):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def published_directory(final: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `final` at the end of the block and takes the place of one that was there.

    If the block raises, nothing is left behind and what was there before stays.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(final)
    partial, replaced = aside(final), aside(final, "replaced")
    partial.mkdir()
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            sync(path)
        if final.exists():
            final.rename(replaced)
        try:
            partial.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        sync(final.parent)
    finally:
        for leftover in (partial, replaced):
            if leftover.exists():
                shutil.rmtree(leftover, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one rename, so that readers see the old content or the new."""
    partial = aside(path)
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Makes the content of a file durable, or the names in a folder (POSIX: fsync of a file does not cover its name)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
