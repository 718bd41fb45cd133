"""Whether numbers are finite on all ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def finite_on_all_ranks(tensors: Iterable[Tensor], device: torch.device) -> bool:
    """Whether every element of every rank's tensors is finite: the same answer on all ranks. Collective over the world."""
    faulty = torch.zeros((), device=device)
    for tensor in tensors:
        faulty += tensor.isfinite().logical_not().any()
    dist.all_reduce(faulty)
    return faulty.item() == 0
