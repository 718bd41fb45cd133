"""Composing slots from announced pieces, and its derivative. Local arithmetic on gathered tensors.

A piece of tokens maps the slots before it to exp(log_decay) * slots + update. Both travel in one tensor with the channels
[update of slot keys | update of slot values | log_decay], C = K + V + 1, in float32 (float64 for float64).
"""

import torch
from torch import Tensor

from .plan import ContextParallelPlan, Piece


def compose_slots(announced: Tensor, pieces: range) -> Tensor:
    """Slots after `pieces`, written in order into empty slots.

    Args:
        announced: [N, B, H, M, C], all pieces of all ranks.
        pieces: consecutive numbers; none gives empty slots.

    Returns:
        [B, H, M, C]: slot keys, slot values and log-decay of all of them. A tensor of its own: `announced` may go.
    """
    if len(pieces) == 1:
        return announced[pieces.start].clone()
    if not pieces:
        return announced.new_zeros(announced.shape[1:])
    update, log_decay = announced[pieces.start : pieces.stop].split([announced.shape[-1] - 1, 1], dim=-1)
    return torch.cat([(torch.exp(_sums_behind(log_decay)) * update).sum(0), log_decay.sum(0)], dim=-1)


def piece_gradient(plan: ContextParallelPlan, piece: Piece, slot_gradients: Tensor, log_decays: Tensor, slots_before: Tensor) -> Tensor:
    """Gradient of one announced piece from the gradients of all initial slots that contain it.

        update:     G = sum over consumers of exp(log-decay of the pieces behind this one) * gradient of the consumer's slots
        log_decay:  sum over consumers of the gradient of their log-decay, and <G, exp(log_decay) * slots_before> over the channels

    Args:
        slot_gradients: [R, B, H, M, C], gradient of every rank's composed slots.
        log_decays: [N, B, H, M, 1] of all pieces.
        slots_before: [B, H, M, C] composed of `piece.before`.

    Returns:
        [B, H, M, C].
    """
    consumers = slot_gradients[piece.consumers.start : piece.consumers.stop]
    if len(consumers) == 1 and not piece.followers and not piece.before:
        return consumers[0]
    d_slots, d_log_decay = consumers.split([consumers.shape[-1] - 1, 1], dim=-1)
    last = piece.number + 1 + piece.followers + max(len(piece.consumers) - 1, 0) * len(plan.pieces)
    behind = _sums_up_to(log_decays[piece.number + 1 : last])[piece.followers :: len(plan.pieces)]
    d_update = (torch.exp(behind[: len(piece.consumers)]) * d_slots).sum(0)
    decayed = torch.exp(log_decays[piece.number]) * slots_before[..., :-1]
    return torch.cat([d_update, d_log_decay.sum(0) + (d_update * decayed).sum(-1, keepdim=True)], dim=-1)


# Sums are added up, never formed as differences of cumulative sums: a piece of a million tokens with closed gates has a log-decay
# of -4e7, against which a float32 difference loses everything. A masked sum instead of `cumsum`, which is not deterministic on CUDA.


def _sums_behind(terms: Tensor) -> Tensor:
    """Entry i: sum of the terms behind i. Same shape [N, ...]."""
    return _masked_sums(terms, torch.ones(len(terms), len(terms), dtype=torch.bool, device=terms.device).triu(1))


def _sums_up_to(terms: Tensor) -> Tensor:
    """Entry i: sum of the first i terms. [N + 1, ...]."""
    return _masked_sums(terms, torch.ones(len(terms) + 1, len(terms), dtype=torch.bool, device=terms.device).tril(-1))


def _masked_sums(terms: Tensor, taken: Tensor) -> Tensor:
    mask = taken.view(*taken.shape, *[1] * (terms.dim() - 1))
    return torch.where(mask, terms, 0.0).sum(1)
