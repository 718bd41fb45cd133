"""The plan alone, without ranks: every window pair and every slot write exactly once, for any shards, window and documents."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings

from nha_megatron.config import ConfigError
from nha_megatron.layers.nha.context_parallel.plan import ContextParallelPlan, HaloTransfer, plan_context_parallel
from tests.layers.nha.context_parallel_cases import layouts

View = tuple[list[int], list[int]]  # tokens in the window (query included) and tokens in the slots, oldest first


def plans_of(shard: int, num_ranks: int, window: int, cu_seqlens: Sequence[int] | None) -> list[ContextParallelPlan]:
    return [
        plan_context_parallel(tokens_per_rank=shard, num_ranks=num_ranks, rank=rank, window=window, cu_seqlens=cu_seqlens)
        for rank in range(num_ranks)
    ]


def views_of_one_rank(total: int, window: int, cu_seqlens: Sequence[int] | None) -> list[View]:
    """What each query sees, by definition: the last W tokens of its document, and in the slots all older ones."""
    views = []
    for token in range(total):
        start = max(start for start in (cu_seqlens or (0,)) if start <= token)
        leaves = max(start, token - window + 1)
        views.append((list(range(leaves, token + 1)), list(range(start, leaves))))
    return views


def views_through_plans(plans: list[ContextParallelPlan]) -> list[View]:
    """What each query sees when every rank runs its shard token by token from the memory that the plans compose."""
    shard = plans[0].tokens_per_rank
    announced = {}
    for plan in plans:
        for piece in plan.pieces:
            announced[piece.number] = list(range(plan.rank * shard + piece.start, plan.rank * shard + piece.stop))
    views = []
    for plan in plans:
        window = [received.rank * shard + i for received in plan.receives for i in range(received.start, received.stop)]
        slots = [token for number in plan.initial for token in announced[number]]
        assert len(window) == plan.halo_tokens == min(plan.window, plan.length)
        for local in range(shard):
            if plan.cu_seqlens is not None and local > 0 and local in plan.cu_seqlens:
                window, slots = [], []
            window.append(plan.rank * shard + local)
            if len(window) > plan.window:
                slots.append(window.pop(0))
            views.append((list(window), list(slots)))
    return views


@settings(max_examples=300, deadline=None)
@given(layouts())
@example((4, 4, 6, (0, 3, 16)))
@example((4, 4, 4, (0, 4, 8, 12)))
def test_every_window_pair_and_every_slot_write_appears_exactly_once_and_in_order(layout: tuple) -> None:
    shard, num_ranks, window, cu_seqlens = layout
    plans = plans_of(*layout)
    assert views_through_plans(plans) == views_of_one_rank(shard * num_ranks, window, cu_seqlens)


@settings(max_examples=150, deadline=None)
@given(layouts())
def test_ranks_agree_on_every_message(layout: tuple) -> None:
    plans = plans_of(*layout)
    for receiver in plans:
        for sender in plans:
            received = [(t.start, t.stop) for t in receiver.receives if t.rank == sender.rank]
            assert received == [(t.start, t.stop) for t in sender.sends if t.rank == receiver.rank]
            assert receiver.receive_splits[sender.rank] == sender.send_splits[receiver.rank]
    assert len({len(plan.pieces) for plan in plans}) == 1, "the all-gather has one size on all ranks"


@settings(max_examples=150, deadline=None)
@given(layouts())
def test_the_backward_knows_who_used_each_piece_and_what_preceded_it(layout: tuple) -> None:
    plans = plans_of(*layout)
    for owner in plans:
        for piece in owner.pieces:
            users = [plan for plan in plans if piece.number in plan.initial]
            assert [plan.rank for plan in users] == list(piece.consumers)
            for i, plan in enumerate(users):
                assert plan.initial.stop - piece.number - 1 == piece.followers + i * len(owner.pieces)
                # The gradient of a piece's decay needs the slots before it: the same for all users.
                assert list(range(plan.initial.start, piece.number)) == list(piece.before)


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_documents_inside_the_shard_start_at_zero_and_cover_it(layout: tuple) -> None:
    for plan in plans_of(*layout):
        if plan.cu_seqlens is not None:
            assert plan.cu_seqlens[0] == 0 and plan.cu_seqlens[-1] == plan.tokens_per_rank
            assert all(a < b for a, b in pairwise(plan.cu_seqlens))


def test_the_first_drawing() -> None:
    plans = plans_of(8, 4, 3, None)
    assert plans[2].receives == (HaloTransfer(rank=1, start=5, stop=8),)
    assert plans[2].sends == (HaloTransfer(rank=3, start=5, stop=8),)
    assert plans[2].initial == range(0, 3)
    assert [(piece.start, piece.stop) for piece in plans[2].pieces] == [(0, 5), (5, 8)]


def test_the_second_drawing() -> None:
    plans = plans_of(4, 4, 6, (0, 3, 16))
    assert plans[3].receives == (HaloTransfer(rank=1, start=2, stop=4), HaloTransfer(rank=2, start=0, stop=4))
    assert plans[3].initial == range(1, 3)
    assert [(piece.start, piece.stop) for piece in plans[0].pieces] == [(0, 2), (3, 4)]
    assert plans[0].cu_seqlens == (0, 3, 4) and plans[1].length == 1


@pytest.mark.parametrize("start_of_second", [9, 13, 16])
def test_a_document_that_starts_in_the_halo_clears_the_slots_though_no_announced_piece_contains_it(
    start_of_second: int,
) -> None:
    plan = plans_of(8, 3, 7, (0, start_of_second))[2]
    assert len(plan.initial) == 0 and plan.halo_tokens == 16 - start_of_second


def test_a_piece_that_no_rank_composes_is_not_announced() -> None:
    assert [len(plan.pieces) for plan in plans_of(8, 2, 3, None)] == [1, 1], "the last 3 tokens of rank 0 are only in the halo of rank 1"
    assert [len(plan.pieces) for plan in plans_of(8, 3, 16, None)] == [0, 0, 0], "no token has left the window where the last shard starts"
    assert [len(plan.pieces) for plan in plans_of(8, 3, 3, (0, 7, 15, 23))] == [0, 0, 0], "no document reaches into a later shard's slots"
    assert [len(plan.pieces) for plan in plans_of(8, 3, 8, None)] == [1, 1, 1], "W = L: whole shards"


def test_one_rank_exchanges_nothing() -> None:
    (plan,) = plans_of(8, 1, 3, (0, 5, 8))
    assert plan.receives == plan.sends == plan.pieces == () and plan.length == 0 and plan.cu_seqlens == (0, 5, 8)


@pytest.mark.parametrize("cu_seqlens", [(), (1, 16), (0, 17), (0, 9, 5, 16)])
def test_documents_that_do_not_fit_the_tokens_are_refused(cu_seqlens: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="do not cut 16 tokens into documents"):
        plan_context_parallel(tokens_per_rank=8, num_ranks=2, rank=0, window=3, cu_seqlens=cu_seqlens)
