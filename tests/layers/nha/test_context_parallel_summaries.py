"""Composition of announced pieces and its hand-written derivative, for all ranks of a plan in one process."""

import torch
from hypothesis import given, settings
from torch import Tensor

from nha_megatron.layers.nha.context_parallel.plan import plan_context_parallel
from nha_megatron.layers.nha.context_parallel.summaries import compose_slots, piece_gradient
from tests.layers.nha.context_parallel_cases import layouts, relative_error

SHAPE = (2, 1, 3, 5)  # B, H, M, C


def random_pieces(count: int, seed: int = 0) -> Tensor:
    pieces = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pieces[..., -1] = -pieces[..., -1].abs()
    return pieces


def test_composition_is_the_recurrence_over_pieces() -> None:
    pieces = random_pieces(6)
    slots, log_decay = torch.zeros(*SHAPE[:-1], SHAPE[-1] - 1, dtype=torch.float64), torch.zeros(*SHAPE[:-1], dtype=torch.float64)
    for piece in pieces[1:5]:
        slots, log_decay = torch.exp(piece[..., -1:]) * slots + piece[..., :-1], log_decay + piece[..., -1]
    composed = compose_slots(pieces, range(1, 5))
    # Four products and sums in another order: a few float64 roundings.
    torch.testing.assert_close(composed[..., :-1], slots, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(composed[..., -1], log_decay, rtol=1e-14, atol=1e-14)


def test_no_pieces_give_empty_slots() -> None:
    assert torch.equal(compose_slots(random_pieces(4), range(2, 2)), torch.zeros(SHAPE, dtype=torch.float64))


def test_a_huge_log_decay_ahead_does_not_disturb_what_is_written_behind_it() -> None:
    pieces = random_pieces(3).float()
    slots = compose_slots(pieces, range(3))[..., :-1]
    pieces[0, ..., -1] = -4e7  # a million closed gates; differences of cumulative float32 sums would be off by up to 2
    assert torch.equal(compose_slots(pieces, range(3))[..., :-1], slots)


@settings(max_examples=150, deadline=None)
@given(layouts())
def test_the_derivative_equals_autograd_through_the_composition(layout: tuple) -> None:
    shard, num_ranks, window, cu_seqlens = layout
    plans = [
        plan_context_parallel(tokens_per_rank=shard, num_ranks=num_ranks, rank=rank, window=window, cu_seqlens=cu_seqlens)
        for rank in range(num_ranks)
    ]
    announced = random_pieces(sum(len(plan.pieces) for plan in plans)).requires_grad_()
    slot_gradients = random_pieces(num_ranks, seed=1)
    slots = torch.stack([compose_slots(announced, plan.initial) for plan in plans])
    (wanted,) = torch.autograd.grad(slots, announced, slot_gradients) if slots.requires_grad else (None,)
    for plan in plans:
        for piece in plan.pieces:
            assert wanted is not None, "a piece is announced only where some rank composes it"
            before = compose_slots(announced.detach(), piece.before)
            given_ = piece_gradient(plan, piece, slot_gradients, announced.detach()[..., -1:], before)
            # The same sums of at most 12 terms in another order.
            assert relative_error(given_, wanted[piece.number]) <= 1e-13
