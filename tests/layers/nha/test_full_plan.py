"""Which queries a rank computes: every (query, key) pair once, the same number on every rank, the same messages at both ends."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_megatron.config import ConfigError
from nha_megatron.layers.nha.full.cost import choose_exchange, kv_copies
from nha_megatron.layers.nha.full.plan import QueryHalves, QueryRun, plan_query_halves
from tests.layers.nha.context_parallel_cases import layouts


def plans_of(shard: int, num_ranks: int, cu_seqlens: tuple[int, ...] | None) -> list[QueryHalves]:
    return [plan_query_halves(tokens_per_rank=shard, num_ranks=num_ranks, rank=rank, cu_seqlens=cu_seqlens) for rank in range(num_ranks)]


def pairs_of(run: QueryRun) -> list[tuple[int, int]]:
    """(query, key) pairs of a run, by its documents."""
    edges = (0, run.tokens) if run.cu_seqlens is None else run.cu_seqlens
    pairs = []
    for document, start in enumerate(edges[:-1]):
        first_key = run.first_key if document == 0 else run.start + start
        pairs += [(q, key) for q in range(run.start + start, run.start + edges[document + 1]) for key in range(first_key, q + 1)]
    return pairs


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_every_pair_of_a_query_and_a_key_of_its_document_appears_exactly_once(layout: tuple) -> None:
    shard, num_ranks, _, cu_seqlens = layout
    starts = cu_seqlens or (0,)
    wanted = [(q, key) for q in range(shard * num_ranks) for key in range(max(s for s in starts if s <= q), q + 1)]
    assert (
        sorted(pair for plan in plans_of(shard, num_ranks, cu_seqlens) for run in (plan.own, plan.foreign) for pair in pairs_of(run))
        == wanted
    )


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_partners_send_each_other_the_halves_that_they_expect(layout: tuple) -> None:
    shard, num_ranks, _, cu_seqlens = layout
    plans = plans_of(shard, num_ranks, cu_seqlens)
    for plan in plans:
        assert plans[plan.partner].partner == plan.rank
        assert plan.own.start == plan.rank * shard and plan.own.tokens + plan.foreign.tokens == shard
        assert (plan.foreign.start, plan.foreign.stop) == (plans[plan.partner].own.stop, (plan.partner + 1) * shard)
        for other in plans:
            assert plan.splits(num_ranks)[other.rank] == other.splits(num_ranks)[plan.rank]


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 7])
def test_ranks_see_equally_many_keys(num_ranks: int) -> None:
    counts = {len(pairs_of(plan.own)) + len(pairs_of(plan.foreign)) for plan in plans_of(6, num_ranks, None)}
    assert counts == {6 * (6 * num_ranks + 1) // 2}, "half of a square and of its diagonal, divided over the ranks"


def test_the_drawing() -> None:
    plans = plans_of(2, 4, None)
    # Keys of full halves, and the triangle of one key and one query.
    assert [(len(pairs_of(plan.own)), len(pairs_of(plan.foreign))) for plan in plans] == [(1, 8), (3, 6), (5, 4), (7, 2)]


def test_documents_that_do_not_fit_the_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="do not cut 16 tokens into documents"):
        plan_query_halves(tokens_per_rank=8, num_ranks=2, rank=0, cu_seqlens=(0, 9, 5, 16))


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 24))
def test_copied_kv_heads_are_those_of_a_ranks_queries(kv_heads: int, group: int, ranks: int) -> None:
    heads = kv_heads * group
    if heads % ranks:
        exchange, reason = choose_exchange("auto", heads, ranks)
        assert exchange == "all_gather" and "do not divide" in reason
        return
    assert choose_exchange("auto", heads, ranks)[0] == "a2a"
    copies = kv_copies(heads, kv_heads, ranks)
    copied = [head for head in range(kv_heads) for _ in range(copies)]
    queries, keys = heads // ranks, len(copied) // ranks
    assert len(copied) % ranks == 0 and queries % keys == 0
    for rank in range(ranks):
        for i in range(queries):
            # The operator on a rank takes KV head i // (queries / keys) of the rank's own.
            assert copied[rank * keys + i // (queries // keys)] == (rank * queries + i) // group
    if kv_heads % ranks == 0:
        assert copies == 1
    if ranks % kv_heads == 0:
        assert copies * kv_heads == ranks, "one KV head a rank"
