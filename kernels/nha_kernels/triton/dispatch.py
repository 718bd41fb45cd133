"""Which kernels serve a call, and with which tiles: one static table, no tuning at run time."""

import torch
from torch import Tensor

from .problem import Tiles


def choose_tiles(q: Tensor, k: Tensor, v: Tensor, g: Tensor, window: int) -> Tiles:
    exact = q.dtype == torch.float32
    wide = max(q.shape[3], v.shape[3]) > 128
    most = 16 if exact else 32 if wide else 64
    return Tiles(
        chunk=16,
        block=8 if exact else 16,
        slots=min(most, 1 << (g.shape[3] - 1).bit_length()),
        window=min(most, 64 if window > 32 else 32 if window > 16 else 16),
        read_warps=4 if exact else 8,
        key_warps=4 if exact else 8,
    )
