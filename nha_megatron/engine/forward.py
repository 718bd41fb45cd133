"""One micro batch through the model, the same under every engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nha_megatron.layers.documents import Documents

if TYPE_CHECKING:
    from nha_megatron.data import Batch


def forward_batch(model: nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """The model's output (on the last stage the loss sum over the tokens that count) and the loss mask on `device`."""
    documents = Documents.on(device, batch.cu_seqlens) if batch.cu_seqlens is not None else None
    batch = batch.to(device)
    # Positions are relative to the window, and our layers read no attention mask.
    output = model(
        batch.tokens,
        position_ids=None,
        attention_mask=None,
        labels=batch.labels,
        loss_mask=batch.loss_mask,
        packed_seq_params=documents,
    )
    return output, batch.loss_mask
