"""The vocabulary-parallel loss against plain cross entropy over the real vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nha_megatron.engine.layout import create_layout
from nha_megatron.model.loss import language_model_loss
from tests.distributed import RankPool
from tests.engine.programs import CPU, tiny_config

PADDED = 128


def batch(vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Large numbers in the padding too: they must not count.
    logits = 5 * torch.randn(2, 7, PADDED, generator=generator)
    labels = torch.randint(0, vocabulary, (2, 7), generator=generator)
    return logits, labels, (torch.rand(2, 7, generator=generator) < 0.6).float()


def loss_on_rank(vocabulary: int) -> tuple[float, int, list[float], Tensor]:
    layout = create_layout(tiny_config(parallel={"tensor": torch.distributed.get_world_size()}), CPU)
    logits, labels, mask = batch(vocabulary)
    leaf = logits.chunk(layout.tp_size, -1)[layout.tp_rank].clone().requires_grad_()
    loss_sum, tokens, report = language_model_loss(leaf * 1.0, labels, mask, vocab_size=vocabulary, tp_rank=layout.tp_rank)
    loss_sum.backward()
    return loss_sum.item(), tokens.item(), report.tolist(), leaf.grad  # type: ignore[return-value]


# 50 of 128: the second of two ranks, and the last two of four, hold nothing but padding.
@pytest.mark.parametrize("vocabulary", [128, 100, 50])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_loss_and_gradient_leave_the_padding_out(ranks: RankPool, vocabulary: int, tp_size: int) -> None:
    logits, labels, mask = batch(vocabulary)
    logits.requires_grad_()
    expected = (F.cross_entropy(logits[..., :vocabulary].flatten(0, 1), labels.flatten(), reduction="none") * mask.flatten()).sum()
    expected.backward()
    results = ranks.run(tp_size, loss_on_rank, vocabulary=vocabulary)
    for loss, tokens, report, _ in results:
        # fp32 sums over at most 128 columns and 14 tokens.
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        assert tokens == mask.sum() and report == pytest.approx([loss, tokens])
    gradient = torch.cat([result[3] for result in results], -1)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-5, atol=1e-6)
    assert not gradient[..., vocabulary:].any()
