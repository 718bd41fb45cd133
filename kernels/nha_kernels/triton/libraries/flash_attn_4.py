"""The package flash-attn-4 (`flash_attn.cute`), for compute capability 9.0 and newer: it compiles its kernels at their first use.

Only its forward and backward entry points take a log-sum-exp that covers more than the window; dispatch has checked that this version has
them with the arguments named here.
"""

from typing import Any

import torch
from flash_attn.cute import interface
from torch import Tensor

from .adapter import Bounds, WindowOutput, left_of

_COMMON = {"q", "k", "v", "softmax_scale", "causal", "window_size_left", "window_size_right"}
_COMMON |= {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
FORWARD_ARGUMENTS = frozenset(_COMMON | {"return_lse"})
BACKWARD_ARGUMENTS = frozenset(_COMMON | {"out", "dout", "lse", "deterministic", "dk", "dv"})


def forward(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds | None, window: int | None, scale: float) -> WindowOutput:
    """As torch_flash.forward."""
    if bounds is None:
        out, lse, *_ = interface._flash_attn_fwd(q=q, k=k, v=v, return_lse=True, **_mask(window, scale))
        return WindowOutput(out, lse.transpose(1, 2).contiguous())
    flat = {name: x.flatten(0, 1) for name, x in (("q", q), ("k", k), ("v", v))}
    out, lse, *_ = interface._flash_attn_fwd(**flat, return_lse=True, **_mask(window, scale), **_edges(q, k, bounds))
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
    """As torch_flash.backward."""
    tensors = {"q": q, "k": k, "v": v, "out": result.out, "dout": d_out}
    common = {**_mask(window, scale), "deterministic": torch.are_deterministic_algorithms_enabled()}
    if bounds is None:
        return interface._flash_attn_bwd(**tensors, lse=result.lse.transpose(1, 2).contiguous(), **common)
    flat = {name: x.flatten(0, 1) for name, x in tensors.items()}
    dq, dk, dv = interface._flash_attn_bwd(
        **flat,
        lse=result.lse.flatten(0, 1).t().contiguous(),
        # Zeros: rows that no query sees may be left as they are.
        dk=torch.zeros_like(flat["k"]),
        dv=torch.zeros_like(flat["v"]),
        **common,
        **_edges(q, k, bounds),
    )
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


def _mask(window: int | None, scale: float) -> dict[str, Any]:
    left = None if window is None else left_of(window)
    return {"softmax_scale": scale, "causal": True, "window_size_left": left, "window_size_right": 0}


def _edges(q: Tensor, k: Tensor, bounds: Bounds) -> dict[str, Any]:
    return {
        "cu_seqlens_q": bounds.queries,
        "cu_seqlens_k": bounds.rows,
        "max_seqlen_q": q.shape[1],
        "max_seqlen_k": k.shape[1],
    }
