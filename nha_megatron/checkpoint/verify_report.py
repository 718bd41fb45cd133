"""What `python -m nha_megatron verify DIR` says: one line for each checkpoint, in the order of steps.

sound     step_100: 409,600 tokens, 1.31 GiB in 6 files of 2 ranks
damaged   step_200: __1_0.distcp has another content than was written (sha256 differs)
unfinished step_300: being written, or left by a crash; the next start of the run removes it
a run would continue from step_100

The last line is left out for a single checkpoint: newer ones may stand beside it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from nha_megatron.checkpoint.files import CheckpointError, published_steps, reason_of, resolve, step_directory, unfinished_steps
from nha_megatron.checkpoint.manifest import Manifest, verify
from nha_megatron.checkpoint.safety import require_plain_data


class VerifyReport:
    """Reads every byte of the checkpoints at `path`: a checkpoint, a `checkpoints` folder or a run's folder.

    Raises `CheckpointError` when there is none. Iterate over it for the lines; `is_sound` is known afterwards.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            path = Path(path).resolve()  # "." has no name to print
            root = next((folder for folder in (path, path / "checkpoints") if published_steps(folder) or unfinished_steps(folder)), None)
            self._is_run = root is not None
            if root is None:
                self._directories, self._unfinished = [resolve(path)], []
            else:
                self._directories, self._unfinished = [step_directory(root, step) for step in published_steps(root)], unfinished_steps(root)
        except OSError as error:  # no permission, a disk that does not answer
            raise CheckpointError(f"checkpoint {path} cannot be read: {reason_of(error)}") from error
        except RuntimeError as error:  # pathlib's word for links in a circle, before Python 3.13
            raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
        self.is_sound = True

    def __iter__(self) -> Iterator[str]:
        newest = None
        for directory in self._directories:
            try:
                manifest = verify(directory, threads=min(16, os.cpu_count() or 1))
                require_plain_data(directory)
            except CheckpointError as error:
                self.is_sound = False
                yield f"damaged    {directory.name}: {_reason(directory, error)}"
            else:
                newest = directory.name
                yield f"sound      {directory.name}: {_contents(manifest)}"
        for step in self._unfinished:
            yield f"unfinished step_{step}: being written, or left by a crash; the next start of the run removes it"
        if self._is_run:
            yield f"a run would continue from {newest}" if newest else "there is no checkpoint that a run could continue from"


def _reason(directory: Path, error: CheckpointError) -> str:
    return str(error).removeprefix(f"checkpoint {directory}").lstrip(": ").removeprefix("is damaged: ")


def _contents(manifest: Manifest) -> str:
    size = sum(entry.bytes for entry in manifest.files.values())
    return f"{manifest.tokens:,} tokens, {size / 2**30:.2f} GiB in {len(manifest.files)} files of {manifest.world_size} ranks"
