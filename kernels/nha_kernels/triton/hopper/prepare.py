"""Per chunk of 64 tokens and KV head: what the chunk adds to the slots, and its keys rotated by their position."""

import triton
import triton.language as tl

from ..common import LENGTHS


@triton.jit
def _add_angles(base_cos, base_sin, offset_cos, offset_sin, index, P: tl.constexpr):
    """cos and sin of (chunk start + index) from those of the chunk's start and of the index alone."""
    at = index[:, None] * P + tl.arange(0, P)[None, :]
    c, s = tl.load(offset_cos + at).to(tl.float32), tl.load(offset_sin + at).to(tl.float32)
    return base_cos[None, :] * c - base_sin[None, :] * s, base_sin[None, :] * c + base_cos[None, :] * s


@triton.jit(do_not_specialize=LENGTHS)
def prepare_chunks(
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    weights,  # [B*H, chunks, 64, M] strength and decay of the writes up to the chunk's end
    border_cos,  # [1 + chunks, K/2] of the position at which a chunk begins
    border_sin,
    offset_cos,  # [64 or more, K/2] by distance
    offset_sin,
    rotated,  # [B, 64 + slab, H, K] keys rotated by their position; the first 64 rows are those before the slab
    angles,  # [slab, 2, K/2] cosines and sines by position
    updates,  # [B*H, chunks, M, K+V] what the chunk adds to the slots
    T,
    heads,  # B * H
    first_chunk,  # of the slab
    num_chunks,  # of the slab
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
):
    n, bh = tl.program_id(0) // heads - 1, (tl.program_id(0) % heads).to(tl.int64)
    b, h = bh // H, bh % H
    index, slot = tl.arange(0, C), tl.arange(0, M)
    chunk = first_chunk + n
    own = chunk * C + index
    if n >= 0:
        at_chunk = bh * num_chunks + n
        weight = tl.load(weights + at_chunk * (C * M) + index[:, None] * M + slot[None, :])
        ok = (own >= C) & (own < T)
        base = (b * T + chunk * C - C) * H + h
        ck, cv = tl.arange(0, K), tl.arange(0, V)
        keys = tl.load(k + base * K + index[:, None] * (H * K) + ck[None, :], mask=ok[:, None], other=0.0)
        values = tl.load(v + base * V + index[:, None] * (H * V) + cv[None, :], mask=ok[:, None], other=0.0)
        at_update = updates + at_chunk * (M * (K + V)) + slot[:, None] * (K + V)
        weight = tl.trans(weight)
        tl.store(at_update + ck[None, :], tl.dot(weight, keys).to(updates.dtype.element_ty))
        tl.store(at_update + K + cv[None, :], tl.dot(weight, values).to(updates.dtype.element_ty))

    # Keys of the chunk's own tokens, rotated. Of the chunk before the slab nothing else is needed.
    P: tl.constexpr = K // 2
    pair = tl.arange(0, P)
    in_sequence = (own >= 0) & (own < T)
    at_own = ((b * T + chunk * C) * H + h) * K + index[:, None] * (H * K) + pair[None, :]
    x1 = tl.load(k + at_own, mask=in_sequence[:, None], other=0.0).to(tl.float32)
    x2 = tl.load(k + at_own + P, mask=in_sequence[:, None], other=0.0).to(tl.float32)
    at_border = (n + 1) * P + pair
    c, s = _add_angles(tl.load(border_cos + at_border), tl.load(border_sin + at_border), offset_cos, offset_sin, index, P)
    at_rotated = rotated + ((b * (num_chunks + 1) + n + 1) * (C * H) + h) * K + index[:, None] * (H * K) + pair[None, :]
    tl.store(at_rotated, (x1 * c - x2 * s).to(rotated.dtype.element_ty))
    tl.store(at_rotated + P, (x2 * c + x1 * s).to(rotated.dtype.element_ty))
    if (n >= 0) & (bh == 0):
        at_angle = (n * C + index)[:, None] * (2 * P) + pair[None, :]
        tl.store(angles + at_angle, c.to(angles.dtype.element_ty))
        tl.store(angles + at_angle + P, s.to(angles.dtype.element_ty))
