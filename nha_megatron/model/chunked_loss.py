"""Output matrix and vocabulary-parallel cross entropy in one operation that never holds the logits of all tokens.

At 128k tokens and a vocabulary of 128k the logits alone are 64 GB in fp32. Here tokens are taken a chunk at a time: their logits, their
losses, and at once the gradients of the chunk's hidden states and of the weight, so that the logits can be dropped (as in Liger
Kernel's fused linear cross entropy, Hsu et al. 2024, arXiv 2410.10989). The backward only scales what the forward has computed.

    for a chunk of tokens:   gather hidden states (SP)  ->  logits = hidden @ weight.T      [c, V / tp], fp32
                             all-reduce over TP: the maximum; then the sum of exponentials and the label's logit, together
                             d logits = mask (softmax - one hot), in place
                             d hidden = d logits @ weight, summed over TP (SP: reduce-scattered);  d weight += d logits.T @ hidden

Held at once: one chunk of logits, the gradient of the hidden states, and the gradient of the weight in fp32.

Letters: s tokens of a row, b rows, h hidden size, V padded vocabulary, r = tp under sequence parallelism, else 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nha_kernels.first_order import first_order_only


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    vocab_size: int,
    chunk_tokens: int,
    tp_group: dist.ProcessGroup,
    sequence_parallel: bool,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross entropy of the next token over the real vocabulary, summed over the tokens that count.

    Args:
        hidden: [s / r, b, h] as the last layer leaves it: the same on all TP ranks, under sequence parallelism their parts of the row.
        weight: [V / tp, h], this TP rank's rows of the output matrix, in the dtype of `hidden`.
        labels: [b, s] token ids; where the mask is 0 any valid id.
        loss_mask: [b, s], the weight of each token's loss: 1 where it counts, else 0.
        vocab_size: tokens of the tokenizer. The columns beyond it are padding: they are left out of the softmax, as in the exported model.
        chunk_tokens: tokens whose logits are held at once, over all rows and ranks of a row.
        tp_group: the ranks that share the vocabulary.
        sequence_parallel: whether they also share the tokens of `hidden`.
        z_loss: factor of log(Z)^2 of every token that counts, Z its softmax's denominator (Chowdhery et al. 2022, PaLM). The gradients are
            those of cross entropy and this term; the value is cross entropy alone, so that losses compare whatever the factor.

    Returns:
        The sum, a scalar in fp32, the same on all TP ranks. Its gradients can be taken once, and not differentiated again.
    """
    # Inside an autograd function gradients are always off, so it cannot see for itself whether anybody will ask for them.
    arguments = (hidden, weight, labels, loss_mask, vocab_size, chunk_tokens, tp_group, sequence_parallel, z_loss, torch.is_grad_enabled())
    return _LinearCrossEntropy.apply(*arguments)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor,
        vocab_size: int,
        chunk_tokens: int,
        tp_group: dist.ProcessGroup,
        sequence_parallel: bool,
        z_loss: float,
        with_gradients: bool,
    ) -> Tensor:
        parts = tp_group.size() if sequence_parallel else 1
        rows, batch = hidden.shape[:2]
        # [r, s / r, b]: the place in the row that each rank's part of it has.
        labels, loss_mask = (tensor.t().reshape(parts, rows, batch) for tensor in (labels, loss_mask.float()))
        losses = torch.empty(parts, rows, batch, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_gradients and ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_gradients and ctx.needs_input_grad[1] else None
        step = max(1, chunk_tokens // (parts * batch))
        for start in range(0, rows, step):
            own = slice(start, start + step)
            chunk = _gather(hidden[own], tp_group, parts).flatten(0, 1)
            mask = loss_mask[:, own].flatten()
            losses_chunk, grad_logits = _cross_entropy(chunk @ weight.t(), labels[:, own].flatten(), mask, vocab_size, tp_group, z_loss)
            losses[:, own] = losses_chunk.view(parts, -1, batch)
            if grad_hidden is None and grad_weight is None:
                continue
            grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[own] = _sum_over_ranks(grad_logits @ weight, tp_group, parts).view(-1, batch, hidden.shape[-1])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.t(), chunk)
        ctx.gradients = (grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        # In double, so that the order of the tokens, another under sequence parallelism, does not show.
        return (losses * loss_mask).sum(dtype=torch.float64).float()

    @staticmethod
    @first_order_only("Call the model without labels and take the cross entropy of its logits")
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the gradients of linear_cross_entropy can be taken once: they are scaled in place"
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        if grad_hidden is not None:
            grad_hidden.mul_(grad_loss)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *[None] * 8


def _cross_entropy(
    logits: Tensor, labels: Tensor, mask: Tensor, vocab_size: int, tp_group: dist.ProcessGroup, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Losses [c] before the mask, and the gradient of their masked sum by the logits [c, V / tp], in fp32. Overwrites fp32 logits."""
    columns = logits.shape[-1]
    first = tp_group.rank() * columns
    logits = logits.float()
    # The smallest number, not -inf: the maximum of a rank that holds only padding must stay finite.
    logits[:, max(0, vocab_size - first) :] = torch.finfo(torch.float32).min
    maximum = logits.amax(-1)
    if tp_group.size() > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=tp_group)
    logits -= maximum.unsqueeze(-1)

    ours = (labels >= first) & (labels < first + columns)
    column = torch.where(ours, labels - first, 0)
    label_logit = torch.where(ours, logits.gather(-1, column.unsqueeze(-1)).squeeze(-1), 0.0)
    probabilities = logits.exp_()
    sums = torch.stack([probabilities.sum(-1), label_logit])
    if tp_group.size() > 1:
        dist.all_reduce(sums, group=tp_group)
    total, label_logit = sums
    losses = total.log() - label_logit

    scale = mask / total
    if z_loss:  # d log(Z)^2 / d logits = 2 log(Z) softmax, Z of the logits before the maximum was subtracted
        scale = scale * (1 + 2 * z_loss * (total.log() + maximum))
    grad_logits = probabilities.mul_(scale.unsqueeze(-1))
    grad_logits[torch.arange(labels.numel(), device=labels.device), column] -= mask * ours
    return losses, grad_logits


def _gather(part: Tensor, tp_group: dist.ProcessGroup, parts: int) -> Tensor:
    """[c / r, b, h] of each rank -> [c, b, h], in rank order."""
    if parts == 1:
        return part
    whole = part.new_empty(parts * part.shape[0], *part.shape[1:])
    dist.all_gather_into_tensor(whole, part.contiguous(), group=tp_group)
    return whole


def _sum_over_ranks(partial: Tensor, tp_group: dist.ProcessGroup, parts: int) -> Tensor:
    """Every rank's columns of the vocabulary give one summand [c b, h]. Returns the sum, or this rank's part of its rows."""
    if parts > 1:
        own = partial.new_empty(partial.shape[0] // parts, partial.shape[1])
        dist.reduce_scatter_tensor(own, partial, group=tp_group)
        return own
    if tp_group.size() > 1:
        dist.all_reduce(partial, group=tp_group)
    return partial


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, accumulated in fp32: each chunk is rounded, their sum is not."""
    if left.dtype is total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
