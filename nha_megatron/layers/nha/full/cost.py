"""How `full` attention layers are computed over context ranks: the choice between two exchanges, and their bytes.

a2a         every rank gets whole sequences of some heads: queries, keys and values out, outputs back
all_gather  every rank gets all keys and values; halves of the queries change places, so that causal work is equal
"""

from __future__ import annotations

import math
from typing import Literal

from nha_megatron.layers.kind import ModelShape, RankShape

Exchange = Literal["a2a", "all_gather"]


def choose_exchange(requested: Literal["auto", "a2a", "all_gather"], heads: int, ranks: int) -> tuple[Exchange, str]:
    """The exchange of full layers with `heads` query heads on a tensor rank over `ranks` context ranks, and why.

    a2a where heads divide: it sends less for any number of ranks and holds one sequence of few heads, not all keys and values.
    """
    if requested != "auto":
        return requested, "parallel.cp_comm_type asks for it"
    if heads % ranks == 0:
        return "a2a", f"the {heads} query heads of a tensor rank divide over {ranks} context ranks"
    return "all_gather", f"the {heads} query heads of a tensor rank do not divide over {ranks} context ranks"


def kv_copies(heads: int, kv_heads: int, ranks: int) -> int:
    """How often a2a repeats each KV head so that `ranks` ranks get whole groups of queries.

    A rank takes n = heads / ranks consecutive query heads. d = gcd(n, heads per KV head) of them in a row always share a KV head, so one
    copy for every d query heads serves any n; it is 1 where kv_heads divides by ranks.
    """
    assert heads % ranks == 0 and heads % kv_heads == 0, (heads, kv_heads, ranks)
    group = heads // kv_heads
    return group // math.gcd(heads // ranks, group)


def exchange_bytes(model: ModelShape, exchange: Exchange, rank: RankShape) -> int:
    """Bytes that a context rank hands out in the forward of one full layer; the backward hands out as many.

    A message to itself is not counted; of an all-gather its own part is, once, as in `context_parallel/cost.py`.
    """
    ranks = rank.context
    if ranks == 1:
        return 0
    heads, kv_heads = model.num_heads // rank.tensor, model.num_kv_heads // rank.tensor
    if exchange == "a2a":
        rows = 2 * heads + 2 * kv_heads * kv_copies(heads, kv_heads, ranks)
        return rank.micro_batch_size * rank.shard_length * rows * (ranks - 1) // ranks * model.head_dim * rank.element_bytes
    rows = 2 * kv_heads * rank.shard_length + 2 * heads * (rank.shard_length // 2)
    return rank.micro_batch_size * rows * model.head_dim * rank.element_bytes


def received_bytes(model: ModelShape, exchange: Exchange, rank: RankShape) -> int:
    """Bytes that the exchange brought and the backward needs: queries, and keys and values of whole sequences (a2a: of some heads)."""
    heads, kv_heads = model.num_heads // rank.tensor, model.num_kv_heads // rank.tensor
    if exchange == "a2a":
        rows = heads + 2 * kv_heads * kv_copies(heads, kv_heads, rank.context)
    else:
        rows = heads + 2 * kv_heads * rank.context
    return rank.tokens * rows * model.head_dim * rank.element_bytes
