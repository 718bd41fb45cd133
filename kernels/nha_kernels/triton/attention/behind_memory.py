"""The `triton` backend of continuations: tokens that already lie behind their memory's window."""

import torch
from torch import Tensor

from ...continuation import ContinuedTokens, continue_apart
from ...options import AttentionOptions
from ..device import on_device_of_first_argument
from ..dispatch import attends_by_library
from .fused import fused_attention


@on_device_of_first_argument
def triton_continuation(q: Tensor, tokens: ContinuedTokens, options: AttentionOptions, cu_seqlens: Tensor | None) -> Tensor:
    """Arguments as `continue_attention`; dispatch has checked that the kernels serve them."""
    if attends_by_library(q, tokens.values, tokens.window):
        return continue_apart(q, tokens, options, cu_seqlens, "triton")
    slots, start = tokens.slots, None
    if cu_seqlens is not None:
        start = _document_starts(cu_seqlens, q.shape[1], tokens.held)
        slots = torch.where(cu_seqlens[1] > 0, slots, 0.0)  # the memory's document may have no token here
    out, _ = fused_attention(q, tokens.keys, tokens.values, tokens.log_gates, slots, start, tokens.held, options)
    return out


def _document_starts(cu_seqlens: Tensor, num_tokens: int, held: int) -> Tensor:
    """Row [1, T] at which each query's document begins. The first document begins with the first row of the memory."""
    boundaries = cu_seqlens.to(torch.int64)
    documents = torch.searchsorted(boundaries[1:], torch.arange(num_tokens, device=boundaries.device), right=True)
    return torch.where(documents == 0, 0, boundaries[documents] + held).to(torch.int32)[None]
