"""All keys and values to every rank, and halves of the queries between ranks, so that causal work is the same everywhere.

    forward    all-gather [k | v]     all-to-all: second halves of the queries to the partners     ..attention..     outputs back
    backward   all-to-all: every rank's gradients of a shard to its owner, who adds them          queries' back      outputs'

Which rank computes what is the plan's (`plan_query_halves`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nha_kernels.conventions import accumulation_dtype
from nha_kernels.first_order import first_order_only

from .plan import QueryHalves


def gather_keys(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, plan: QueryHalves, group: dist.ProcessGroup
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Shards [B, L, ...] -> for the rank's own half and the foreign one: queries [B, run, HQ, K], keys and values [B, keys, H, K + V].

    Keys are those from `QueryRun.first_key` to the end of the run. The unused g gets a zero gradient.
    """
    own_q, foreign_q, own_keys, foreign_keys = _Gather.apply(plan, group, q, torch.cat([k, v], dim=-1), g)
    return (own_q, own_keys), (foreign_q, foreign_keys)


def return_outputs(own: Tensor, foreign: Tensor, *, plan: QueryHalves, group: dist.ProcessGroup) -> Tensor:
    """Outputs of both halves -> those of this rank's queries [B, L, HQ, V]."""
    return _Return.apply(plan, group, own, foreign)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: QueryHalves, group: dist.ProcessGroup, q: Tensor, kv: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        ctx.plan, ctx.group = plan, group
        ctx.gates = {"size": g.shape, "dtype": g.dtype, "device": g.device}
        gathered = kv.new_empty(group.size(), *kv.shape)
        keys_arrive = dist.all_gather_into_tensor(gathered.flatten(0, 1), kv.contiguous(), group=group, async_op=True)
        own_q, foreign_q = _swap_second_half(q, plan, group)
        keys_arrive.wait()
        keys = gathered.transpose(0, 1).flatten(1, 2)
        return own_q, foreign_q, *(keys[:, run.first_key : run.stop] for run in (plan.own, plan.foreign))

    @staticmethod
    @first_order_only("Compute it without context parallelism")
    def backward(ctx: Any, d_own_q: Tensor, d_foreign_q: Tensor, *d_keys: Tensor) -> tuple[Tensor | None, ...]:
        plan, size = ctx.plan, ctx.group.size()
        batch, tokens = d_own_q.shape[0], plan.own.tokens + plan.foreign.tokens
        total = d_keys[0].new_zeros(batch, size * tokens, *d_keys[0].shape[2:], dtype=accumulation_dtype(d_keys[0].dtype))
        for run, gradient in zip((plan.own, plan.foreign), d_keys, strict=True):
            total[:, run.first_key : run.stop] += gradient
        sent = total.to(d_keys[0].dtype).unflatten(1, (size, tokens)).transpose(0, 1).contiguous()
        received = torch.empty_like(sent)
        # Not a reduce-scatter, which would add in the precision of the message.
        keys_arrive = dist.all_to_all_single(received, sent, group=ctx.group, async_op=True)
        d_q = torch.cat([d_own_q, _exchange_halves(d_foreign_q, plan, ctx.group)], dim=1)
        keys_arrive.wait()
        return None, None, d_q, received.sum(0, dtype=total.dtype).to(received.dtype), torch.zeros(**ctx.gates)


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: QueryHalves, group: dist.ProcessGroup, own: Tensor, foreign: Tensor) -> Tensor:
        ctx.plan, ctx.group = plan, group
        return torch.cat([own, _exchange_halves(foreign, plan, group)], dim=1)

    @staticmethod
    @first_order_only("Compute it without context parallelism")
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_swap_second_half(d_out, ctx.plan, ctx.group)


def _swap_second_half(x: Tensor, plan: QueryHalves, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """[B, L, ...] -> its first half, and the second half of the partner's tensor."""
    own, second = x.split([plan.own.tokens, plan.foreign.tokens], dim=1)
    return own.contiguous(), _exchange_halves(second, plan, group)


def _exchange_halves(half: Tensor, plan: QueryHalves, group: dist.ProcessGroup) -> Tensor:
    """Sends [B, L / 2, ...] to the partner and returns what the partner sends; the middle one of an odd number of ranks is its own."""
    sent = half.transpose(0, 1).contiguous()  # tokens first, so that it splits by rank
    received = torch.empty_like(sent)
    splits = plan.splits(group.size())
    dist.all_to_all_single(received, sent, splits, splits, group=group)
    return received.transpose(0, 1).contiguous()
