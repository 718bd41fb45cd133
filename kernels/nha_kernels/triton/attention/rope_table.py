"""Cosines and sines by distance, in one launch. Angles are formed in float64; the table is as long as a tile reaches."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import LENGTHS


@triton.jit(do_not_specialize=LENGTHS)
def fill_table(frequencies, cos, sin, factor, num_offsets, PAIRS: tl.constexpr, HALF_WIDTH: tl.constexpr, BO: tl.constexpr):
    offset = tl.program_id(0) * BO + tl.arange(0, BO)
    pair = tl.arange(0, HALF_WIDTH)
    turns = pair < PAIRS
    frequency = tl.load(frequencies + pair, mask=turns, other=0.0).to(tl.float64)
    angle = offset[:, None].to(tl.float64) * frequency[None, :]
    scale = tl.where(turns, factor, 1.0)[None, :]  # channels that do not rotate keep their length
    at = offset[:, None] * HALF_WIDTH + pair[None, :]
    ok = (offset < num_offsets)[:, None]
    tl.store(cos + at, (tl.cos(angle) * scale).to(cos.dtype.element_ty), mask=ok)
    tl.store(sin + at, (tl.sin(angle) * scale).to(sin.dtype.element_ty), mask=ok)


def rope_table(frequencies: Tensor, factor: float, num_offsets: int, key: Tensor) -> tuple[Tensor, Tensor]:
    """[num_offsets, key_dim / 2] each for keys like `key`: the first `len(frequencies)` pairs of channels rotate.

    Float16 where the keys are 16 bits wide: its 2^-12 vanishes beside the rounding of a rotated bf16 key, and half the bytes are read.
    """
    key_dim, device = key.shape[-1], key.device
    dtype = torch.float32 if key.dtype == torch.float32 else torch.float16
    cos = torch.empty(num_offsets, key_dim // 2, dtype=dtype, device=device)
    sin = torch.empty_like(cos)
    block = 16
    fill_table[(triton.cdiv(num_offsets, block),)](
        frequencies.contiguous(), cos, sin, factor, num_offsets, PAIRS=frequencies.shape[0], HALF_WIDTH=key_dim // 2, BO=block
    )
    return cos, sin
