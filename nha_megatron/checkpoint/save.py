"""Writes a checkpoint: all ranks write aside, then rank 0 publishes it in one rename.

    .step_N.partial/  <- Megatron's torch_dist files (all ranks)
                      <- every file made durable and hashed (a share each)
                      <- manifest.json                     rank 0
    step_N/           <- rename                            rank 0
    latest            <- replaced                          rank 0
    old checkpoints   <- removed beyond `keep`             rank 0

A crash at any point leaves either the checkpoint before, or this one, complete.
"""

from __future__ import annotations

import queue
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint import CheckpointException

from nha_megatron.checkpoint.collective import from_rank_zero, on_rank_zero
from nha_megatron.checkpoint.files import CheckpointError, make_partial, partial_directory, publish, retain, step_directory, write_latest
from nha_megatron.checkpoint.manifest import Manifest, describe_files, versions, write_manifest
from nha_megatron.checkpoint.state import Progress, rng_for_saving
from nha_megatron.engine.base import Engine


def save_checkpoint(root: Path, engine: Engine, progress: Progress, config: dict[str, Any], keep: int) -> Path:
    """Saves model, optimizer, position and random number generators as `root/step_N`; collective over all ranks.

    `config` is the resolved configuration, kept in the manifest. Returns the published folder.
    Raises `CheckpointError` on every rank when writing fails; checkpoints that were there before stay as they were.
    """
    final, partial = step_directory(root, progress.step), partial_directory(root, progress.step)
    on_rank_zero(f"checkpoint {final} cannot be written", lambda: make_partial(partial))
    state = engine.sharded_state_dict(is_loading=False)
    assert "rng_state" not in state
    state["rng_state"] = rng_for_saving(engine.device)
    _report_writes_in_this_process()
    try:
        dist_checkpointing.save(state, str(partial))
    except CheckpointException as error:  # of torch; raised on every rank, with the failures known to rank 0
        failures = from_rank_zero([f"rank {rank}: {_reason(failure)}" for rank, (failure, _) in error.failures.items()])
        raise CheckpointError(_not_written(final, "; ".join(failures))) from error
    except (CheckpointingException, OSError, RuntimeError) as error:  # of Megatron, of the disk, of torch's file writer
        raise CheckpointError(_not_written(final, str(error))) from error
    files = describe_files(partial, dist.group.WORLD)
    manifest = Manifest(
        step=progress.step, tokens=progress.tokens, world_size=dist.get_world_size(), config=config, versions=versions(), files=files
    )

    def finish() -> None:
        write_manifest(partial, manifest)
        publish(partial, final)
        write_latest(root, progress.step)
        retain(root, keep)

    on_rank_zero(f"checkpoint {final} could not be published", finish)
    return final


def _not_written(final: Path, reason: str) -> str:
    # torch's writer hides a full disk behind an internal message, so the free space is told with it.
    free = shutil.disk_usage(final.parent).free / 2**30
    return f"checkpoint {final} could not be written ({free:.1f} GiB free there): {reason}. The checkpoints before are untouched"


def _reason(failure: BaseException) -> str:
    # Megatron's writer wraps what its worker raised.
    return " ".join(str(failure.__cause__ or failure).split())


def _report_writes_in_this_process() -> None:
    """Gives Megatron's writer a plain queue for its results, new for each save.

    By itself it starts a server process on every rank for that queue, for the sake of background saves (megatron-core
    0.16.1 and 0.19.2). It costs seconds and 250 MB a rank, outlives a killed rank, and needs a `__main__` guard in every
    script that saves. A save that the rank waits for reports to the rank itself.
    """
    filesystem_async._results_queue = queue.Queue()
