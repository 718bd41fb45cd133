"""Rotation of whole tensors in one pass, for attention kernels that do not rotate themselves. Differentiable."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .common import channel_halves, rotate

_ROWS = 32


@triton.jit
def rotate_rows(
    x,  # [B, T, H, K]
    out,
    cos,  # [T, PAIRS] float32
    sin,
    T,
    num_rows,  # B T H
    direction,  # 1, or -1 for the transpose
    H: tl.constexpr,
    K: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = (row < num_rows)[:, None]
    pair = tl.arange(0, K // 2)
    turns = ok & (pair < PAIRS)[None, :]
    first, second = channel_halves(pair, K, PAIRS)
    at_angle = ((row // H) % T)[:, None] * PAIRS + pair[None, :]
    c = tl.load(cos + at_angle, mask=turns, other=1.0)  # channels that do not rotate stay as they are
    s = tl.load(sin + at_angle, mask=turns, other=0.0) * direction
    x1 = tl.load(x + row[:, None] * K + first[None, :], mask=ok, other=0.0)
    x2 = tl.load(x + row[:, None] * K + second[None, :], mask=ok, other=0.0)
    r1, r2 = rotate(x1.to(tl.float32), x2.to(tl.float32), c, s)
    tl.store(out + row[:, None] * K + first[None, :], r1.to(x1.dtype), mask=ok)
    tl.store(out + row[:, None] * K + second[None, :], r2.to(x1.dtype), mask=ok)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    num_rows = x.numel() // x.shape[3]
    rotate_rows[(triton.cdiv(num_rows, _ROWS),)](
        x, out, cos, sin, x.shape[1], num_rows, direction, H=x.shape[2], K=x.shape[3], PAIRS=cos.shape[1], ROWS=_ROWS
    )
    return out


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _launch(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _launch(gradient, cos, sin, -1.0), None, None


def rotated_on_gpu(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`nha_kernels.rope.rotate` rounded to x's dtype. x [B, T, H, K]; cos, sin [T, rotary_dim / 2] in float32."""
    return _Rotation.apply(x, cos.contiguous(), sin.contiguous())
