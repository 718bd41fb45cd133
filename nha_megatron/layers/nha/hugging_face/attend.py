"""The operator over a batch with padding or packed documents, exactly: padding is as if it were not there."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nha_kernels import Memory, nha_attention
from nha_megatron.layers.modeling import TokenPlacement


def attend(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, placement: TokenPlacement, memory: Memory | None, return_memory: bool, **settings: Any
) -> tuple[Tensor, Memory | None]:
    """`nha_attention` over a batch with padding or packed documents. Outputs at padding are 0."""
    tokens = (q, k, v, g)
    if placement.cu_seqlens is not None:
        if placement.real is None:
            flat = (x.flatten(0, 1)[None] for x in tokens)
            return nha_attention(*flat, cu_seqlens=placement.cu_seqlens, **settings).view(*q.shape[:3], v.shape[-1]), None
        flat = (x[placement.real][None] for x in tokens)
        result = nha_attention(*flat, cu_seqlens=placement.cu_seqlens, **settings)[0]
        return v.new_zeros(*q.shape[:3], v.shape[-1]).index_put((placement.real,), result), None
    if placement.real is None:
        if return_memory or memory is not None:
            return nha_attention(*tokens, memory=memory, return_memory=True, **settings)
        return nha_attention(*tokens, **settings), None
    if return_memory or memory is not None:
        return _attend_row_groups(tokens, placement.real, memory, **settings)
    # Attention is causal and depends on distances only, so tokens moved in front of the padding never see it.
    order = torch.argsort(~placement.real, dim=1, stable=True)
    moved = (torch.take_along_dim(x, order[..., None, None], dim=1) for x in tokens)
    out = torch.take_along_dim(nha_attention(*moved, **settings), torch.argsort(order, dim=1)[..., None, None], dim=1)
    return out.masked_fill(~placement.real[..., None, None], 0), None


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
