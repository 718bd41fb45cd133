"""Full attention over gloo ranks equals the token-by-token operator on one rank: outputs and every gradient, both exchanges."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nha_megatron.config import ConfigError, ModelConfig
from nha_megatron.layers.kind import RankShape
from nha_megatron.layers.nha.full.cost import exchange_bytes
from nha_megatron.layers.nha.full.over_ranks import full_attention_over_ranks
from tests.distributed import RankPool
from tests.layers.nha.context_parallel_cases import Case, Results, assert_close, join_shards, on_one_rank
from tests.layers.nha.full_cases import full_on_this_rank, full_statistics_of_this_rank, shard_of

SHARD = 5
EXCHANGES = ("a2a", "all_gather")
CONVENTIONS = ("attend", "mask", "weight")

# float64: at most a few hundred operations of 1.1e-16 each on numbers of order 1, whose errors add up like a random walk.
FLOAT64 = 1e-13


def full(num_ranks: int, *, shard: int = SHARD, **changes: Any) -> Case:
    """By default two query heads for each KV head, and as many KV heads as ranks."""
    return Case(num_ranks, num_ranks * shard, None, **({"kv_heads": num_ranks, "group_size": 2} | changes))


def across_ranks(ranks: RankPool, cases: list[Case], exchange: str, operator: str = "torch") -> list[Results]:
    (num_ranks,) = {case.num_ranks for case in cases}
    shards = ranks.run(num_ranks, full_on_this_rank, cases=cases, exchange=exchange, operator=operator)
    return [join_shards(list(of_case)) for of_case in zip(*shards, strict=True)]


def assert_equals_one_rank(ranks: RankPool, cases: list[Case], exchange: str, tolerance: float = FLOAT64) -> None:
    for case, given in zip(cases, across_ranks(ranks, cases, exchange), strict=True):
        assert_close(given, on_one_rank(case), tolerance, (exchange, case))
        assert not given["dg"].any(), "nothing is written, so gates have a gradient, and it is zero"


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("num_ranks", [2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_conventions_and_several_rows(ranks: RankPool, num_ranks: int, exchange: str) -> None:
    assert_equals_one_rank(ranks, [full(num_ranks, batch=2, empty_slots=convention) for convention in CONVENTIONS], exchange)


# KV heads, query heads per KV head, ranks: KV heads divide; fewer KV heads than ranks; ranks that end inside a group of queries.
HEADS = [(4, 1, 2), (2, 2, 2), (1, 4, 2), (2, 2, 4), (1, 4, 4), (2, 6, 3), (3, 4, 2), (2, 6, 4)]


@pytest.mark.parametrize(("kv_heads", "group_size", "num_ranks"), HEADS)
def test_heads_for_sequence_with_any_groups(ranks: RankPool, kv_heads: int, group_size: int, num_ranks: int) -> None:
    assert_equals_one_rank(ranks, [full(num_ranks, kv_heads=kv_heads, group_size=group_size)], "a2a")


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("shard", [1, 4, 7])
def test_gathered_keys_with_heads_that_do_not_divide(ranks: RankPool, num_ranks: int, shard: int) -> None:
    """A shard of one token has an empty second half; an odd one halves of different lengths."""
    assert_equals_one_rank(ranks, [full(num_ranks, shard=shard, kv_heads=1, group_size=5)], "all_gather")


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("rope", [None, "partial", "full"])
def test_rotary_embedding_and_scales(ranks: RankPool, rope: str | None, exchange: str) -> None:
    assert_equals_one_rank(ranks, [full(3, rope=rope, rope_attention_factor=1.2, scale=0.5)], exchange)


DOCUMENTS = {
    "boundary inside a shard": (0, 7, 20),
    "at shard edges": (0, 10, 15, 20),
    "around shard edges": (0, 4, 6, 9, 11, 20),
    "at the middle of shards": (0, 3, 8, 13, 18, 20),
    "shorter than half a shard": (0, 2, 3, 5, 7, 8, 10, 12, 14, 15, 17, 19, 20),
    "spanning many ranks": (0, 3, 19, 20),
    "empty documents and an empty tail": (0, 0, 6, 6, 13),
    "one document": (0, 20),
}


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_packed_documents(ranks: RankPool, exchange: str) -> None:
    cases = [full(4, cu_seqlens=cu_seqlens, empty_slots=empty) for cu_seqlens in DOCUMENTS.values() for empty in ("attend", "mask")]
    for case, given in zip(cases, across_ranks(ranks, cases, exchange), strict=True):
        assert case.cu_seqlens is not None
        closed = (*case.cu_seqlens, case.tokens) if case.cu_seqlens[-1] < case.tokens else case.cu_seqlens
        assert_close(given, on_one_rank(dataclasses.replace(case, cu_seqlens=closed)), FLOAT64, (exchange, case))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_rows_of_a_batch_have_documents_of_their_own(ranks: RankPool, exchange: str) -> None:
    """Boundaries over both rows laid end to end; no boundary is given at the edge between them, yet nothing crosses it."""
    tokens = 3 * SHARD
    case = full(3, batch=2, cu_seqlens=(0, 2, tokens - 1, tokens + 3, 2 * tokens))
    (given,) = across_ranks(ranks, [case], exchange)
    for row, cu_seqlens in enumerate([(0, 2, tokens - 1, tokens), (0, 3, tokens)]):
        wanted = on_one_rank(dataclasses.replace(case, cu_seqlens=cu_seqlens), row=row)
        assert_close({name: value[row : row + 1] for name, value in given.items()}, wanted, FLOAT64, case)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("changed", [(4, 12), (12, 20)])
def test_a_document_is_bit_equal_whatever_its_neighbours_hold(ranks: RankPool, changed: tuple[int, int], exchange: str) -> None:
    case = full(4, cu_seqlens=(0, 4, 12, 20), dtype=torch.float32)
    before, after = across_ranks(ranks, [case, dataclasses.replace(case, changed=changed)], exchange)
    others = torch.ones(case.tokens, dtype=torch.bool)
    others[slice(*changed)] = False
    for name in before:
        assert torch.equal(before[name][:, others], after[name][:, others]), name
    assert not torch.equal(before["out"], after["out"])


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("loss_from", [SHARD, 3 * SHARD])
def test_gradients_reach_the_first_rank_from_losses_on_later_ranks_alone(ranks: RankPool, loss_from: int, exchange: str) -> None:
    case = full(4, loss_from=loss_from)
    (given,) = across_ranks(ranks, [case], exchange)
    assert given["dk"][:, :SHARD].norm() > 0
    assert_close(given, on_one_rank(case), FLOAT64, case)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_low_precision_is_as_good_as_on_one_rank(ranks: RankPool, exchange: str) -> None:
    cases = [full(4, kv_heads=1, group_size=4, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    # Roundings of 6e-8 in float32. Of 2e-3 (rms) in bfloat16: of the output, and of gradients of k and v once on each of the ranks that
    # compute a part of them and once where they are added.
    for case, given, tolerance in zip(cases, across_ranks(ranks, cases, exchange), (2e-6, 6e-3), strict=True):
        assert_close(given, on_one_rank(case, dtype=torch.float64), tolerance, (exchange, case))


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("cu_seqlens", [None, (0, 7, 15)])
def test_statistics_are_those_of_one_rank(ranks: RankPool, cu_seqlens: tuple[int, ...] | None, exchange: str) -> None:
    case = full(3, cu_seqlens=cu_seqlens)
    given = ranks.run(3, full_statistics_of_this_rank, case=case, exchange=exchange)
    (wanted,) = ranks.run(1, full_statistics_of_this_rank, case=case, exchange=exchange)
    assert 0 < wanted["slot_share"] < 1
    for name, value in wanted.items():
        # Means over the same numbers in other groups.
        torch.testing.assert_close(sum(of_rank[name] for of_rank in given) / 3, value, rtol=1e-13, atol=0)


def record_collectives(case: Case, exchange: str) -> tuple[list[str], list[int]]:
    """Names of the collectives of two stacked layers, forward then backward, and bytes this rank handed to others in each."""
    names, sizes = [], []

    def to_others(message: torch.Tensor, splits: list[int] | None) -> int:
        rank, size = dist.get_rank(), dist.get_world_size()
        own = message.shape[0] // size if splits is None else splits[rank]
        return (message.shape[0] - own) * message[:1].numel() * message.element_size()

    def all_to_all(received: torch.Tensor, message: torch.Tensor, *splits: Any, **kwargs: Any) -> Any:
        names.append("all_to_all")
        sizes.append(to_others(message, splits[1] if splits else None))
        return before[0](received, message, *splits, **kwargs)

    def all_gather(gathered: torch.Tensor, own: torch.Tensor, **kwargs: Any) -> Any:
        names.append("all_gather")
        sizes.append(own.numel() * own.element_size())
        return before[1](gathered, own, **kwargs)

    before: tuple[Callable[..., Any], Callable[..., Any]] = dist.all_to_all_single, dist.all_gather_into_tensor
    dist.all_to_all_single, dist.all_gather_into_tensor = all_to_all, all_gather
    try:
        group, inputs, _, options = shard_of(case)
        q, k, v, g = (x.requires_grad_() for x in inputs)
        for _ in range(2):
            out = full_attention_over_ranks(q, k, v, g, options, group=group, exchange=exchange, cu_seqlens=case.cu_seqlens)
            q = torch.nn.functional.pad(out, (0, 4))
        # A rank whose tokens all carry no loss must still take part.
        (q.sum() * float(group.rank() == 0)).backward()
    finally:
        dist.all_to_all_single, dist.all_gather_into_tensor = before
    return names, sizes


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("cu_seqlens", [None, (0, 5, 10, 15), (0, 2, 13, 15)])
def test_all_ranks_run_the_same_collectives_in_the_same_order(ranks: RankPool, cu_seqlens: tuple[int, ...] | None, exchange: str) -> None:
    names = [names for names, _ in ranks.run(3, record_collectives, case=full(3, cu_seqlens=cu_seqlens), exchange=exchange)]
    assert names[0] == names[1] == names[2]
    assert len(names[0]) == {"a2a": 8, "all_gather": 12}[exchange]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_bytes_sent_are_those_of_the_cost_arithmetic(ranks: RankPool, kv_heads: int, exchange: str) -> None:
    model = ModelConfig(
        num_layers=1, hidden_size=40, ffn_hidden_size=20, num_heads=4, num_kv_heads=kv_heads, num_slots=3, vocab_size=128, window="full"
    )
    assert 2 * model.head_dim == 12 + 8, "the case has K = 12 and V = 8, the arithmetic counts 2 * head_dim"
    case = full(2, shard=6, kv_heads=kv_heads, group_size=4 // kv_heads, dtype=torch.bfloat16)
    calls = {"a2a": 2, "all_gather": 3}[exchange]
    for _, sizes in ranks.run(2, record_collectives, case=case, exchange=exchange):
        assert sum(sizes[:calls]) == exchange_bytes(model, exchange, RankShape(sequence_length=12, context=2))


def refusal_on_this_rank(exchange: str, **changes: Any) -> str:
    group, inputs, _, options = shard_of(full(2, kv_heads=1, group_size=3))
    try:
        full_attention_over_ranks(*inputs, options, group=group, exchange=exchange, **changes)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def test_refusals_are_raised_by_every_rank_before_anything_is_sent(ranks: RankPool) -> None:
    for message in ranks.run(2, refusal_on_this_rank, exchange="a2a"):
        assert "3 query heads do not divide over 2 ranks" in message and "all_gather" in message
    for message in ranks.run(2, refusal_on_this_rank, exchange="all_gather", cu_seqlens=(0, 4, 11)):
        assert message.startswith(ConfigError.__name__) and "do not cut 10 tokens" in message


@pytest.mark.slow
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_grid(ranks: RankPool, num_ranks: int, exchange: str) -> None:
    cases = []
    for shard, kv_heads, empty_slots in itertools.product((1, 4), (1, num_ranks), CONVENTIONS):
        tokens = num_ranks * shard
        options = {"kv_heads": kv_heads, "group_size": num_ranks // kv_heads, "empty_slots": empty_slots, "rope": "partial"}
        for cu_seqlens in (None, (0, tokens // 3, tokens // 3 + 1, tokens), tuple(range(0, tokens + 1, shard))):
            cases.append(full(num_ranks, shard=shard, cu_seqlens=cu_seqlens, **options))
    assert_equals_one_rank(ranks, cases, exchange)
