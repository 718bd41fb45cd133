"""Are the token files still what was prepared? Their bytes against the checksums in their manifests."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from nha_megatron.config import ConfigError, RunConfig
from nha_megatron.data.checksum import SAMPLED_BYTES, file_sha256, sampled_sha256
from nha_megatron.data.token_files import FileRecord, Manifest, paths_of

Depth = Literal["sizes", "sampled", "full"]

# Hashing releases the interpreter, and storage answers several readers faster than one.
_THREADS = 8


class CheckedFile(NamedTuple):
    """One file of a run's data, and how far its bytes have been compared."""

    path: str
    bytes: int
    sha256: str
    checked: Depth


def verify_data(config: RunConfig) -> list[CheckedFile]:
    """Compares all token files of a run, of all stages and of validation, as `data.verify` asks. Reads, and talks to no other rank.

    A file whose manifest has no sampled checksum (made by an earlier version) is read in full where it is small, and known by its size
    where it is not. Raises `ConfigError` that names every file that is not what its manifest says.
    """
    blends = [config.data.validation_blend, *(stage.config.data.training_blend for stage in config.stages)]
    jobs: list[tuple[Path, FileRecord]] = []
    for prefix in dict.fromkeys(entry.path for blend in blends for entry in blend):
        bin_path, idx_path, json_path = paths_of(prefix)
        manifest = Manifest.read(json_path)
        jobs += [(bin_path, manifest.bin), (idx_path, manifest.idx)]
    with ThreadPoolExecutor(_THREADS) as pool:
        checked = list(pool.map(lambda job: _check(job[0], job[1], config.data.verify), jobs))
    wrong = [result for result in checked if isinstance(result, str)]
    if wrong:
        raise ConfigError(
            f"token files are not what their manifests say: {'; '.join(wrong)}. Copy them again or prepare the data again "
            "(data.verify says how much is read)"
        )
    return [result for result in checked if isinstance(result, CheckedFile)]


def _check(path: Path, record: FileRecord, depth: Depth) -> CheckedFile | str:
    """What was checked, or what is wrong."""
    try:
        if path.stat().st_size != record.bytes:
            return f"{path} has {path.stat().st_size:,} bytes instead of {record.bytes:,}"
        if depth == "sampled" and record.sampled_sha256 is None:
            depth = "full" if record.bytes <= SAMPLED_BYTES else "sizes"
        if depth != "sizes":
            expected = record.sha256 if depth == "full" else record.sampled_sha256
            if (file_sha256(path) if depth == "full" else sampled_sha256(path)) != expected:
                return f"{path} has other bytes than were written (sha256 differs)"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return CheckedFile(str(path), record.bytes, record.sha256, depth)
