"""The memory of a sequence: what training across ranks, packed documents, chunked prefill and decoding continue from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Memory:
    """State after `length` tokens of each sequence of a batch.

        tokens    0 ........ length - W - 1 | length - W ........ length - 1
        held in        the M slots          |   the window, exactly

    Attributes:
        slot_keys, slot_values: [B, H, M, K] and [B, H, M, V], float32 (float64 for float64 inputs). Tokens that have left the window.
        slot_log_decay: [B, H, M], same dtype. Sum of the log-gates written so far; 1 - exp of it is the mass that a slot holds.
        window_keys, window_values, window_log_gates: [B, P, H, K | V | M]. Keys before RoPE, values after activation. The newest token
            is the last row. Row b holds min(W, length[b]) tokens; rows further left exist only to keep the batch rectangular and
            are never read. P <= W.
        length: [B] int64, tokens seen.
        window: the W that the memory was made with, None for full attention.
    """

    slot_keys: Tensor
    slot_values: Tensor
    slot_log_decay: Tensor
    window_keys: Tensor
    window_values: Tensor
    window_log_gates: Tensor
    length: Tensor
    window: int | None

    @classmethod
    def empty(
        cls,
        batch: int,
        num_kv_heads: int,
        num_slots: int,
        key_dim: int,
        value_dim: int,
        window: int | None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Memory:
        """The start of a sequence. `dtype` is that of keys and values; slots are float64 for float64 and float32 otherwise."""
        slot_dtype = torch.float64 if dtype == torch.float64 else torch.float32

        def zeros(*shape: int, of: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=of, device=device)

        return cls(
            slot_keys=zeros(batch, num_kv_heads, num_slots, key_dim, of=slot_dtype),
            slot_values=zeros(batch, num_kv_heads, num_slots, value_dim, of=slot_dtype),
            slot_log_decay=zeros(batch, num_kv_heads, num_slots, of=slot_dtype),
            window_keys=zeros(batch, 0, num_kv_heads, key_dim, of=dtype),
            window_values=zeros(batch, 0, num_kv_heads, value_dim, of=dtype),
            window_log_gates=zeros(batch, 0, num_kv_heads, num_slots, of=slot_dtype),
            length=zeros(batch, of=torch.int64),
            window=window,
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Memory:
        """A memory with `function` applied to every tensor; each has the batch as its first axis."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: function(value) for name, value in fields.items() if isinstance(value, Tensor)})

    def aligned(self) -> Memory:
        """This memory with the newest token in the last row of the window, as `nha_attention` reads it."""
        return self

    def detach(self) -> Memory:
        return self.map(Tensor.detach)

    def select_rows(self, rows: Tensor) -> Memory:
        """Sequences `rows` [N] of the batch, in that order (beam search, batch compaction)."""
        return self.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    @property
    def num_bytes(self) -> int:
        tensors = (getattr(self, field.name) for field in dataclasses.fields(self))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))

    def check_matches(self, *, batch: int, num_kv_heads: int, num_slots: int, key_dim: int, value_dim: int, window: int | None) -> None:
        """Raises ValueError when the memory belongs to another batch, layer shape or window."""
        if self.window != window:
            raise ValueError(f"the memory was made with window={self.window}, this call has window={window}: use one window for a sequence")
        given = (*self.slot_keys.shape, self.slot_values.shape[-1])
        wanted = (batch, num_kv_heads, num_slots, key_dim, value_dim)
        if given != wanted:
            raise ValueError(f"the memory has (B, H, M, K, V) = {given}, q, k, v and g have {wanted}")
