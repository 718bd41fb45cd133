"""PyTorch's own flash kernel over the window, with its log-sum-exp, and its backward from the merged output and log-sum-exp.

A flash kernel's backward needs only out, its log-sum-exp and d_out: given those of the softmax over slots and window together, the
gradients that it returns are exactly those of the window's part. It is deterministic under `torch.use_deterministic_algorithms`.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Bounds(NamedTuple):
    """Where sequences begin among the flattened queries and extended rows: int32 [N + 1] each. Rows that belong to no query's document
    are a sequence without queries."""

    queries: Tensor
    rows: Tensor


class WindowOutput(NamedTuple):
    """What a library's forward returns."""

    out: Tensor  # [B, T, HQ, V]
    lse: Tensor  # [B, T, HQ], natural logarithm, contiguous
    more: tuple[Tensor, ...] = ()  # what its backward wants besides


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


def left_of(window: int | None) -> int:
    """The `window_size_left` of flash kernels: tokens before the current one, -1 for all."""
    return -1 if window is None else window - 1


def forward(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds | None, window: int | None, scale: float) -> WindowOutput:
    """q [B, T, HQ, K], k [B, E, H, K], v [B, E, H, V], rotated already; the last query sees the last row.

    Without `bounds` each row of the batch is one document, E = T.
    """
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        *(x.flatten(0, 1) for x in (q, k, v)),
        *(bounds or _rows_of_the_batch(q)),
        q.shape[1],
        k.shape[1],
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=left_of(window),
        window_size_right=0,
    )
    return WindowOutput(out.view(*q.shape[:3], v.shape[3]), lse.t().contiguous().view(q.shape[:3]))


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    result: WindowOutput,
    bounds: Bounds | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v. `result` holds the merged output and log-sum-exp."""
    tensors = [x.flatten(0, 1) for x in (d_out, q, k, v, result.out)]
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        *tensors,
        result.lse.flatten(0, 1).t().contiguous(),
        *(bounds or _rows_of_the_batch(q)),
        q.shape[1],
        k.shape[1],
        0.0,
        True,
        no_dropout,
        no_dropout,
        scale=scale,
        window_size_left=left_of(window),
        window_size_right=0,
    )
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


def _rows_of_the_batch(q: Tensor) -> Bounds:
    edges = torch.arange(0, (q.shape[0] + 1) * q.shape[1], q.shape[1], dtype=torch.int32, device=q.device)
    return Bounds(edges, edges)
