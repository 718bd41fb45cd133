"""Decoding: a few new tokens for every sequence of a batch, the memory updated in place."""

import dataclasses

import torch
from torch import Tensor

from .backends import choose_backend
from .conventions import EmptySlots
from .memory import Memory
from .operator import attend_and_remember, check_arguments
from .options import AttentionOptions

_MOST_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class DecodeMemory(Memory):
    """A memory with W window rows for every sequence, used as a ring: a step overwrites the oldest rows instead of moving all of them.

        row      0 ... window_start - 1 | window_start ... W - 1
        holds    newer tokens           | older tokens, or nothing yet

    Attributes:
        window_start: [B] int64, row of the oldest place, which the next token takes. 0: the newest token is the last row, as in a `Memory`.
    """

    window_start: Tensor

    def aligned(self) -> Memory:
        rows = self.window_keys.shape[1]
        index = torch.arange(rows, device=self.window_start.device)
        row = ((self.window_start[:, None] + index) % max(1, rows))[:, :, None, None]
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(Memory)}
        windows = {name: torch.take_along_dim(x, row, dim=1) for name, x in tensors.items() if name.startswith("window_")}
        return Memory(**{**tensors, **windows})


def decode_memory(memory: Memory) -> DecodeMemory:
    """A copy whose window has room for W rows in every sequence, so that its shapes never change while decoding.

    Raises:
        ValueError: for a full window, which has no fixed size.
    """
    if memory.window is None:
        raise ValueError("window=None (full attention) has no memory of fixed size: decode with a growing memory through nha_attention")
    missing = memory.window - memory.window_keys.shape[1]
    copy = memory.aligned().detach().map(lambda x: x.clone(memory_format=torch.contiguous_format))

    def padded(rows: Tensor) -> Tensor:
        return torch.cat([rows.new_zeros(rows.shape[0], missing, *rows.shape[2:]), rows], dim=1)

    fields = {field.name: getattr(copy, field.name) for field in dataclasses.fields(Memory)}
    windows = {name: padded(x) for name, x in fields.items() if name.startswith("window_")}
    return DecodeMemory(**{**fields, **windows}, window_start=torch.zeros_like(copy.length))


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
    captured in a CUDA graph. The result of a sequence does not depend on the others of its batch.

    Args:
        q, k, v, g: [B, T, ...] as `nha_attention` takes them, T from 1 to 8.
        memory: from `decode_memory`. A `Memory` whose window has W rows serves too, but all of them move at every step.
        backend: `auto` takes the fused kernels where they serve the call (`explain_decode_dispatch` says why not), else `nha_attention`;
            otherwise a backend of `nha_attention`, with `triton` the fused kernels or an error.

    Returns:
        Output [B, T, HQ, V].

    Raises:
        ValueError: more than 8 tokens, a memory without room for its window, or what `nha_attention` refuses.
    """
    if not 1 <= q.shape[1] <= _MOST_TOKENS:
        raise ValueError(f"a decode step takes 1 to {_MOST_TOKENS} tokens, given {q.shape[1]}: use nha_attention for more")
    if memory.window is None or memory.window_keys.shape[1] != memory.window:
        raise ValueError(
            f"the memory holds {memory.window_keys.shape[1]} rows of a window of {memory.window}: pass it through decode_memory"
        )
    options = AttentionOptions(memory.window, rope, rope_attention_factor, scale, empty_slots)
    check_arguments(q, k, v, g, options, None, memory)
    chosen = choose_backend("decode", backend, q, k, v, g, memory)
    if chosen is not None:
        return chosen.load()(q, k, v, g, memory, options)
    out, new = attend_and_remember(q, k, v, g, options, memory=memory, backend=backend)
    for field in dataclasses.fields(Memory):
        if field.name != "window":
            getattr(memory, field.name).copy_(getattr(new, field.name))
    if isinstance(memory, DecodeMemory):
        memory.window_start.zero_()
    return out
