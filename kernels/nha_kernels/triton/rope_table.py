"""Cosines and sines by distance, in one launch. Angles are formed in float64; the table is as long as a tile reaches."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def fill_table(frequencies, cos, sin, factor, num_offsets, PAIRS: tl.constexpr, HALF_WIDTH: tl.constexpr, BO: tl.constexpr):
    offset = tl.program_id(0) * BO + tl.arange(0, BO)
    pair = tl.arange(0, HALF_WIDTH)
    turns = pair < PAIRS
    frequency = tl.load(frequencies + pair, mask=turns, other=0.0).to(tl.float64)
    angle = offset[:, None].to(tl.float64) * frequency[None, :]
    scale = tl.where(turns, factor, 1.0)[None, :]  # channels that do not rotate keep their length
    at = offset[:, None] * HALF_WIDTH + pair[None, :]
    ok = (offset < num_offsets)[:, None]
    tl.store(cos + at, (tl.cos(angle) * scale).to(tl.float32), mask=ok)
    tl.store(sin + at, (tl.sin(angle) * scale).to(tl.float32), mask=ok)


def rope_table(frequencies: Tensor, factor: float, num_offsets: int, key_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[num_offsets, key_dim / 2] each, float32: the first `len(frequencies)` pairs of channels rotate."""
    cos = torch.empty(num_offsets, key_dim // 2, dtype=torch.float32, device=device)
    sin = torch.empty_like(cos)
    block = 16
    fill_table[(triton.cdiv(num_offsets, block),)](
        frequencies, cos, sin, factor, num_offsets, PAIRS=frequencies.shape[0], HALF_WIDTH=key_dim // 2, BO=block
    )
    return cos, sin
