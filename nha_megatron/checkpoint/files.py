"""Where a run's checkpoints lie, and how a folder appears there in one step.

    checkpoints/
        latest             text: the name of the newest published folder, for people and scripts
        step_100/          published: complete, with a manifest
        .step_200.partial/ being written, or left by a crash; removed when the next run starts
        .step_100.replaced/ being removed; `.1`, `.2`, ... follow where a leftover has the name and cannot be removed

What cannot be removed (another owner's, a lost mount) is left where it is and said in a warning: it stops neither a run nor its start.
Loading trusts the folders and their manifests, not `latest`: a crash between publishing and `latest` loses nothing.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from nha_megatron.config import ConfigError
from nha_megatron.publish import reason_of as reason_of
from nha_megatron.publish import sync as sync
from nha_megatron.publish import write_text as write_atomically

MANIFEST = "manifest.json"
LATEST = "latest"
PUBLISHED = re.compile(r"step_(\d+)")
_PARTIAL = re.compile(r"\.step_(\d+)\.(partial|replaced)(\.\d+)?")


class CheckpointError(ConfigError):
    """A checkpoint cannot be written, found or used. One message for the user."""


class SaveError(CheckpointError):
    """A run ends because it could not be saved: the machine's failure, not the user's."""


def step_directory(root: Path, step: int) -> Path:
    return root / f"step_{step}"


def step_of(directory: Path) -> int:
    """The step in a published folder's name; `read_manifest` refuses a manifest of another step."""
    return int(directory.name.removeprefix("step_"))


def partial_directory(root: Path, step: int) -> Path:
    return root / f".step_{step}.partial"


def published_steps(root: Path) -> list[int]:
    """Steps of all published folders, ascending; whether they are sound is for `verify` to say. Links that lead nowhere are among them.

    Raises OSError when the folder cannot be read.
    """
    try:
        entries = list(os.scandir(root))
    except (FileNotFoundError, NotADirectoryError):
        return []
    matches = (PUBLISHED.fullmatch(entry.name) for entry in entries if entry.is_symlink() or entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def has_manifest(directory: Path) -> bool:
    """Whether it is a complete checkpoint, as far as this user can see."""
    try:
        return (directory / MANIFEST).is_file()
    except OSError:  # no permission, a lost mount
        return False


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
    if has_manifest(path):
        return path
    try:
        for root in (path, path / "checkpoints"):
            steps = [step for step in published_steps(root) if has_manifest(step_directory(root, step))]
            if steps:
                return step_directory(root, steps[-1])
        what = "is not a checkpoint: no manifest.json, and no step_N folder with one" if path.exists() else "does not exist"
    except OSError as error:
        what = f"cannot be read: {reason_of(error)}"
    raise CheckpointError(f"checkpoint {path} {what}. Give a step_N folder, a checkpoints folder or a run's folder")


def prepare_root(root: Path) -> list[str]:
    """Makes the folder and removes what a crash left unpublished; returns a warning for each leftover that stays.

    Raises OSError when nothing can be written there.
    """
    root.mkdir(parents=True, exist_ok=True)
    write_atomically(root / ".writable", "")
    (root / ".writable").unlink()
    return [warning for entry in sorted(root.iterdir()) if _PARTIAL.fullmatch(entry.name) for warning in _remove(entry)]


def set_aside(root: Path, steps: list[int]) -> list[Path]:
    """Takes these checkpoints out of the run's way, under the names `step_N.set_aside`; returns their new paths. Nothing is deleted."""
    return [rename_to_free(step_directory(root, step), root / f"step_{step}.set_aside") for step in steps]


def make_partial(partial: Path) -> None:
    """An empty folder to write into; what an earlier attempt left there is removed, or makes way."""
    if os.path.lexists(partial) and _remove(partial):
        rename_to_free(partial, partial)
    partial.mkdir(parents=True)


def publish(partial: Path, final: Path) -> list[str]:
    """Makes a completely written folder visible under its final name, durably; returns warnings.

    A folder that already has the name is replaced: it is one that could not be loaded, for otherwise the run would have
    continued from it.
    """
    sync(partial)
    replaced = None
    if os.path.lexists(final):
        replaced = rename_to_free(final, _doomed(final))
    partial.rename(final)
    sync(final.parent)
    return [] if replaced is None else _remove(replaced)


def _doomed(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.replaced")


def rename_to_free(path: Path, target: Path) -> Path:
    """Renames to `target`, or where that name is taken to the first free of `target.1`, `target.2`, ...; returns the new path."""
    free, number = target, 0
    while os.path.lexists(free):
        number += 1
        free = target.with_name(f"{target.name}.{number}")
    return path.rename(free)


def _remove(path: Path) -> list[str]:
    """Deletes a folder, or a link without what it leads to. Returns a warning instead of raising."""
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path)
    except OSError as error:
        return [f"{path} could not be removed ({reason_of(error)}); remove it by hand"]
    return []


def write_latest(root: Path, step: int) -> None:
    write_atomically(root / LATEST, step_directory(root, step).name + "\n")


def retain(root: Path, keep: int, step: int) -> list[str]:
    """Deletes all but the `keep` newest checkpoints up to `step`, the one just saved, which stays; returns warnings.

    Folders without a manifest that this user can read stay too. Of a link only the link is deleted.
    A folder of a later step is one that the run could not load; counted as new, it would push out the sound ones. It is
    replaced when training comes to its step.
    A folder loses its name before its content, so a crash in between leaves no half-deleted checkpoint to be found.
    """
    warnings = []
    complete = [each for each in published_steps(root) if each <= step and has_manifest(step_directory(root, each))]
    for old in complete[: -max(keep, 1)]:
        directory = step_directory(root, old)
        try:
            doomed = rename_to_free(directory, _doomed(directory))
        except OSError as error:
            warnings.append(f"{directory} is beyond checkpoint.keep, but could not be removed: {reason_of(error)}")
            continue
        warnings += _remove(doomed)
    return warnings
