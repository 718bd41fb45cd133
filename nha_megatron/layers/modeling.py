"""What the modelling files of exported models share, whatever the kind of a layer. Plain PyTorch: its source is inlined there.

An attention class is built with (config, layer_idx) and called with (hidden_states [B, T, h], rope, placement, cache). It keeps what it
remembers with `cache.store(layer_idx, state)` and finds it in `cache.states[layer_idx]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerState(Protocol):
    """What a layer remembers of each sequence of a batch."""

    length: Tensor  # int64 [B]: tokens seen, padding not counted

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerState:
        """The state with every tensor replaced."""

    def select_rows(self, rows: Tensor) -> LayerState:
        """The state of these sequences of the batch, in this order."""


class TokenPlacement(NamedTuple):
    """Where the tokens of each sequence are in the batch. Both None: every row is one sequence without padding. A cache is never given
    with `cu_seqlens`."""

    real: Tensor | None = None  # bool [B, T]: False is padding, which is treated as if it were not there
    cu_seqlens: Tensor | None = None  # int32 [N + 1]: document boundaries among the real tokens of the flattened batch


class NHARMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps).to(x.dtype)
