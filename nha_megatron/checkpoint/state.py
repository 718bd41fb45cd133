"""What a checkpoint holds besides model and optimizer: the run's position and the random number generators."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

_KEY = "rng_state"
_CUDA_BYTES = 16


@dataclass
class Progress:
    """How far a run has come: `step` updates done, `tokens` consumed by them, counted in the loss or not.

    `guards`: plain data, what the guards remember of the losses so far (training/guards.py). Replaced, never changed in place.
    """

    step: int = 0
    tokens: int = 0
    guards: dict[str, Any] = field(default_factory=dict)


def rng_for_saving(device: torch.device, group: dist.ProcessGroup) -> ShardedTensor:
    """Row `rank` of a [world, bytes] tensor: the state of this rank's CPU generator, then of its CUDA generator (zeros without one)."""
    state = _rng_state(device)
    return ShardedTensor.from_rank_offsets(_KEY, state[None], (0, group.rank(), group.size()))


def rng_for_loading(saved_world_size: int, device: torch.device, group: dist.ProcessGroup) -> ShardedTensor:
    """The whole [saved world, bytes] tensor, read by every rank: at another world size its rows have no owner."""
    rows = torch.empty(saved_world_size, _rng_state(device).numel(), dtype=torch.uint8)
    return ShardedTensor.from_rank_offsets(_KEY, rows, replica_id=group.rank())


def restore_rng(rows: torch.Tensor, device: torch.device, group: dist.ProcessGroup) -> None:
    """Continues this rank's generators where they were saved; with another number of ranks they stay as seeded.

    Nothing in training draws from them today (no dropout, the data order is a pure function), so a resumed run is exact
    at another layout too.
    """
    if rows.shape[0] != group.size():
        return
    state = rows[group.rank()].clone()
    torch.set_rng_state(state[:-_CUDA_BYTES])
    if device.type == "cuda" and state[-_CUDA_BYTES:].any():
        torch.cuda.set_rng_state(state[-_CUDA_BYTES:].clone(), device)


def _rng_state(device: torch.device) -> torch.Tensor:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.zeros(_CUDA_BYTES, dtype=torch.uint8)
    assert cuda.numel() == _CUDA_BYTES, f"the CUDA generator has {cuda.numel()} bytes of state"
    return torch.cat([torch.get_rng_state(), cuda])
