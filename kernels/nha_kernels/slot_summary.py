"""What a run of tokens does to the slots, whatever they held before: the message of context parallelism."""

import torch
from torch import Tensor

from .conventions import accumulation_dtype, clamp_log_gates, write_strength
from .triton.summary_dispatch import refusal_of_summary


def slot_summary(k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Summarise writing all given tokens in order: slots_out = exp(log_decay) * slots_in + update.

    CUDA tensors go through kernels where `triton/summary_dispatch.py` lets them: the same result, and the same bits in every run.

    Args:
        k, v, g: [B, T, H, K], [B, T, H, V], [B, T, H, M] as `nha_attention` takes them; T may be 0.

    Returns:
        log_decay [B, H, M], update_keys [B, H, M, K], update_values [B, H, M, V] in float32 (float64 for float64). Differentiable.
    """
    if refusal_of_summary(k, v, g) is None:
        from .triton.summary import slot_summary_on_gpu

        return slot_summary_on_gpu(k, v, g)
    return summary_in_pytorch(k, v, g)


def summary_in_pytorch(k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`slot_summary` on any device and in float64: what the kernels are compared with."""
    dtype = accumulation_dtype(k.dtype)
    g = clamp_log_gates(g).to(dtype)
    # Decay after each token's write, summed from the end: the sum is itself the exponent, so its rounding only touches terms
    # that are as small as the sum is large.
    from_here = g.flip(1).cumsum(1).flip(1)
    after = torch.cat([from_here[:, 1:], torch.zeros_like(from_here[:, :1])], dim=1) if g.shape[1] else from_here
    weights = (write_strength(g) * torch.exp(after)).permute(0, 2, 3, 1)  # [B, H, M, T]
    return g.sum(1), weights @ k.to(dtype).permute(0, 2, 1, 3), weights @ v.to(dtype).permute(0, 2, 1, 3)
