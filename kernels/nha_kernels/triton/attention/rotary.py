"""Rotation of all heads for the libraries of wide windows, which take rotated queries and keys.

One program takes a few tokens: their angles are formed once, in float64 from the position in the document, and serve every head.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...first_order import first_order_only

_TOKENS = 4  # of a program


@triton.jit
def rotate_heads(
    x,  # [B, T, H, K]
    positions,  # [B or 1, T]
    frequencies,
    out,
    factor,
    T,
    H,
    position_stride,  # from a row of the batch to the next: T or 0
    first_position,  # used without POSITIONS
    K: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRS_WIDTH: tl.constexpr,  # powers of two that hold PAIRS and the channels that do not rotate
    REST_WIDTH: tl.constexpr,
    POSITIONS: tl.constexpr,
    INVERSE: tl.constexpr,
    BT: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    token_ok = token < T
    pair = tl.arange(0, PAIRS_WIDTH)
    if POSITIONS:
        position = tl.load(positions + b * position_stride + token, mask=token_ok, other=0)
    else:
        position = first_position + token
    frequency = tl.load(frequencies + pair, mask=pair < PAIRS, other=0.0).to(tl.float64)
    angle = position[:, None].to(tl.float64) * frequency[None, :]
    cos = tl.cos(angle).to(tl.float32) * factor
    sin = tl.sin(angle).to(tl.float32) * factor
    if INVERSE:
        sin = -sin
    ok = token_ok[:, None] & (pair < PAIRS)[None, :]
    rest = 2 * PAIRS + tl.arange(0, REST_WIDTH)
    rest_ok = token_ok[:, None] & (rest < K)[None, :]
    at_token = (b * T + token) * H * K
    for h in range(0, H):
        at = (at_token + h * K)[:, None] + pair[None, :]
        first = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
        second = tl.load(x + at + PAIRS, mask=ok, other=0.0).to(tl.float32)
        tl.store(out + at, (first * cos - second * sin).to(out.dtype.element_ty), mask=ok)
        tl.store(out + at + PAIRS, (second * cos + first * sin).to(out.dtype.element_ty), mask=ok)
        if 2 * PAIRS < K:
            at_rest = (at_token + h * K)[:, None] + rest[None, :]
            tl.store(out + at_rest, tl.load(x + at_rest, mask=rest_ok), mask=rest_ok)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor | None, frequencies: Tensor, factor: float, first_position: int) -> Tensor:
        ctx.save_for_backward(positions, frequencies)
        ctx.factor, ctx.first_position = factor, first_position
        return _rotate(x, positions, frequencies, factor, first_position, inverse=False)

    @staticmethod
    @first_order_only("Use backend='torch', which has them all")
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        positions, frequencies = ctx.saved_tensors
        return _rotate(d_out, positions, frequencies, ctx.factor, ctx.first_position, inverse=True), None, None, None, None


def rotated_heads(x: Tensor, positions: Tensor | None, frequencies: Tensor, factor: float, *, first_position: int = 0) -> Tensor:
    """x [B, T, H, K] with its first 2 len(frequencies) channels rotated and multiplied by `factor`, in x's dtype.

    Args:
        positions: [B or 1, T] int64 positions in the document, or None for `first_position` + 0, 1, ...
    """
    return _Rotate.apply(x, positions, frequencies, factor, first_position)


def _rotate(x: Tensor, positions: Tensor | None, frequencies: Tensor, factor: float, first_position: int, *, inverse: bool) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    batch, num_tokens, num_heads, dim = x.shape
    pairs = frequencies.shape[0]
    positions = None if positions is None else positions.contiguous()
    rotate_heads[(triton.cdiv(num_tokens, _TOKENS), batch)](
        x,
        frequencies if positions is None else positions,  # never read without positions
        frequencies.contiguous(),
        out,
        factor,
        num_tokens,
        num_heads,
        0 if positions is None or positions.shape[0] == 1 else num_tokens,
        first_position,
        K=dim,
        PAIRS=pairs,
        PAIRS_WIDTH=triton.next_power_of_2(pairs),
        REST_WIDTH=triton.next_power_of_2(max(1, dim - 2 * pairs)),
        POSITIONS=positions is not None,
        INVERSE=inverse,
        BT=_TOKENS,
        num_warps=4,
    )
    return out
