"""Weights that every tensor rank holds whole must get the same gradient on all of them.

Where a rank sees only part of what such a weight acts on, its tokens under sequence parallelism or its heads, the gradient is a partial
sum until somebody adds it up. If nobody does, the copies drift apart, and no loss shows it soon. So the first step of an engine looks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from nha_megatron.config import OneRankError

# Far above the rounding of sums that ranks take in the same order, far below what a missing sum leaves.
_TOLERANCE = 1e-3


def require_equal_gradients(norms: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Compares the gradient's norm of every such weight over the tensor ranks `group`. Collective over it.

    Raises `OneRankError` naming the weights whose norms differ; norms that are not finite are left to the guards.
    """
    if not norms or group.size() == 1:
        return
    names = sorted(norms)
    own = torch.stack([norms[name].double() for name in names])
    largest, smallest = own.clone(), own.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=group)
    differing = [name for name, differs in zip(names, (largest - smallest > _TOLERANCE * largest).tolist(), strict=True) if differs]
    if differing:
        raise OneRankError(
            f"the tensor ranks have different gradients of {len(differing)} weight(s) that each of them holds whole: "
            f"{', '.join(differing[:4])}{' ...' if len(differing) > 4 else ''}. Their layer kind must sum them: where the weight acts on "
            "this rank's tokens under sequence parallelism, set weight.sequence_parallel = True; where it acts on this rank's heads or "
            "channels, use copy_to_tensor_model_parallel_region(weight, group=tp)"
        )
