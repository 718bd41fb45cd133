"""What a micro batch reports."""

from __future__ import annotations

import torch

from nha_megatron.model.loss import loss_report


def test_report_counts_the_tokens_of_the_mask() -> None:
    loss_sum = torch.tensor(6.5, requires_grad=True)
    total, tokens, report = loss_report(loss_sum, loss_mask=torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
    assert total is loss_sum and tokens.item() == 3 and tokens.dtype is torch.int
    assert report.tolist() == [6.5, 3.0] and report.dtype is torch.float64 and not report.requires_grad
