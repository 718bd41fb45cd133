"""The manifest: what a checkpoint is, and how to tell whether it still is that.

`manifest.json` names every other file of the folder with its size and sha256, and carries the run's position, its
resolved configuration and the versions that wrote it. It is the last file written before the folder is published.
"""

from __future__ import annotations

import json
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nha_megatron.checkpoint.files import MANIFEST, PUBLISHED, CheckpointError, write_atomically
from nha_megatron.data.checksum import file_sha256
from nha_megatron.version import __version__

FORMAT = "nha_megatron/torch_dist"
FORMAT_VERSION = 1

# A few hundred bytes for each file; what is larger is no manifest, and is not read into memory.
_MOST_BYTES = 256 * 2**20
_MOST = 2**63


@dataclass(frozen=True)
class FileEntry:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`files` maps each path below the checkpoint folder to its size and sha256 in hexadecimal; `config` is the resolved configuration;
    `data` says what the run read (data/identity.py), None in checkpoints that do not know; `guards` is `Progress.guards`."""

    step: int
    tokens: int
    world_size: int
    config: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, FileEntry]
    data: dict[str, Any] | None = None
    guards: dict[str, Any] | None = None
    format: str = FORMAT
    format_version: int = FORMAT_VERSION


def write_manifest(directory: Path, manifest: Manifest) -> None:
    write_atomically(directory / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Raises `CheckpointError` when there is no manifest, or it is not one this version reads."""
    path = directory / MANIFEST
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise CheckpointError(f"checkpoint {directory}: {MANIFEST} has {path.stat().st_size:,} bytes: it is damaged, or no manifest")
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or content["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint {directory} has format {_short(content['format'])} version {_short(content['format_version'])}; "
                f"this version reads {FORMAT!r} version {FORMAT_VERSION}"
            )
        files = {name: FileEntry(**entry) for name, entry in content.pop("files").items()}
        manifest = Manifest(files=files, **content)
        _require_types(manifest)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint {directory} has no {MANIFEST}: it is incomplete, or not a checkpoint of nha_megatron") from error
    except CheckpointError:
        raise
    # ValueError: no JSON, no UTF-8, or a number of thousands of digits. RecursionError: brackets within brackets
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {directory}: {MANIFEST} is damaged ({type(error).__name__}: {str(error)[:400]})") from error
    except OSError as error:
        raise CheckpointError(f"checkpoint {directory}: {MANIFEST} cannot be read: {error.strerror}") from error
    match = PUBLISHED.fullmatch(directory.name)
    if match and int(match[1]) != manifest.step:
        raise CheckpointError(f"checkpoint {directory}: {MANIFEST} says that this is step {manifest.step}; rename the folder back")
    return manifest


def _require_types(manifest: Manifest) -> None:
    """Raises TypeError for what only a hand, or a disk, can have written."""
    for name in ("step", "tokens", "world_size"):
        value = getattr(manifest, name)
        if type(value) is not int or not (name == "world_size") <= value < _MOST:
            raise TypeError(f"{name} is {_short(value)}")
    if not isinstance(manifest.versions, dict) or not all(isinstance(value, str) for value in manifest.versions.values()):
        raise TypeError(f"versions is {_short(manifest.versions)}")
    _require_configuration(manifest.config)
    _require_guards(manifest.guards)
    if manifest.data is not None and not isinstance(manifest.data, dict):
        raise TypeError(f"data is {_short(manifest.data)}")
    if not manifest.files:
        raise TypeError("it names no files")
    for name, entry in manifest.files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise TypeError(f"it names {name[:200]}, outside the checkpoint")
        whole = type(entry.bytes) is int and 0 <= entry.bytes < _MOST
        if not whole or not isinstance(entry.sha256, str):
            raise TypeError(f"the entry of {name[:200]} is {_short(entry)}")


def _require_configuration(config: object) -> None:
    sections = ("model", "data", "training", "optimizer")
    if not isinstance(config, dict) or not all(isinstance(config.get(name, {}), dict) for name in sections):
        raise TypeError("config is not a run's configuration")
    stages = config.get("training", {}).get("stages")
    if stages is not None and not (isinstance(stages, list) and all(isinstance(stage, dict) for stage in stages)):
        raise TypeError(f"config.training.stages is {_short(stages)}")


def _require_guards(guards: object) -> None:
    """training/guards.py goes on with these."""
    if not isinstance(guards, dict | None):
        raise TypeError(f"guards is {_short(guards)}")
    numbers = lambda value: isinstance(value, list) and all(type(each) in (int, float) for each in value)  # noqa: E731
    checks = {"losses": numbers, "recent_skips": numbers, "spiking": lambda v: type(v) is bool, "skipped": lambda v: type(v) is int}
    for name, is_right in checks.items():
        if guards and name in guards and not is_right(guards[name]):
            raise TypeError(f"guards.{name} is {_short(guards[name])}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def verify(directory: str | Path, group: dist.ProcessGroup | None = None, threads: int = 1) -> Manifest:
    """Checks that every file is there with its size and sha256, and returns the manifest. `threads` read at a time.

    With a process group, collective over it: each rank reads its share of the files and all come to the same answer, also
    when only one of them cannot read the manifest (a network file system that shows it new names late).
    Raises `CheckpointError` naming what is wrong.
    """
    directory = Path(directory)
    manifest, unreadable = None, None
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        unreadable = error
    files = {} if manifest is None else manifest.files
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    with ThreadPoolExecutor(threads) as pool:  # hashing lets other threads run
        found = pool.map(lambda name: _problem(directory / name, name, files[name]), sorted(files)[rank::size])
        problems = [problem for problem in found if problem is not None]
    if group is not None:
        shares: list[tuple[CheckpointError | None, list[str]]] = [(None, [])] * size
        dist.all_gather_object(shares, (unreadable, problems), group=group)
        unreadable = next((error for error, _ in shares if error is not None), None)
        problems = [problem for _, share in shares for problem in share]
    if unreadable is not None:
        raise unreadable
    if problems:
        raise CheckpointError(f"checkpoint {directory} is damaged: {'; '.join(problems[:5])}{' ...' if problems[5:] else ''}")
    assert manifest is not None
    return manifest


def _problem(path: Path, name: str, expected: FileEntry) -> str | None:
    try:
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected.bytes:
            return f"{name} has {path.stat().st_size} bytes instead of {expected.bytes}"
        if file_sha256(path) != expected.sha256:
            return f"{name} has another content than was written (sha256 differs)"
    except OSError as error:  # a bad sector, say
        return f"{name} cannot be read: {error.strerror}"
    return None


def versions() -> dict[str, str]:
    """Versions of everything that decides what a checkpoint looks like."""
    return {
        "nha_megatron": __version__,  # not from its metadata: it may run uninstalled, from PYTHONPATH
        "megatron_core": metadata.version("megatron-core"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
