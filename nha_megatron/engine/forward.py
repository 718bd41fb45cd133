"""One micro batch through the model, the same under every engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from nha_megatron.engine.layout import Layout
from nha_megatron.layers.documents import Documents

if TYPE_CHECKING:
    from nha_megatron.data import Batch


def forward_batch(model: nn.Module, batch: Batch, layout: Layout) -> tuple[Tensor, Tensor]:
    """The model's output (on the last pipeline stage the loss sum over the tokens that count) and the loss mask on the device."""
    documents = None if batch.cu_seqlens is None else _documents(batch.cu_seqlens, layout)
    batch = batch.to(layout.device)
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


def _documents(cu_seqlens: Tensor, layout: Layout) -> Documents:
    """The boundaries where attention reads them: on the device, or on the host, where exchanges between context ranks are planned.

    There each layer cuts its own boundaries out of these, so that no device needs those of the whole rows.
    """
    if layout.cp_size > 1:
        return Documents(boundaries=tuple(cu_seqlens.tolist()))
    return Documents.on(layout.device, cu_seqlens)
