"""What mask and positions of a batch say: padding, or packed documents.

Packed documents see nothing of each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nha_megatron.layers.modeling import TokenPlacement


def token_placement(shape: torch.Size, attention_mask: Tensor | None, position_ids: Tensor | None, past: int) -> TokenPlacement:
    """What mask and positions say about [B, T] new tokens after `past` positions.

    Raises:
        ValueError: they describe something that this model cannot compute exactly.
    """
    batch, length = shape
    real = None
    if attention_mask is not None:
        if attention_mask.shape != (batch, past + length):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: this model takes one entry per token, "
                f"({batch}, {past + length}) for {past} cached and {length} new positions"
            )
        real = attention_mask[:, past:].bool()
        real = None if bool(real.all()) else real
    if position_ids is None or length < 2:
        return TokenPlacement(real)
    step = position_ids.diff(dim=-1)
    regular = step == 1
    if real is not None:  # positions of padding mean nothing
        regular = regular | ~(real[:, 1:] & real[:, :-1])
    if bool(regular.all()):
        return TokenPlacement(real)
    if real is not None or past or position_ids.shape != (batch, length) or not bool((regular | (position_ids[:, 1:] == 0)).all()):
        raise ValueError(
            "position_ids must count up by one, because this model uses distances between tokens only. Packed documents, which start "
            f"again at 0, need positions of shape ({batch}, {length}) and neither padding nor a cache"
        )
    start = torch.ones_like(position_ids, dtype=torch.bool)
    start[:, 1:] = ~regular
    end = torch.tensor([start.numel()], device=start.device)
    return TokenPlacement(cu_seqlens=torch.cat([start.flatten().nonzero().squeeze(1), end]).int())
