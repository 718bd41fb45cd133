"""PyTorch's own flash kernel over the window, with its log-sum-exp, and its backward from the merged output and log-sum-exp.

The kernel's backward needs only out, its log-sum-exp and d_out: given those of the softmax over slots and window together, the gradients
that it returns are exactly those of the window's part. It is deterministic under `torch.use_deterministic_algorithms`.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Bounds(NamedTuple):
    """Where sequences begin among the flattened queries and extended rows: int32 [N + 1] each. Rows that belong to no query's document
    are a sequence without queries."""

    queries: Tensor
    rows: Tensor


def sequence_bounds(batch: int, num_queries: int, held: int, begin: Tensor, cu_seqlens: Tensor | None) -> Bounds:
    """`begin` [B]: the first row that the memory really holds. With documents, B = 1."""
    begin = begin.to(torch.int64)
    zero = begin.new_zeros(1)
    if cu_seqlens is not None:
        queries = cu_seqlens.to(device=begin.device, dtype=torch.int64)
        rows = torch.cat([zero, begin, held + queries[1:]])
        return Bounds(torch.cat([zero, queries]).to(torch.int32), rows.to(torch.int32))
    row = torch.arange(batch, device=begin.device)
    rows = torch.stack([row * (held + num_queries) + begin, (row + 1) * (held + num_queries)], dim=1).flatten()
    queries = torch.stack([row * num_queries, (row + 1) * num_queries], dim=1).flatten()
    return Bounds(torch.cat([zero, queries]).to(torch.int32), torch.cat([zero, rows]).to(torch.int32))


def flash_forward(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, window: int | None, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, T, HQ, K], k [B, E, H, K], v [B, E, H, V], rotated already; the last query sees the last row. Output and lse [B, T, HQ]."""
    left = -1 if window is None else window - 1
    arguments = (x.flatten(0, 1) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *arguments, *bounds, q.shape[1], k.shape[1], 0.0, True, False, scale=scale, window_size_left=left, window_size_right=0
    )
    return out.view(*q.shape[:3], v.shape[3]), lse.t().contiguous().view(q.shape[:3])


def flash_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Bounds, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from the merged output and log-sum-exp [B, T, HQ]."""
    left = -1 if window is None else window - 1
    tensors = [x.flatten(0, 1) for x in (d_out, q, k, v, out)]
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        *tensors,
        lse.flatten(0, 1).t().contiguous(),
        *bounds,
        q.shape[1],
        k.shape[1],
        0.0,
        True,
        no_dropout,
        no_dropout,
        scale=scale,
        window_size_left=left,
        window_size_right=0,
    )
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)
