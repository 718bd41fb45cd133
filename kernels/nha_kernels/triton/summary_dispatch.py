"""Which slot summaries the kernels of summary.py compute. Needs no triton to be imported."""

import torch
from torch import Tensor

from .dispatch import refusal_of_device, refusal_of_sizes


def refusal_of_summary(k: Tensor, v: Tensor, g: Tensor) -> str | None:
    """Why the kernels do not serve a call; None if they do."""
    dims, slots = (k.shape[3], v.shape[3]), g.shape[3]
    reason = refusal_of_device(k)
    if reason is not None:
        return reason
    if k.dtype != v.dtype or k.dtype not in (torch.bfloat16, torch.float16, torch.float32) or g.dtype != torch.float32:
        return f"the kernels take bfloat16, float16 or float32 with log-gates in float32, not {k.dtype}, {v.dtype}, {g.dtype}"
    reason = refusal_of_sizes(dims, slots)
    if reason is not None:
        return reason
    if k.shape[0] == 0 or k.shape[1] == 0:
        return "there are no tokens"
    return None
