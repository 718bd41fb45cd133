"""Which calls the forward for Hopper GPUs serves; all others go by the kernels of `attention/`. Needs no triton to be imported."""

import functools
import importlib.metadata

import torch
from torch import Tensor

from ...options import AttentionOptions
from ..architectures import capability_of

# Gluon's interface is experimental, and a wrong barrier hangs: only what was checked on a GPU runs.
CHECKED_TRITON = ("3.6.0",)
CHECKED_CAPABILITIES = ((9, 0),)
HEADS = 4  # query heads of a tile


def refusal_of_tensors(q: Tensor, v: Tensor, g: Tensor, window: int | None) -> str | None:
    """Why it does not serve calls like this one, whatever its options; None if it does."""
    capability = capability_of(q.device)
    if capability not in CHECKED_CAPABILITIES:
        return "it was checked on compute capability 9.0 only"
    if triton_version() not in CHECKED_TRITON:
        return f"it was checked with triton {', '.join(CHECKED_TRITON)} only, this is {triton_version()}"
    if q.dtype != torch.bfloat16 or (q.shape[3], v.shape[3], g.shape[3], window) != (128, 128, 64, 64):
        return "it takes bfloat16, K = V = 128, M = 64 and W = 64"
    group = q.shape[2] // g.shape[2]
    if group % HEADS:
        return f"it takes a multiple of {HEADS} query heads to a KV head, given {group}"
    return None


def refusal(q: Tensor, k: Tensor, v: Tensor, g: Tensor, options: AttentionOptions, *, continues: bool) -> str | None:
    """Why it does not serve a call; None if it does.

    Args:
        continues: whether there is a memory before the tokens, or documents among them.
    """
    reason = refusal_of_tensors(q, v, g, options.window)
    if reason is not None:
        return reason
    if continues:
        return "it takes neither a memory nor documents"
    if options.empty_slots == "weight":
        return "it takes the conventions attend and mask"
    if options.rope is None or options.rope.shape[0] != q.shape[3] // 2:
        return "it rotates all channels"
    if any(x.data_ptr() % 16 for x in (q, k, v)):
        return "tensors must begin at a multiple of 16 bytes"
    return None


@functools.cache
def triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
