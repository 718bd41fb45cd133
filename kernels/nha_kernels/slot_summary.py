"""What a run of tokens does to the slots, whatever they held before: the message of context parallelism."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import choose_backend
from .conventions import accumulation_dtype, clamp_log_gates, write_strength


class SummaryFunctions(NamedTuple):
    """What a backend provides."""

    summary: Callable[..., tuple[Tensor, Tensor, Tensor]]  # `slot_summary`
    write: Callable[..., tuple[Tensor, ...]]  # `summarise_slots`
    add_gradients: Callable[..., None]  # `add_summary_gradients`


def slot_summary(k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Summarise writing all given tokens in order: slots_out = exp(log_decay) * slots_in + update.

    CUDA tensors go through kernels where `triton/dispatch.py` lets them: the same result, and the same bits in every run.

    Args:
        k, v, g: [B, T, H, K], [B, T, H, V], [B, T, H, M] as `nha_attention` takes them; T may be 0.

    Returns:
        log_decay [B, H, M], update_keys [B, H, M, K], update_values [B, H, M, V] in float32 (float64 for float64). Differentiable.
    """
    return _functions_for(k, v, g).summary(k, v, g)


def summarise_slots(k: Tensor, v: Tensor, g: Tensor, out: Tensor) -> tuple[Tensor, ...]:
    """Writes the summary to `out` [B, H, M, K + V + 1] (contiguous): update of keys, update of values, log-decay.

    Not differentiable: its derivative is `add_summary_gradients`, which wants what is returned here.
    """
    with torch.no_grad():
        return _functions_for(k, v, g).write(k, v, g, out)


def add_summary_gradients(
    k: Tensor, v: Tensor, g: Tensor, kept: tuple[Tensor, ...], d_summary: Tensor, dk: Tensor, dv: Tensor, dg: Tensor
) -> None:
    """Adds the gradients of k, v and g to dk, dv and dg in place.

    Args:
        k, v, g: as given to `summarise_slots`. kept: what it returned.
        d_summary: gradient of what it wrote.
        dk, dv, dg: [B, T, H, .] of the dtypes of k, v and g; channels without gaps.
    """
    _functions_for(k, v, g).add_gradients(k, v, g, kept, d_summary, dk, dv, dg)


def _functions_for(k: Tensor, v: Tensor, g: Tensor) -> SummaryFunctions:
    chosen = choose_backend("summary", "auto", k, v, g)
    assert chosen is not None, "the torch backend has them"
    return chosen.load()


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


def _write_in_pytorch(k: Tensor, v: Tensor, g: Tensor, out: Tensor) -> tuple[Tensor, ...]:
    log_decay, *updates = summary_in_pytorch(k, v, g)
    torch.cat([*updates, log_decay.unsqueeze(-1)], dim=-1, out=out)
    return ()


def _add_gradients_in_pytorch(
    k: Tensor, v: Tensor, g: Tensor, kept: tuple[Tensor, ...], d_summary: Tensor, dk: Tensor, dv: Tensor, dg: Tensor
) -> None:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (k, v, g)]
        outputs = summary_in_pytorch(*leaves)
    d_keys, d_values, d_log_decay = d_summary.split([k.shape[-1], v.shape[-1], 1], dim=-1)
    gradients = torch.autograd.grad(outputs, leaves, (d_log_decay.squeeze(-1), d_keys, d_values))
    for total, gradient in zip((dk, dv, dg), gradients, strict=True):
        total += gradient


IN_PYTORCH = SummaryFunctions(summary_in_pytorch, _write_in_pytorch, _add_gradients_in_pytorch)
