"""Heads for sequence: an all-to-all gives every rank the whole sequence of some heads, and one brings the outputs back.

    before   rank r: tokens of shard r, all heads            q [B, L, HQ, K]      k [B, L, H, K]
    between  rank r: all tokens, heads of part r             q [B, R L, HQ / R, K]  k [B, R L, H c / R, K]

Query heads keep their order. Each KV head is repeated c times (`kv_copies`) so that every rank gets the KV heads of its queries; the
gradients of the copies are added where the copies were made.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nha_kernels.conventions import accumulation_dtype
from nha_kernels.first_order import first_order_only

from .cost import kv_copies


def sequences_of_heads(q: Tensor, k: Tensor, v: Tensor, g: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Shards of all heads -> q [B, R L, HQ / R, K], k and v [B, R L, H c / R, .]. The unused g gets a zero gradient."""
    return _HeadsToSequence.apply(group, q, k, v, g)


def shards_of_outputs(out: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, R L, HQ / R, V] -> [B, L, HQ, V]."""
    return _SequenceToHeads.apply(group, out)


class _HeadsToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.copies = group, kv_copies(q.shape[2], k.shape[2], group.size())
        ctx.gates = {"size": g.shape, "dtype": g.dtype, "device": g.device}
        return _to_sequences(group, q, *(x.repeat_interleave(ctx.copies, dim=2) for x in (k, v)))

    @staticmethod
    @first_order_only("Compute it without context parallelism")
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_q, d_k, d_v = _to_shards(ctx.group, *gradients)
        return None, d_q, _sum_copies(d_k, ctx.copies), _sum_copies(d_v, ctx.copies), torch.zeros(**ctx.gates)


class _SequenceToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, out: Tensor) -> Tensor:
        ctx.group = group
        return _to_shards(group, out)[0]

    @staticmethod
    @first_order_only("Compute it without context parallelism")
    def backward(ctx: Any, d_out: Tensor) -> tuple[None, Tensor]:
        return None, _to_sequences(ctx.group, d_out)[0]


def _to_sequences(group: dist.ProcessGroup, *shards: Tensor) -> tuple[Tensor, ...]:
    """Tensors [B, L, N, C] of one dtype -> [B, R L, N / R, C], in one message."""
    size = group.size()
    message = torch.cat([x.unflatten(2, (size, -1)).flatten(3) for x in shards], dim=-1).permute(2, 0, 1, 3).contiguous()
    received = torch.empty_like(message)  # [R, B, L, .], ranks in token order
    dist.all_to_all_single(received, message, group=group)
    parts = received.transpose(0, 1).flatten(1, 2).split([x.shape[2] // size * x.shape[3] for x in shards], dim=-1)
    return tuple(part.unflatten(-1, (-1, x.shape[3])) for part, x in zip(parts, shards, strict=True))


def _to_shards(group: dist.ProcessGroup, *sequences: Tensor) -> tuple[Tensor, ...]:
    """The inverse: [B, R L, N / R, C] -> [B, L, N, C]."""
    message = torch.cat([x.flatten(2) for x in sequences], dim=-1).unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    received = torch.empty_like(message)  # [R, B, L, .], ranks in the order of their heads
    dist.all_to_all_single(received, message, group=group)
    parts = received.permute(1, 2, 0, 3).split([x.shape[2] * x.shape[3] for x in sequences], dim=-1)
    return tuple(part.unflatten(-1, (-1, x.shape[3])).flatten(2, 3) for part, x in zip(parts, sequences, strict=True))


def _sum_copies(gradient: Tensor, copies: int) -> Tensor:
    """[B, L, H c, .] -> [B, L, H, .], added in the accumulation precision."""
    if copies == 1:
        return gradient
    return gradient.unflatten(2, (-1, copies)).sum(3, dtype=accumulation_dtype(gradient.dtype)).to(gradient.dtype)
