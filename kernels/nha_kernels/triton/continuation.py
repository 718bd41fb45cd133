"""The fused operator on tokens that already lie behind their memory's window."""

import torch
from torch import Tensor

from .attention import _Options, fused_attention
from .device import on_device_of_first_argument


@on_device_of_first_argument
def fused_continuation(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    log_gates: Tensor,
    slots: Tensor,
    *,
    held: int,
    window: int,
    rope: Tensor | None,
    rope_attention_factor: float,
    scale: float,
    empty_slots: str,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Arguments as `continue_attention`, which has checked that the kernels serve them: q [B, T, HQ, K], all else [B, held + T, ...]."""
    options = _Options(
        held=held,
        window=window,
        scale=scale,
        empty_slots=empty_slots,
        rope_attention_factor=rope_attention_factor,
    )
    start = None
    if cu_seqlens is not None:
        start = _document_starts(cu_seqlens, q.shape[1], held)
        slots = torch.where(cu_seqlens[1] > 0, slots, 0.0)  # the memory's document may have no token here
    out, _ = fused_attention(q, keys, values, log_gates, slots, start, rope, options)
    return out


def _document_starts(cu_seqlens: Tensor, num_tokens: int, held: int) -> Tensor:
    """Row [1, T] at which each query's document begins. The first document begins with the first row of the memory."""
    boundaries = cu_seqlens.to(torch.int64)
    documents = torch.searchsorted(boundaries[1:], torch.arange(num_tokens, device=boundaries.device), right=True)
    return torch.where(documents == 0, 0, boundaries[documents] + held).to(torch.int32)[None]
