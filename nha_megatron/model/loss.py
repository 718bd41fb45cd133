"""What a micro batch reports: sums, so that any layout divides once by the same total."""

from __future__ import annotations

import torch
from torch import Tensor


def loss_report(loss_sum: Tensor, *, loss_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What Megatron's schedules expect under `calculate_per_token_loss`.

    Args:
        loss_sum: scalar, the loss summed over the tokens that count.
        loss_mask: [b, s], 1 where a token counts, else 0.

    Returns:
        The loss sum (differentiable), the number of counted tokens (int), and both once more as a float64 pair [2] for the report.
    """
    num_tokens = loss_mask.sum().to(torch.int)
    return loss_sum, num_tokens, torch.stack([loss_sum.detach().double(), num_tokens.double()])
