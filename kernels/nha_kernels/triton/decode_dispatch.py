"""Which decode steps the fused kernels serve. Needs no triton to be imported."""

import torch
from torch import Tensor

from .dispatch import refusal_of_device, refusal_of_sizes


def refusal_of_decode(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> str | None:
    """Why the kernels do not serve a step; None if they do. Any window, T from 1 to 8."""
    dims, slots, group = (q.shape[3], v.shape[3]), g.shape[3], q.shape[2] // k.shape[2]
    reason = refusal_of_device(q)
    if reason is not None:
        return reason
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernels take bfloat16, float16 and float32, not {q.dtype}"
    reason = refusal_of_sizes(dims, slots)
    if reason is not None:
        return reason
    if group > 8:
        return f"at most 8 query heads share a KV head, given {group}"
    return None
