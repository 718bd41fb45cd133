"""Where a run's checkpoints lie, and how a folder appears there in one step.

    checkpoints/
        latest             text: the name of the newest published folder, for people and scripts
        step_100/          published: complete, with a manifest
        .step_200.partial/ being written, or left by a crash; removed when the next run starts

Loading trusts the folders and their manifests, not `latest`: a crash between publishing and `latest` loses nothing.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from nha_megatron.config import ConfigError

MANIFEST = "manifest.json"
LATEST = "latest"
PUBLISHED = re.compile(r"step_(\d+)")
_PARTIAL = re.compile(r"\.step_(\d+)\.(partial|replaced)")


class CheckpointError(ConfigError):
    """A checkpoint cannot be written, found or used. One message for the user."""


def reason_of(error: OSError) -> str:
    """The system's words, with the file where it is known."""
    words = error.strerror or str(error)
    return f"{words}: {error.filename}" if error.filename else words


def step_directory(root: Path, step: int) -> Path:
    return root / f"step_{step}"


def step_of(directory: Path) -> int:
    """The step in a published folder's name; `read_manifest` refuses a manifest of another step."""
    return int(directory.name.removeprefix("step_"))


def partial_directory(root: Path, step: int) -> Path:
    return root / f".step_{step}.partial"


def published_steps(root: Path) -> list[int]:
    """Steps of all published folders, ascending; whether they are sound is for `verify` to say."""
    if not root.is_dir():
        return []
    matches = (PUBLISHED.fullmatch(entry.name) for entry in root.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def unfinished_steps(root: Path) -> list[int]:
    """Steps whose folder has not been published, or is being removed, ascending."""
    if not root.is_dir():
        return []
    return sorted(int(match[1]) for match in (_PARTIAL.fullmatch(entry.name) for entry in root.iterdir()) if match)


def resolve(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, the newest in a `checkpoints` folder, or the newest of a run's folder.

    Raises `CheckpointError` when there is none.
    """
    path = Path(path)
    try:
        if (path / MANIFEST).is_file():
            return path
        for root in (path, path / "checkpoints"):
            steps = [step for step in published_steps(root) if (step_directory(root, step) / MANIFEST).is_file()]
            if steps:
                return step_directory(root, steps[-1])
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {reason_of(error)}") from error
    what = "is not a checkpoint: no manifest.json, and no step_N folder with one" if path.exists() else "does not exist"
    raise CheckpointError(f"checkpoint {path} {what}. Give a step_N folder, a checkpoints folder or a run's folder")


def prepare_root(root: Path) -> None:
    """Makes the folder and removes what a crash left unpublished. Raises OSError when nothing can be written there."""
    root.mkdir(parents=True, exist_ok=True)
    write_atomically(root / ".writable", "")
    (root / ".writable").unlink()
    for entry in root.iterdir():
        if _PARTIAL.fullmatch(entry.name):
            shutil.rmtree(entry)


def make_partial(partial: Path) -> None:
    """An empty folder to write into, in place of one that an earlier attempt left."""
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def publish(partial: Path, final: Path) -> None:
    """Makes a completely written folder visible under its final name, durably.

    A folder that already has the name is replaced: it is one that could not be loaded, for otherwise the run would have
    continued from it.
    """
    sync(partial)
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def write_latest(root: Path, step: int) -> None:
    write_atomically(root / LATEST, step_directory(root, step).name + "\n")


def retain(root: Path, keep: int, step: int) -> None:
    """Deletes all but the `keep` newest checkpoints up to `step`, the one just saved, which stays. Folders without a manifest stay too.

    A folder of a later step is one that the run could not load; counted as new, it would push out the sound ones. It is
    replaced when training comes to its step.
    A folder loses its name before its content, so a crash in between leaves no half-deleted checkpoint to be found.
    """
    complete = [each for each in published_steps(root) if each <= step and (step_directory(root, each) / MANIFEST).is_file()]
    for old in complete[: -max(keep, 1)]:
        doomed = partial_directory(root, old)
        step_directory(root, old).rename(doomed)
        shutil.rmtree(doomed)


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one rename, so that readers see the old content or the new."""
    aside = path.with_name(f".{path.name}.aside")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Makes the content of a file durable, or the names in a folder (POSIX: fsync of a file does not cover its name)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
