"""PyTorch's own flash kernel over the window, with its log-sum-exp, and its backward from the merged output and log-sum-exp.

A flash kernel's backward needs only out, its log-sum-exp and d_out: given those of the softmax over slots and window together, the
gradients that it returns are exactly those of the window's part. It is deterministic under `torch.use_deterministic_algorithms`.
"""

import torch
from torch import Tensor

from .adapter import Bounds, WindowOutput, left_of


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
