"""Input files as streams of bytes, compressed or not. An archive that ends too early raises EOFError, whatever its kind."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

_CHUNK = 2**20


class _ZstandardReader(io.RawIOBase):
    """The library's own stream reader takes a file that ends in the middle of a frame for a complete one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._ahead = b""  # read and not yet decompressed
        self._out = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast(bytearray, buffer))
        while not self._out:
            data = self._ahead or self._file.read(_CHUNK)
            self._ahead = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()  # as large as `zstd --long=31`
            frame = self._frame
            self._out = frame.decompress(data)
            if frame.eof:
                self._frame, self._ahead = None, frame.unused_data
        count = min(len(view), len(self._out))
        view[:count] = self._out[:count]
        self._out = self._out[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_zstandard(path: Path) -> _ZstandardReader:
    return _ZstandardReader(path.open("rb"))


_OPEN: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".zst": _open_zstandard, ".xz": lzma.open, ".bz2": bz2.open}
COMPRESSIONS = tuple(_OPEN)

# what reading such a stream raises beside OSError
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


def open_input(path: Path) -> BinaryIO:
    """The uncompressed bytes of a file."""
    decompress = _OPEN.get(path.suffix.lower())
    if decompress is None:
        return path.open("rb")
    return cast(BinaryIO, io.BufferedReader(decompress(path), _CHUNK))
