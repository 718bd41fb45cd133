"""Which kernels serve a call, and with which tiles: one static table, no tuning at run time."""

import torch
from torch import Tensor

from .problem import Tiles


def choose_tiles(q: Tensor, k: Tensor, v: Tensor, g: Tensor, window: int) -> Tiles:
    group = q.shape[2] // k.shape[2]
    exact = q.dtype == torch.float32
    block = 8 if exact else 16
    return Tiles(
        chunk=16,
        block=block,
        slots=min(64, 1 << (g.shape[3] - 1).bit_length()),
        window=64 if window > 32 else 32 if window > 16 else 16,
        forward_warps=4,
        query_warps=4 if exact else 8,
        key_warps=4 if exact else 8,
    )
