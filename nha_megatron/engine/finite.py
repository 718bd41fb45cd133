"""Whether numbers are finite on all ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def finite_on_all_ranks(tensors: Iterable[Tensor], device: torch.device, group: dist.ProcessGroup) -> bool:
    """Whether every element of the tensors of every rank of `group` is finite: the same answer on all. Collective over `group`."""
    faulty = torch.zeros((), device=device)
    for tensor in tensors:
        faulty += tensor.isfinite().logical_not().any()
    dist.all_reduce(faulty, group=group)
    return faulty.item() == 0
