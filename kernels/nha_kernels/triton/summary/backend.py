"""The `triton` backend of `slot_summary`."""

from typing import Any

import torch
from torch import Tensor

from ...first_order import first_order_only
from ...slot_summary import SummaryFunctions
from .backward import add_summary_gradients_on_gpu
from .forward import summarise_on_gpu


class _Summary(torch.autograd.Function):
    """[B, H, M, K + V + 1]"""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        batch, _, heads, slots = g.shape
        out = k.new_empty(batch, heads, slots, k.shape[-1] + v.shape[-1] + 1, dtype=torch.float32)
        ctx.save_for_backward(k, v, g, *summarise_on_gpu(k, v, g, out))
        return out

    @staticmethod
    @first_order_only("Use CPU tensors or float64, which go through PyTorch")
    def backward(ctx: Any, d_summary: Tensor) -> tuple[Tensor, ...]:
        k, v, g, *kept = ctx.saved_tensors
        gradients = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v, g))
        add_summary_gradients_on_gpu(k, v, g, tuple(kept), d_summary, *gradients)
        return gradients


def _differentiable_summary(k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    update_keys, update_values, log_decay = _Summary.apply(k, v, g).split([k.shape[-1], v.shape[-1], 1], dim=-1)
    return log_decay.squeeze(-1), update_keys, update_values


ON_GPU = SummaryFunctions(_differentiable_summary, summarise_on_gpu, add_summary_gradients_on_gpu)
