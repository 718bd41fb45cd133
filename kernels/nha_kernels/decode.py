"""Decoding: a few new tokens for every sequence of a batch, the memory updated in place."""

import dataclasses

import torch
from torch import Tensor

from .conventions import EmptySlots
from .memory import Memory
from .operator import nha_attention

_MOST_TOKENS = 8


def decode_memory(memory: Memory) -> Memory:
    """A copy whose window has room for W rows in every sequence, so that its shapes never change while decoding.

    Raises:
        ValueError: for a full window, which has no fixed size.
    """
    if memory.window is None:
        raise ValueError("window=None (full attention) has no memory of fixed size: decode with a growing memory through nha_attention")
    missing = memory.window - memory.window_keys.shape[1]
    copy = memory.detach().map(torch.clone)

    def padded(rows: Tensor) -> Tensor:
        return torch.cat([rows.new_zeros(rows.shape[0], missing, *rows.shape[2:]), rows], dim=1)

    windows = {field.name: padded(getattr(copy, field.name)) for field in dataclasses.fields(copy) if field.name.startswith("window_")}
    return dataclasses.replace(copy, **windows)


@torch.no_grad()
def nha_decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    memory: Memory,
    *,
    rope: Tensor | None = None,
    rope_attention_factor: float = 1.0,
    scale: float | None = None,
    empty_slots: EmptySlots = "attend",
    backend: str = "auto",
) -> Tensor:
    """Attend from T new tokens of every sequence, and update `memory` in place.

    Sequences of the batch may have different lengths. Nothing waits for the device and no shape depends on a length, so a step can be
    captured in a CUDA graph.

    Args:
        q, k, v, g: [B, T, ...] as `nha_attention` takes them, T from 1 to 8.
        memory: from `decode_memory`.

    Returns:
        Output [B, T, HQ, V].

    Raises:
        ValueError: more than 8 tokens, or a memory without room for its window.
    """
    if not 1 <= q.shape[1] <= _MOST_TOKENS:
        raise ValueError(f"a decode step takes 1 to {_MOST_TOKENS} tokens, given {q.shape[1]}: use nha_attention for more")
    if memory.window is None or memory.window_keys.shape[1] != memory.window:
        raise ValueError(
            f"the memory holds {memory.window_keys.shape[1]} rows of a window of {memory.window}: pass it through decode_memory"
        )
    out, new = nha_attention(
        q,
        k,
        v,
        g,
        window=memory.window,
        rope=rope,
        rope_attention_factor=rope_attention_factor,
        scale=scale,
        empty_slots=empty_slots,
        memory=memory,
        return_memory=True,
        backend=backend,
    )
    for field in dataclasses.fields(Memory):
        if field.name != "window":
            getattr(memory, field.name).copy_(getattr(new, field.name))
    return out
