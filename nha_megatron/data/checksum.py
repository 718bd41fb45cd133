"""SHA-256 of files, of all bytes or of samples of them."""

import hashlib
from pathlib import Path

SAMPLED_BYTES = 64 * 2**20
_BLOCK = 2**20


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sampled_sha256(path: Path) -> str:
    """SHA-256 of 64 blocks of 1 MiB, evenly spaced, the first and the last included; of all bytes where there are no more than that.

    The size is hashed with them. Finds what goes wrong with whole files (cut short, zeroed, another version, a bad copy), in a tenth of a
    second whatever the size; a single wrong byte in a large file is found by `file_sha256` only.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    blocks = SAMPLED_BYTES // _BLOCK
    starts = [0] if size <= SAMPLED_BYTES else [(size - _BLOCK) * i // (blocks - 1) for i in range(blocks)]
    with path.open("rb") as stream:
        for start in starts:
            stream.seek(start)
            digest.update(stream.read(SAMPLED_BYTES if size <= SAMPLED_BYTES else _BLOCK))
    return digest.hexdigest()
