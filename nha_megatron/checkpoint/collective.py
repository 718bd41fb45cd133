"""Steps that one rank does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from nha_megatron.checkpoint.files import CheckpointError


def on_rank_zero(failure: str, action: Callable[[], Any]) -> None:
    """Runs `action` on rank 0; all ranks return when it is done, or raise `CheckpointError` with `failure` and the reason."""
    outcome: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            outcome = [f"{failure}: {error.strerror}: {error.filename}" if error.filename else f"{failure}: {error}"]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise CheckpointError(outcome[0])


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value on every rank. Network file systems show new names at different times, so one rank looks for all."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
