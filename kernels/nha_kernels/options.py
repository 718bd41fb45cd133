"""How a layer attends, apart from its tensors: one object, built once, that goes unchanged from the layer to the launch of a kernel."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from .conventions import EmptySlots


@dataclass(frozen=True, eq=False)
class AttentionOptions:
    """Checked with the tensors of a call, because what is allowed depends on them.

    Attributes:
        window: W >= 0, counts the current token; 0 reads slots only; None never writes a slot (full attention).
        rope: inverse frequencies [rotary_dim / 2], rotary_dim <= K: the first rotary_dim channels of the window part rotate,
            halves paired. None: no rotation. Slots are never rotated.
        rope_attention_factor: multiplies the rotated channels of q and of k (YaRN), never the slot logits.
        scale: of all logits; None: K ** -0.5.
        empty_slots: `attend`, `mask` or `weight`, see `bias_slot_logits`.
    """

    window: int | None
    rope: Tensor | None = None
    rope_attention_factor: float = 1.0
    scale: float | None = None
    empty_slots: EmptySlots = "attend"

    def logit_scale(self, key_dim: int) -> float:
        return key_dim**-0.5 if self.scale is None else self.scale

    def to(self, device: torch.device) -> AttentionOptions:
        """These options with the frequencies on `device`."""
        if self.rope is None or self.rope.device == device:
            return self
        return dataclasses.replace(self, rope=self.rope.to(device))
