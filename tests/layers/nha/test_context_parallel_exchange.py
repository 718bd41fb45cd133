"""Context parallelism on gloo ranks equals the token-by-token operator on one rank: outputs and every gradient."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nha_kernels import AttentionOptions
from nha_megatron.config import ConfigError, ModelConfig
from nha_megatron.layers.kind import RankShape
from nha_megatron.layers.nha.context_parallel import messages
from nha_megatron.layers.nha.context_parallel.cost import context_parallel_bytes
from nha_megatron.layers.nha.context_parallel.exchange import context_parallel_attention, context_parallel_statistics, fetch_memory
from nha_megatron.layers.nha.context_parallel.plan import plan_context_parallel
from tests.distributed import RankPool
from tests.layers.nha.context_parallel_cases import Case, Results, assert_close, join_shards, on_one_rank, on_this_rank

SHARD = 5
WINDOWS = (0, 1, SHARD - 1, SHARD)
WIDE_WINDOWS = (SHARD + 1, 2 * SHARD, 3 * SHARD - 1, 100)

# float64: at most a few hundred operations of 1.1e-16 each on numbers of order 1, whose errors add up like a random walk.
FLOAT64 = 1e-13


def across_ranks(ranks: RankPool, cases: list[Case], operator: str = "torch") -> list[Results]:
    (num_ranks,) = {case.num_ranks for case in cases}
    shards = ranks.run(num_ranks, on_this_rank, cases=cases, operator=operator)
    return [join_shards(list(of_case)) for of_case in zip(*shards, strict=True)]


def assert_equals_one_rank(ranks: RankPool, cases: list[Case], tolerance: float = FLOAT64, operator: str = "torch") -> None:
    for case, given in zip(cases, across_ranks(ranks, cases, operator), strict=True):
        assert_close(given, on_one_rank(case), tolerance, case)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("group_size", [1, 4])
def test_windows_up_to_a_shard(ranks: RankPool, num_ranks: int, group_size: int) -> None:
    kv_heads = 2 if group_size == 1 else 1
    cases = [Case(num_ranks, num_ranks * SHARD, window, batch=2, kv_heads=kv_heads, group_size=group_size) for window in WINDOWS]
    assert_equals_one_rank(ranks, cases)


@pytest.mark.parametrize("num_ranks", [2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_windows_wider_than_a_shard(ranks: RankPool, num_ranks: int) -> None:
    assert_equals_one_rank(ranks, [Case(num_ranks, num_ranks * SHARD, window, batch=2) for window in WIDE_WINDOWS])


@pytest.mark.parametrize("empty_slots", ["attend", "mask", "weight"])
def test_empty_slots_conventions(ranks: RankPool, empty_slots: str) -> None:
    assert_equals_one_rank(ranks, [Case(3, 3 * SHARD, window, empty_slots=empty_slots) for window in (1, SHARD - 1, SHARD, SHARD + 2)])


@pytest.mark.parametrize("rope", [None, "partial", "full"])
def test_rotary_embedding_and_scales(ranks: RankPool, rope: str | None) -> None:
    assert_equals_one_rank(ranks, [Case(3, 3 * SHARD, SHARD - 1, rope=rope, rope_attention_factor=1.2, scale=0.5)])


def test_the_exchange_serves_any_backend_of_the_operator(ranks: RankPool) -> None:
    case = Case(2, 2 * SHARD, 3, group_size=4, rope="partial", empty_slots="weight")
    assert_equals_one_rank(ranks, [case], operator="reference")


def test_extreme_gates_stay_finite_and_exact(ranks: RankPool) -> None:
    """Slots fully open (g = -1e-88), fully closed (-25) and beyond the clamp (-1e4, gradient 0)."""
    assert_equals_one_rank(ranks, [Case(4, 4 * SHARD, window, gates="extreme") for window in (0, 3, SHARD)])


@pytest.mark.parametrize("loss_from", [SHARD, 3 * SHARD])
def test_gradients_reach_the_first_rank_from_losses_on_later_ranks_alone(ranks: RankPool, loss_from: int) -> None:
    cases = [Case(4, 4 * SHARD, window, loss_from=loss_from) for window in (0, 3, 2 * SHARD)]
    results = across_ranks(ranks, cases)
    for case, given in zip(cases, results, strict=True):
        assert given["dk"][:, :SHARD].norm() > 0
        assert_close(given, on_one_rank(case), FLOAT64, case)


def test_float32(ranks: RankPool) -> None:
    cases = [Case(4, 4 * SHARD, window, dtype=torch.float32, group_size=4) for window in (0, 3, SHARD, 2 * SHARD)]
    for case, given in zip(cases, across_ranks(ranks, cases), strict=True):
        # As float64, with roundings of 6e-8.
        assert_close(given, on_one_rank(case, dtype=torch.float64), 2e-6, case)


def test_bfloat16_is_as_good_as_on_one_rank(ranks: RankPool) -> None:
    cases = [Case(4, 4 * SHARD, window, dtype=torch.bfloat16, group_size=4) for window in (0, 3, SHARD, 2 * SHARD)]
    for case, given in zip(cases, across_ranks(ranks, cases), strict=True):
        exact = on_one_rank(case, dtype=torch.float64)
        # Inputs are the same rounded numbers; the results are rounded to 8 bits (2e-3 rms), gradients of k and v up to three times on
        # their way (own shard, halo, summary) and once more where they are added.
        assert_close(given, exact, 6e-3, case)
        # Log-gates are never rounded to bfloat16 themselves; their gradient sees only the rounding of the output's gradient path.
        one_rank = on_one_rank(case, backend="torch")
        assert (given["dg"].double() - exact["dg"]).norm() <= 2 * (one_rank["dg"].double() - exact["dg"]).norm() + 1e-6 * exact["dg"].norm()


DOCUMENTS = {
    "boundary inside a shard": (0, 7, 20),
    "at a shard edge": (0, 10, 20),
    "around shard edges": (0, 4, 6, 9, 11, 20),
    "in the last tokens of a shard": (0, 14, 20),
    "every document shorter than the window": (0, 2, 3, 5, 7, 8, 10, 12, 14, 15, 17, 19, 20),
    "spanning many ranks": (0, 3, 19, 20),
    "empty documents and an empty tail": (0, 0, 6, 6, 13),
    "one document": (0, 20),
}


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_packed_documents(ranks: RankPool, documents: str) -> None:
    cu_seqlens = DOCUMENTS[documents]
    windows = (0, 1, 3, SHARD, SHARD + 1, 3 * SHARD)
    # `weight` reads the slots' log-decay, `mask` the length of the document before the shard.
    cases = [Case(4, 4 * SHARD, w, cu_seqlens=cu_seqlens, empty_slots=convention) for w in windows for convention in ("weight", "mask")]
    for case, given in zip(cases, across_ranks(ranks, cases), strict=True):
        closed = (*cu_seqlens, case.tokens) if cu_seqlens[-1] < case.tokens else cu_seqlens  # the tail is a document of its own
        assert_close(given, on_one_rank(dataclasses.replace(case, cu_seqlens=closed)), FLOAT64, case)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_rows_of_a_batch_have_documents_of_their_own(ranks: RankPool, num_ranks: int) -> None:
    """Boundaries over both rows laid end to end; no boundary is given at the edge between them, yet nothing crosses it."""
    tokens = num_ranks * SHARD
    case = Case(num_ranks, tokens, 3, batch=2, cu_seqlens=(0, 2, tokens - 1, tokens + 3, 2 * tokens))
    (given,) = across_ranks(ranks, [case])
    for row, cu_seqlens in enumerate([(0, 2, tokens - 1, tokens), (0, 3, tokens)]):
        wanted = on_one_rank(dataclasses.replace(case, cu_seqlens=cu_seqlens), row=row)
        assert_close({name: value[row : row + 1] for name, value in given.items()}, wanted, FLOAT64, case)


def in_two_messages(cases: list[Case]) -> list[Results]:
    """As on many ranks, or with large halos: nothing more is sent than needed."""
    rule, messages.packs_halo = messages.packs_halo, lambda *_: False
    try:
        return on_this_rank(cases, "torch")
    finally:
        messages.packs_halo = rule


def test_two_messages_equal_one_packed_message(ranks: RankPool) -> None:
    documents = (None, (0, 7, 20), DOCUMENTS["around shard edges"])
    cases = [Case(4, 4 * SHARD, w, batch=2 - bool(d), cu_seqlens=d, empty_slots="weight") for w in (0, 3, SHARD) for d in documents]
    packed, separate = across_ranks(ranks, cases), zip(*ranks.run(4, in_two_messages, cases=cases), strict=True)
    for of_packed, of_separate in zip(packed, separate, strict=True):
        joined = join_shards(list(of_separate))
        assert all(torch.equal(joined[name], of_packed[name]) for name in joined)


def gradients_of_shared_inputs(case: Case) -> dict[str, torch.Tensor]:
    """Keys and values are parts of one tensor, the loss also reads the keys themselves; two backwards through one graph."""
    group = dist.group.WORLD
    assert group is not None
    (q, k, _, g), d_out = case.sequence()
    q, source, g = (x.chunk(group.size(), dim=1)[group.rank()].requires_grad_() for x in (q, k, g))
    k, seen = source * 1.0, []
    k.register_hook(lambda gradient: seen.append((gradient, gradient.clone())))
    out = context_parallel_attention(q, k, k[..., :8], g, AttentionOptions(**case.options), group=group)
    loss = (out * d_out.chunk(group.size(), dim=1)[group.rank()]).sum() + k.square().sum()
    first = torch.autograd.grad(loss, (q, source, g), retain_graph=True)
    second = torch.autograd.grad(loss, (q, source, g))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert all(torch.equal(*pair) for pair in seen), "a gradient that a hook has kept was written to afterwards"
    return dict(zip(("dq", "dk", "dg"), first, strict=True))


@pytest.mark.parametrize("window", [0, 3, SHARD + 1])
def test_gradients_added_in_place_disturb_no_other_use_of_the_inputs(ranks: RankPool, window: int) -> None:
    case = Case(3, 3 * SHARD, window, batch=2)
    given = join_shards(ranks.run(3, gradients_of_shared_inputs, case=case))
    (wanted,) = ranks.run(1, gradients_of_shared_inputs, case=case)
    assert_close(given, wanted, FLOAT64, case)


def statistics_of_this_rank(case: Case) -> dict[str, torch.Tensor]:
    group = dist.group.WORLD
    assert group is not None
    tensors = (x.chunk(group.size(), dim=1)[group.rank()] for x in case.sequence()[0])
    return context_parallel_statistics(*tensors, AttentionOptions(**case.options), group=group, cu_seqlens=case.cu_seqlens)


@pytest.mark.parametrize("cu_seqlens", [None, (0, 7, 15)])
def test_statistics_are_those_of_one_rank(ranks: RankPool, cu_seqlens: tuple[int, ...] | None) -> None:
    case = Case(3, 3 * SHARD, 3, cu_seqlens=cu_seqlens)
    given = ranks.run(3, statistics_of_this_rank, case=case)
    (wanted,) = ranks.run(1, statistics_of_this_rank, case=case)
    for name, value in wanted.items():
        # Means of 15 numbers and of 3 means of 5.
        torch.testing.assert_close(sum(of_rank[name] for of_rank in given) / 3, value, rtol=1e-13, atol=0)


@pytest.mark.parametrize("window", [0, 3, SHARD, 2 * SHARD + 1])
@pytest.mark.parametrize("changed", [(4, 12), (12, 20)])
def test_a_document_is_bit_equal_whatever_its_neighbours_hold(ranks: RankPool, window: int, changed: tuple[int, int]) -> None:
    case = Case(4, 4 * SHARD, window, cu_seqlens=(0, 4, 12, 20), dtype=torch.float32)
    before, after = across_ranks(ranks, [case, dataclasses.replace(case, changed=changed)])
    others = torch.ones(case.tokens, dtype=torch.bool)
    others[slice(*changed)] = False
    for name in before:
        assert torch.equal(before[name][:, others], after[name][:, others]), name
    assert not torch.equal(before["out"], after["out"])


def record_collectives(case: Case, layers: int) -> tuple[list[str], list[int]]:
    """Names of the collectives of `layers` stacked layers, forward then backward, and bytes this rank handed to each."""
    names, sizes = [], []

    def recording(name: str, call: Callable[..., Any], sent: Callable[..., int]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            sizes.append(sent(*args))
            return call(*args, **kwargs)

        return run

    def message_bytes(received: torch.Tensor, message: torch.Tensor, *_: Any) -> int:
        return message.numel() * message.element_size()

    before = dist.all_to_all_single, dist.all_gather_into_tensor
    dist.all_to_all_single = recording("all_to_all", before[0], message_bytes)
    dist.all_gather_into_tensor = recording("all_gather", before[1], message_bytes)
    try:
        group = dist.group.WORLD
        assert group is not None
        q, k, v, g = (x.chunk(group.size(), dim=1)[group.rank()].requires_grad_() for x in case.sequence()[0])
        for _ in range(layers):
            out = context_parallel_attention(q, k, v, g, AttentionOptions(**case.options), group=group, cu_seqlens=case.cu_seqlens)
            q = torch.nn.functional.pad(out, (0, 4))
        # A rank whose tokens all carry no loss must still take part.
        (q.sum() * float(group.rank() == group.size() - 1)).backward()
    finally:
        dist.all_to_all_single, dist.all_gather_into_tensor = before
    return names, sizes


@pytest.mark.parametrize("cu_seqlens", [None, (0, 5, 10, 15), (0, 2, 13, 15)])
@pytest.mark.parametrize("window", [0, 3, SHARD, SHARD + 1])
def test_all_ranks_run_the_same_collectives_in_the_same_order(ranks: RankPool, window: int, cu_seqlens: tuple[int, ...] | None) -> None:
    case = Case(3, 3 * SHARD, window, cu_seqlens=cu_seqlens)
    names = [names for names, _ in ranks.run(3, record_collectives, case=case, layers=3)]
    assert names[0] == names[1] == names[2]
    if names[0][0] == "all_gather":
        assert names[0] == ["all_gather"] * 6, "forward and backward of three layers: one message each"
    else:
        assert len(names[0]) in (6, 12), "a halo each, and a summary each unless no rank needs one"


def test_bytes_sent_are_those_of_the_cost_arithmetic_and_do_not_grow_with_the_shard(ranks: RankPool) -> None:
    model = ModelConfig(num_layers=1, hidden_size=20, ffn_hidden_size=20, num_heads=2, num_kv_heads=2, num_slots=4, vocab_size=128)
    assert 2 * model.head_dim == 12 + 8, "the case has K = 12 and V = 8, the arithmetic counts 2 * head_dim"
    for shard in (5, 50):
        case = Case(3, 3 * shard, window=3, slots=4, dtype=torch.bfloat16)  # every part of a message is a multiple of 16 bytes
        sizes = [sizes for _, sizes in ranks.run(3, record_collectives, case=case, layers=1)]
        rank = RankShape(sequence_length=3 * shard, context=3)
        forward, backward = sizes[1]  # every rank sends halo and slots in one message
        assert forward == context_parallel_bytes(model, 4, 3, rank)
        # The backward returns the halo and gathers one set of slots instead of two pieces.
        assert forward - backward == context_parallel_bytes(model, 4, 0, rank)
        assert sizes[0] == sizes[2] == sizes[1]


def memory_of_this_rank(case: Case) -> Any:
    group = dist.group.WORLD
    assert group is not None
    q, k, v, g = (x.chunk(group.size(), dim=1)[group.rank()] for x in case.sequence()[0])
    plan = plan_context_parallel(tokens_per_rank=k.shape[1], num_ranks=group.size(), rank=group.rank(), window=case.window)
    return fetch_memory(q, k, v, g, plan=plan, group=group)[1].apart()[-1]


@pytest.mark.parametrize("window", [3, 7])
def test_the_halo_arrives_bit_for_bit_gates_in_float32(ranks: RankPool, window: int) -> None:
    case = Case(3, 3 * SHARD, window, batch=2, dtype=torch.bfloat16)
    _, k, v, g = case.sequence()[0]
    for rank, memory in enumerate(ranks.run(3, memory_of_this_rank, case=case)):
        tokens = slice(max(0, rank * SHARD - window), rank * SHARD)
        assert memory.window_log_gates.dtype == memory.slot_keys.dtype == torch.float32
        assert torch.equal(memory.window_keys, k[:, tokens])
        assert torch.equal(memory.window_values, v[:, tokens])
        assert torch.equal(memory.window_log_gates, g[:, tokens])
        assert memory.length.tolist() == [rank * SHARD] * 2


def attend_on_this_rank(window: int, cu_seqlens: tuple[int, ...]) -> str:
    group = dist.group.WORLD
    assert group is not None
    q, k, v, g = Case(1, SHARD, 3).sequence()[0]
    try:
        context_parallel_attention(q, k, v, g, AttentionOptions(window), group=group, cu_seqlens=cu_seqlens)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def test_refusals_are_raised_by_every_rank_before_anything_is_sent(ranks: RankPool) -> None:
    for message in ranks.run(2, attend_on_this_rank, window=3, cu_seqlens=(0, 4, 11)):
        assert message.startswith(ConfigError.__name__) and "do not cut 10 tokens" in message


def test_one_rank_is_the_operator_alone(ranks: RankPool) -> None:
    cases = [Case(1, SHARD, 3), Case(1, SHARD, 3, cu_seqlens=(0, 2, 5))]
    assert_equals_one_rank(ranks, cases)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("shard", [1, 4])
def test_grid(ranks: RankPool, num_ranks: int, shard: int) -> None:
    tokens = num_ranks * shard
    windows = sorted({0, 1, shard - 1, shard, shard + 1, 3 * shard})
    documents = (None, (0, tokens // 3, tokens // 3 + 1, tokens), tuple(range(0, tokens + 1, shard)))
    cases = [
        Case(num_ranks, tokens, window, group_size=group, empty_slots=empty, rope="partial", cu_seqlens=cu_seqlens, seed=window)
        for window, group, empty, cu_seqlens in itertools.product(windows, (1, 4), ("attend", "mask", "weight"), documents)
    ]
    assert_equals_one_rank(ranks, cases)
