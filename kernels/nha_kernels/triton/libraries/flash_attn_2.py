"""The package flash-attn 2.7 and later 2.x, through the functions that its own autograd calls: they take and return the log-sum-exp.

Arguments are passed by the names that 2.7.0 to 2.8.3 publish (flash_attn/flash_attn_interface.py); 2.6 and 3 have others.
"""

from typing import Any

import torch
from flash_attn import flash_attn_interface as interface
from torch import Tensor

from .adapter import Bounds, WindowOutput, left_of


def forward(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds | None, window: int | None, scale: float) -> WindowOutput:
    """As torch_flash.forward."""
    common = {**_mask(window, scale), "return_softmax": False}
    if bounds is None:
        out, lse, *_ = interface._flash_attn_forward(q=q, k=k, v=v, **common)
        return WindowOutput(out, lse.transpose(1, 2).contiguous())
    flat = {name: x.flatten(0, 1) for name, x in (("q", q), ("k", k), ("v", v))}
    out, lse, *_ = interface._flash_attn_varlen_forward(**flat, **_edges(q, k, bounds), **common)
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
    tensors = {"dout": d_out, "q": q, "k": k, "v": v, "out": result.out}
    gradients = {"dq": torch.empty_like(q), "dk": torch.empty_like(k), "dv": torch.empty_like(v)}
    common = {**_mask(window, scale), "deterministic": torch.are_deterministic_algorithms_enabled(), "rng_state": None}
    if bounds is None:
        lse = result.lse.transpose(1, 2).contiguous()
        interface._flash_attn_backward(**tensors, **gradients, softmax_lse=lse, **common)
    else:
        flat = {name: x.flatten(0, 1) for name, x in (tensors | gradients).items()}  # views: the gradients are written through them
        lse = result.lse.flatten(0, 1).t().contiguous()
        interface._flash_attn_varlen_backward(**flat, softmax_lse=lse, **_edges(q, k, bounds), **common)
    return gradients["dq"], gradients["dk"], gradients["dv"]


def _mask(window: int | None, scale: float) -> dict[str, Any]:
    return {
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": True,
        "window_size_left": left_of(window),
        "window_size_right": 0,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def _edges(q: Tensor, k: Tensor, bounds: Bounds) -> dict[str, Any]:
    return {
        "cu_seqlens_q": bounds.queries,
        "cu_seqlens_k": bounds.rows,
        "max_seqlen_q": q.shape[1],
        "max_seqlen_k": k.shape[1],
    }
