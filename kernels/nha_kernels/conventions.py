"""Conventions that every backend shares: gate clamp, accumulation precision, what an empty slot does in the softmax."""

from typing import Literal, get_args

import torch
from torch import Tensor

EmptySlots = Literal["attend", "mask", "weight"]
EMPTY_SLOTS: tuple[str, ...] = get_args(EmptySlots)

# exp(-40) is below float64 rounding of 1, so a slower decay cannot be told from it, and no product of exponentials overflows.
LOG_GATE_MIN = -40.0


def clamp_log_gates(g: Tensor) -> Tensor:
    """Log-gates as all backends use them: at least `LOG_GATE_MIN` per token."""
    return g.clamp(min=LOG_GATE_MIN)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def write_strength(log_gate: Tensor) -> Tensor:
    """1 - exp(g). `expm1` keeps the digits that the subtraction loses: at z = 16 all of them in float32."""
    return -torch.expm1(log_gate)


def slot_log_mass(slot_log_decay: Tensor) -> Tensor:
    """log(1 - exp(slot_log_decay)): the log of the mass a slot holds, -inf (and no gradient) where it holds nothing.

    Masses below the smallest normal number count as nothing, because 1 / mass would overflow in the backward.
    """
    mass = write_strength(slot_log_decay)
    holds_something = mass > torch.finfo(mass.dtype).tiny
    log_mass = torch.log(torch.where(holds_something, mass, 1.0))
    return torch.where(holds_something, log_mass, -torch.inf)


def bias_slot_logits(logits: Tensor, empty_slots: EmptySlots, *, anything_written: Tensor, slot_log_decay: Tensor) -> Tensor:
    """Apply the `empty_slots` convention to slot logits.

    Args:
        logits: [..., M].
        empty_slots: `attend` leaves them (an empty slot has logit 0 and takes mass), `mask` leaves all slots out until the first
            token of the document has been written, `weight` adds the log of the mass that each slot holds.
        anything_written: bool, broadcastable to [..., 1].
        slot_log_decay: broadcastable to [..., M].
    """
    if empty_slots == "attend":
        return logits
    if empty_slots == "mask":
        return torch.where(anything_written, logits, -torch.inf)
    return logits + slot_log_mass(slot_log_decay)


def softmax_with_logsumexp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis and its log-sum-exp; a row of only -inf gives probabilities 0 and -inf, with zero gradients."""
    largest = logits.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    exponentials = torch.exp(logits - largest)
    total = exponentials.sum(-1, keepdim=True)
    nothing = total == 0
    safe_total = torch.where(nothing, 1.0, total)
    logsumexp = torch.where(nothing, -torch.inf, torch.log(safe_total) + largest)
    return exponentials / safe_total, logsumexp.squeeze(-1)
