"""Tokens that lie behind the memory they continue from, in one buffer: the operator's input after an exchange between ranks.

`nha_attention(memory=...)` takes memory and tokens apart and copies them behind one another. Who writes the buffers himself saves the
copies, and the additions of their gradients.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import choose_backend
from .conventions import clamp_log_gates
from .memory import Memory
from .operator import check_arguments, hybrid_attention
from .options import AttentionOptions


@dataclass(frozen=True)
class ContinuedTokens:
    """
        row      0 ........ P - 1 | P ........ P + T - 1
        holds    memory's window  |  the tokens

    Attributes:
        keys, values, log_gates: [B, P + T, H, K | V | M] as `nha_attention` takes them, P = min(window, length).
        slots: [B, H, M, K + V + 1] slot keys, slot values and log-decay of the memory, float32 (float64 for float64).
        length: tokens of the first document before these, the same for every row of the batch.
        window: W >= 0.
    """

    keys: Tensor
    values: Tensor
    log_gates: Tensor
    slots: Tensor
    length: int
    window: int

    @property
    def held(self) -> int:
        return min(self.window, self.length)

    def apart(self) -> tuple[Tensor, Tensor, Tensor, Memory]:
        """k, v, g and the memory before them, as `nha_attention` takes them. Differentiable."""
        tokens = self.keys.shape[1] - self.held
        (held_keys, k), (held_values, v), (held_gates, g) = (
            x.split([self.held, tokens], dim=1) for x in (self.keys, self.values, self.log_gates)
        )
        slot_keys, slot_values, log_decay = self.slots.split([k.shape[-1], v.shape[-1], 1], dim=-1)
        memory = Memory(
            slot_keys=slot_keys,
            slot_values=slot_values,
            slot_log_decay=log_decay.squeeze(-1),
            window_keys=held_keys,
            window_values=held_values,
            window_log_gates=clamp_log_gates(held_gates),
            length=torch.full((k.shape[0],), self.length, dtype=torch.int64, device=k.device),
            window=self.window,
        )
        return k, v, g, memory


def continue_attention(
    q: Tensor, tokens: ContinuedTokens, options: AttentionOptions, *, cu_seqlens: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """`hybrid_attention` of q [B, T, HQ, K] and tokens with the memory before them, which continues the first document.

    The gradients of `tokens.keys`, `.values`, `.log_gates` and `.slots` are tensors that nothing else holds: who gave these tensors to
    this function alone may write to their gradients.
    """
    if options.window != tokens.window:
        raise ValueError(
            f"the tokens continue a memory with window={tokens.window}, the options have window={options.window}: use one window"
        )
    k, v, g = (x[:, tokens.held :] for x in (tokens.keys, tokens.values, tokens.log_gates))
    chosen = choose_backend("continuation", backend, q, k, v, g, options.window)
    if chosen is None:
        return continue_apart(q, tokens, options, cu_seqlens, backend)
    check_arguments(q, k, v, g, options, cu_seqlens, None)
    return chosen.load()(q, tokens, options, cu_seqlens)


def continue_apart(q: Tensor, tokens: ContinuedTokens, options: AttentionOptions, cu_seqlens: Tensor | None, backend: str) -> Tensor:
    """`continue_attention` through attention, which copies memory and tokens behind one another."""
    k, v, g, memory = tokens.apart()
    return hybrid_attention(q, k, v, g, options, cu_seqlens=cu_seqlens, memory=memory, backend=backend)
