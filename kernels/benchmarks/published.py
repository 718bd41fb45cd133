"""The published way to run the operator, for bench.py: flash attention over the window, fla's `chunk_gsa` over the slots, then a merge.

It computes less than the operator does: no rotation, and the merge weighs with the window's log-sum-exp alone, because `chunk_gsa` does not
return that of the slots. Heads are not expanded. So its time is a lower bound for the composition.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor


def published_composition(window: int, scale: float) -> Callable[..., Tensor] | None:
    """(q, k, v, g) -> [B, T, HQ, V], differentiable; None where fla-core is not installed."""
    if importlib.util.find_spec("fla") is None:
        return None
    from fla.ops.gsa import chunk_gsa

    def shifted(x: Tensor) -> Tensor:
        """A token enters the slots when it leaves the window; what never leaves is not written."""
        return torch.cat([torch.zeros_like(x[:, :window]), x[:, : x.shape[1] - window]], dim=1)

    def composition(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        tokens = q.shape[1]
        near, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, tokens, tokens, 0.0, True, False, scale=scale, window_size_left=window - 1, window_size_right=0
        )
        gates = shifted(g)
        far, _ = chunk_gsa(q, shifted(k), shifted(v), (-torch.expm1(gates)).to(q.dtype), gates, scale=scale)
        weight = torch.sigmoid(lse).transpose(1, 2)[..., None].to(q.dtype)
        return weight * near + (1 - weight) * far

    return composition
