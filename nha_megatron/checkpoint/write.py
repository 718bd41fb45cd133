"""Writes one checkpoint: all ranks write aside, then rank 0 publishes it in one rename.

    .step_N.partial/  <- torch_dist files, each made durable and hashed    a thread of every rank
                      <- common.pt, metadata.json, .metadata               rank 0
                      <- manifest.json                                     rank 0
    step_N/           <- rename                                            rank 0
    latest            <- replaced                                          rank 0
    old checkpoints   <- removed beyond `keep`                             rank 0

A crash at any point leaves either the checkpoint before, or this one, complete. A failure leaves the ones before, and no
half-written folder to fill the disk.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nha_megatron.checkpoint.collective import on_rank_zero, sum_over_ranks
from nha_megatron.checkpoint.files import (
    CheckpointError,
    make_partial,
    partial_directory,
    publish,
    reason_of,
    retain,
    step_directory,
    sync,
    write_latest,
)
from nha_megatron.checkpoint.host_memory import HostMemory
from nha_megatron.checkpoint.manifest import FileEntry, Manifest, versions, write_manifest
from nha_megatron.checkpoint.shards import ShardWriter, Written
from nha_megatron.checkpoint.state import Progress, rng_for_saving
from nha_megatron.data.checksum import file_sha256
from nha_megatron.engine.base import Engine


class PendingSave:
    """A checkpoint whose bytes are being written. All methods are collective over all ranks.

    What is saved is the state at the moment of the call, also when training goes on meanwhile; `copy` must be true then.
    Raises `CheckpointError` on every rank when the folder cannot be made. When the ranks' shards do not make a whole, Megatron's
    `CheckpointingException` passes through: a fault of the program, which 0.16.1 raises on rank 0 alone, so rank 0 must end.

    Args:
        config: the resolved configuration, kept in the manifest.
        data: what the run reads (`data_identity`), kept in the manifest.
        memory: that of the save before, which has been finished.
    """

    def __init__(
        self,
        root: Path,
        engine: Engine,
        progress: Progress,
        config: dict[str, Any],
        copy: bool,
        data: dict[str, Any] | None = None,
        memory: HostMemory | None = None,
    ) -> None:
        self.progress = replace(progress)  # the run's own moves on
        self.path = step_directory(root, progress.step)
        self.started = time.perf_counter()
        self._root = root
        self._device, self._group = engine.device, engine.layout.world
        self._config, self._data = config, data
        self._partial = partial_directory(root, progress.step)
        on_rank_zero(f"checkpoint {self.path} could not be written", lambda: make_partial(self._partial), self._group)
        state = engine.sharded_state_dict(is_loading=False)
        assert "rng_state" not in state
        state["rng_state"] = rng_for_saving(engine.device, self._group)
        # On CUDA the copy to host memory is one; what the engine has in host memory there, it made for this call.
        memory = HostMemory() if memory is None else memory
        memory.begin()
        self._writer = ShardWriter(state, self._partial, copy and engine.device.type == "cpu", memory)
        self._writer.start()
        self.began_in = time.perf_counter() - self.started  # seconds
        self.warnings: list[str] = []
        """After `finish`: what of the folders around the checkpoint could not be changed. The checkpoint itself is sound."""

    def advance(self) -> tuple[bool, int, int]:
        """(all ranks have ended writing, bytes written by now, bytes in all), the same on every rank."""
        own = [int(self._writer.done), self._writer.bytes_written, self._writer.bytes_total]
        done, written, total = sum_over_ranks(own, self._device, self._group)
        return done == self._group.size(), written, total

    def finish(self, keep: int) -> Path:
        """Publishes the checkpoint and removes all but the `keep` newest; waits for the writers if they have not ended.

        Raises `CheckpointError` on every rank when one of them could not write; checkpoints that were there before stay as they were.
        """
        own = self._writer.result()
        shares: list[Written] = [own] * self._group.size()
        dist.gather_object(own, shares if self._group.rank() == 0 else None, group_dst=0, group=self._group)
        published = on_rank_zero(f"checkpoint {self.path} could not be written", lambda: self._publish(shares), self._group)
        self.warnings = published + on_rank_zero("", lambda: self._tidy(keep), self._group)
        return self.path

    def _tidy(self, keep: int) -> list[str]:
        """On rank 0. The checkpoint is saved: nothing that fails now ends the run."""
        warnings = []
        for action in (lambda: write_latest(self._root, self.progress.step), lambda: retain(self._root, keep, self.progress.step)):
            try:
                warnings += action() or []
            except OSError as error:
                warnings.append(f"checkpoint {self.path} is saved, but `latest` or older ones could not be changed: {reason_of(error)}")
        return warnings

    def _publish(self, shares: list[Written]) -> list[str]:
        """On rank 0; returns warnings. Whatever it raises, the half-written folder is gone."""
        try:
            self._complete(shares)
            return publish(self._partial, self.path)
        except Exception as error:
            shutil.rmtree(self._partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise CheckpointError(self._not_written(f"rank 0: {reason_of(error)}")) from error
            raise

    def _complete(self, shares: list[Written]) -> None:
        errors = [f"rank {rank}: {share.error}" for rank, share in enumerate(shares) if share.error is not None]
        if errors:
            raise CheckpointError(self._not_written("; ".join(errors[:4]) + (f" and {len(errors) - 4} more" if errors[4:] else "")))
        self._writer.write_metadata(self._partial, [share.items for share in shares])
        files = {name: entry for share in shares for name, entry in share.files.items()}
        for path in self._partial.iterdir():
            if path.name not in files:
                sync(path)
                files[path.name] = FileEntry(path.stat().st_size, file_sha256(path))
        write_manifest(self._partial, self._manifest(files))

    def _manifest(self, files: dict[str, FileEntry]) -> Manifest:
        return Manifest(
            step=self.progress.step,
            tokens=self.progress.tokens,
            guards=self.progress.guards,
            world_size=self._group.size(),
            config=self._config,
            versions=versions(),
            files=files,
            data=self._data,
        )

    def _not_written(self, reason: str) -> str:
        free = shutil.disk_usage(self._root).free / 2**30
        return f"checkpoint {self.path} could not be written ({free:.1f} GiB free there): {reason}. The checkpoints before are untouched"


def save_checkpoint(
    root: Path, engine: Engine, progress: Progress, config: dict[str, Any], keep: int, data: dict[str, Any] | None = None
) -> Path:
    """Saves model, optimizer, position and random number generators as `root/step_N`, and returns when that is published. Collective.

    Arguments and errors: `PendingSave`.
    """
    return PendingSave(root, engine, progress, config, copy=False, data=data).finish(keep)
