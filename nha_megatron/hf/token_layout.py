"""Batches with padding or packed documents: what mask and positions say, and the operator over such a batch, exactly.

Padding is as if it were not there. Packed documents see nothing of each other.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nha_kernels import Memory, nha_attention


class TokenLayout(NamedTuple):
    """Where the tokens of each sequence are in the batch. Both None: every row is one sequence without padding."""

    real: Tensor | None = None  # bool [B, T]: False is padding, which is treated as if it were not there
    cu_seqlens: Tensor | None = None  # int32 [N + 1]: document boundaries in the flattened batch


def token_layout(shape: torch.Size, attention_mask: Tensor | None, position_ids: Tensor | None, past: int) -> TokenLayout:
    """What mask and positions say about [B, T] new tokens after `past` positions.

    Raises:
        ValueError: they describe something that this model cannot compute exactly.
    """
    batch, length = shape
    real = None
    if attention_mask is not None:
        if attention_mask.shape != (batch, past + length):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: this model takes one entry per token, "
                f"({batch}, {past + length}) for {past} cached and {length} new positions"
            )
        real = attention_mask[:, past:].bool()
        real = None if bool(real.all()) else real
    if position_ids is None or length < 2:
        return TokenLayout(real)
    step = position_ids.diff(dim=-1)
    regular = step == 1
    if real is not None:  # positions of padding mean nothing
        regular = regular | ~(real[:, 1:] & real[:, :-1])
    if bool(regular.all()):
        return TokenLayout(real)
    if real is not None or past or position_ids.shape != (batch, length) or not bool((regular | (position_ids[:, 1:] == 0)).all()):
        raise ValueError(
            "position_ids must count up by one, because this model uses distances between tokens only. Packed documents, which start "
            f"again at 0, need positions of shape ({batch}, {length}) and neither padding nor a cache"
        )
    start = torch.ones_like(position_ids, dtype=torch.bool)
    start[:, 1:] = ~regular
    end = torch.tensor([start.numel()], device=start.device)
    return TokenLayout(cu_seqlens=torch.cat([start.flatten().nonzero().squeeze(1), end]).int())


def attend(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, layout: TokenLayout, memory: Memory | None, return_memory: bool, **settings: Any
) -> tuple[Tensor, Memory | None]:
    """`nha_attention` over a batch with padding or packed documents. Outputs at padding are 0."""
    tokens = (q, k, v, g)
    if layout.cu_seqlens is not None:
        flat = (x.flatten(0, 1)[None] for x in tokens)
        return nha_attention(*flat, cu_seqlens=layout.cu_seqlens, **settings).view(*q.shape[:3], v.shape[-1]), None
    if layout.real is None:
        if return_memory or memory is not None:
            return nha_attention(*tokens, memory=memory, return_memory=True, **settings)
        return nha_attention(*tokens, **settings), None
    if return_memory or memory is not None:
        return _attend_row_groups(tokens, layout.real, memory, **settings)
    # Attention is causal and depends on distances only, so tokens moved in front of the padding never see it.
    order = torch.argsort(~layout.real, dim=1, stable=True)
    moved = (torch.take_along_dim(x, order[..., None, None], dim=1) for x in tokens)
    out = torch.take_along_dim(nha_attention(*moved, **settings), torch.argsort(order, dim=1)[..., None, None], dim=1)
    return out.masked_fill(~layout.real[..., None, None], 0), None


def _attend_row_groups(tokens: tuple[Tensor, ...], real: Tensor, memory: Memory | None, **settings: Any) -> tuple[Tensor, Memory]:
    """Rows with equally many tokens run together, without their padding, each from its own memory."""
    q, k, v, g = tokens
    batch, _, kv_heads, key_dim = k.shape
    if memory is None:
        size = (batch, kv_heads, g.shape[-1], key_dim, v.shape[-1], settings["window"])
        memory = Memory.empty(*size, dtype=k.dtype, device=k.device)
    out = v.new_zeros(*q.shape[:3], v.shape[-1])
    counts = real.sum(dim=1)
    rows_of_groups, memories = [], []
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero().squeeze(1)
        group_memory = memory.select_rows(rows)
        if count > 0:
            columns = real[rows].nonzero()[:, 1].view(-1, count)
            place = (rows[:, None], columns)
            result, group_memory = nha_attention(*(x[place] for x in tokens), memory=group_memory, return_memory=True, **settings)
            out = out.index_put(place, result)
        rows_of_groups.append(rows)
        memories.append(group_memory)
    return out, _join_rows(memories).select_rows(torch.argsort(torch.cat(rows_of_groups)))


def _join_rows(memories: list[Memory]) -> Memory:
    """One batch from the memories of several; window rows are aligned at the newest token, as in every `Memory`."""
    longest = max(memory.window_keys.shape[1] for memory in memories)

    def aligned(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (longest - tensor.shape[1], 0))

    def join(name: str) -> Tensor:
        tensors = [getattr(memory, name) for memory in memories]
        return torch.cat([aligned(tensor) for tensor in tensors] if name.startswith("window_") else tensors)

    names = [field.name for field in dataclasses.fields(Memory) if field.name != "window"]
    return dataclasses.replace(memories[0], **{name: join(name) for name in names})
