"""Next-token loss: a sum over counted tokens, and their number, so that any layout divides once by the same total."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor


def language_model_loss(
    logits: Tensor, labels: Tensor, loss_mask: Tensor, *, vocab_size: int, tp_rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy over the real vocabulary, summed over the tokens that count.

    Args:
        logits: [b, s, padded vocabulary / tp], this TP rank's columns. Overwritten.
        labels: [b, s] token ids; where the mask is 0 any valid id.
        loss_mask: [b, s], 1 where a token counts, else 0.
        vocab_size: tokens of the tokenizer. The columns beyond it are padding: they are left out of the softmax, as in the exported model.
        tp_rank: this rank's place in the tensor-parallel group.

    Returns:
        What Megatron's schedules expect under `calculate_per_token_loss`: the loss sum (fp32, differentiable), the number of counted tokens
        (int), and both once more as a float64 pair [2] for the report.
    """
    first_padding = max(0, vocab_size - tp_rank * logits.shape[-1])
    if first_padding < logits.shape[-1]:
        # The smallest number, not -inf: the maximum of a rank that holds only padding must stay finite.
        logits[..., first_padding:] = torch.finfo(logits.dtype).min
    token_losses = vocab_parallel_cross_entropy(logits.float(), labels)
    loss_sum = (token_losses * loss_mask).sum()
    num_tokens = loss_mask.sum().to(torch.int)
    return loss_sum, num_tokens, torch.stack([loss_sum.detach().double(), num_tokens.double()])
