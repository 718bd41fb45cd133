"""Full-attention layers of a hybrid stack over context ranks that hold contiguous shards: same arguments, same result as one rank.

Two exchanges (Megatron's words, `cp_comm_type`): `a2a` gives each rank the whole sequence of some heads, `all_gather` all keys and
values for half of its own queries and half of another rank's. What a rank then computes is the single-device operator, so documents,
angles (distances within the sequence, formed in float64) and the M zero-logit rows of `empty_slots="attend"` need nothing of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nha_kernels import AttentionOptions, Memory, attention_statistics, clamp_log_gates, hybrid_attention
from nha_kernels.conventions import write_strength
from nha_megatron.layers.boundaries import boundaries_on, documents_of_rows

from .cost import Exchange
from .gather import gather_keys, return_outputs
from .heads import sequences_of_heads, shards_of_outputs
from .plan import QueryRun, plan_query_halves

# A call of the operator on what a rank has after an exchange: (q, k, v, g, cu_seqlens, memory) -> output [B, T, HQ, V].
_Attend = Callable[..., Tensor]


def full_attention_over_ranks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    options: AttentionOptions,
    *,
    group: dist.ProcessGroup,
    exchange: Exchange,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`hybrid_attention` with `options.window` None over a sequence whose rank r of `group` holds the tokens [r L, (r + 1) L).

    Args:
        q, k, v, g: this rank's shard [B, L, ...], as `nha_attention` takes them; L is the same on every rank. Of g only the number of
            slots matters; it gets a zero gradient.
        group: the context-parallel ranks in token order.
        exchange: `a2a` (query heads must divide by the ranks; KV heads are repeated where they do not) or `all_gather`.
        cu_seqlens: document boundaries over the B rows of R L tokens laid end to end, on the host, the same on every rank; row edges are
            boundaries.
        backend: as `nha_attention`.

    Returns:
        Output of the shard [B, L, HQ, V]. The backward gives exact gradients to every rank's q, k and v; all ranks must run it.

    Raises:
        ConfigError: cu_seqlens that do not fit. ValueError: heads that do not divide, and what `nha_attention` refuses.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, g: Tensor, cu_seqlens: Tensor | None, memory: Memory | None) -> Tensor:
        return hybrid_attention(q, k, v, g, options, cu_seqlens=cu_seqlens, memory=memory, backend=backend)

    return _over_ranks(attend, q, k, v, g, options, group, exchange, cu_seqlens)


@torch.no_grad()
def full_attention_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    options: AttentionOptions,
    *,
    group: dist.ProcessGroup,
    exchange: Exchange,
    cu_seqlens: Sequence[int] | Tensor | None = None,
) -> dict[str, Tensor]:
    """`attention_statistics`, arguments as `full_attention_over_ranks`: means over equally many tokens and heads on every rank."""

    def share(q: Tensor, k: Tensor, v: Tensor, g: Tensor, cu_seqlens: Tensor | None, memory: Memory | None) -> Tensor:
        if q.shape[1] == 0:
            return g.new_zeros(*q.shape[:3], 1)
        given = attention_statistics(q, k, v, g, options, cu_seqlens=cu_seqlens, memory=memory)
        return given["slot_share"].expand(*q.shape[:3], 1)

    strength = write_strength(clamp_log_gates(g)).mean()
    slot_share = _over_ranks(share, q, k, v, g, options, group, exchange, cu_seqlens).mean()
    return {"slot_share": slot_share, "mean_decay": 1 - strength, "write_strength": strength}


def _over_ranks(
    attend: _Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    options: AttentionOptions,
    group: dist.ProcessGroup,
    exchange: Exchange,
    cu_seqlens: Sequence[int] | Tensor | None,
) -> Tensor:
    assert options.window is None, "windows have an exchange of their own"
    documents = None if cu_seqlens is None else documents_of_rows(cu_seqlens, q.shape[0], group.size() * q.shape[1])
    # Nothing is written, so the operator needs gates for their shape alone; only `attend` sees how many slots are empty.
    slots = g.shape[-1] if options.empty_slots == "attend" else 1
    if exchange == "a2a":
        if q.shape[2] % group.size():
            raise ValueError(f"{q.shape[2]} query heads do not divide over {group.size()} ranks: use exchange='all_gather'")
        return _on_some_heads(attend, q, k, v, g, group, documents, slots)
    if documents is None:
        return _on_some_queries(attend, q, k, v, g, group, None, slots)
    rows = zip(q.split(1), k.split(1), v.split(1), g.split(1), documents, strict=True)
    outputs = [_on_some_queries(attend, row_q, row_k, row_v, row_g, group, edges, slots) for row_q, row_k, row_v, row_g, edges in rows]
    return torch.cat(outputs)


def _on_some_heads(
    attend: _Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    group: dist.ProcessGroup,
    documents: tuple[tuple[int, ...], ...] | None,
    slots: int,
) -> Tensor:
    q, k, v = sequences_of_heads(q, k, v, g, group)
    rows, tokens = q.shape[:2]
    cu_seqlens = None
    if documents is not None:  # whole rows are here, so all of them can lie end to end
        q, k, v = (x.reshape(1, rows * tokens, *x.shape[2:]) for x in (q, k, v))
        edges = (row * tokens + edge for row, of_row in enumerate(documents) for edge in of_row[1:])
        cu_seqlens = boundaries_on(q.device, (0, *edges))
    out = attend(q, k, v, _no_gates(g, k, slots), cu_seqlens, None)
    return shards_of_outputs(out.reshape(rows, tokens, *out.shape[2:]), group)


def _on_some_queries(
    attend: _Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    group: dist.ProcessGroup,
    documents: tuple[int, ...] | None,
    slots: int,
) -> Tensor:
    plan = plan_query_halves(tokens_per_rank=q.shape[1], num_ranks=group.size(), rank=group.rank(), cu_seqlens=documents)
    channels = [k.shape[-1], v.shape[-1]]

    def continue_from_keys(run: QueryRun, queries: Tensor, keys_values: Tensor) -> Tensor:
        before, tokens = keys_values.split([run.preceding, run.tokens], dim=1)
        window_keys, window_values = before.split(channels, dim=-1)
        keys, values = tokens.split(channels, dim=-1)
        memory = dataclasses.replace(
            Memory.empty(q.shape[0], k.shape[2], slots, k.shape[-1], v.shape[-1], None, dtype=q.dtype, device=q.device),
            window_keys=window_keys,
            window_values=window_values,
            window_log_gates=_no_gates(g, window_keys, slots),
            length=torch.full((q.shape[0],), run.preceding, dtype=torch.int64, device=q.device),
        )
        cu_seqlens = None if run.cu_seqlens is None else boundaries_on(q.device, run.cu_seqlens)
        return attend(queries, keys, values, _no_gates(g, keys, slots), cu_seqlens, memory)

    own, foreign = gather_keys(q, k, v, g, plan=plan, group=group)
    return return_outputs(continue_from_keys(plan.own, *own), continue_from_keys(plan.foreign, *foreign), plan=plan, group=group)


def _no_gates(g: Tensor, keys: Tensor, slots: int) -> Tensor:
    """Zero log-gates [B, T, H, M] for keys [B, T, H, K], without storage."""
    return g.new_zeros(1, 1, 1, 1).expand(*keys.shape[:3], slots)
