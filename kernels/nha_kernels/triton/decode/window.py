"""The window's pieces of a decode step (pieces.py says what `index` counts)."""

import triton
import triton.language as tl

from ..common import rotate
from ..tile_operations import dot_halves, fold, load_halves, load_rows


@triton.jit
def _cos_sin(turns):
    """Of angles in turns. Series around the nearest quarter turn: exact to float32, and without the branch for huge angles of the library's
    functions, which takes 80 registers."""
    quarter = tl.floor(4 * turns + 0.5)
    x = (turns - 0.25 * quarter) * 6.283185307179586
    x2 = x * x
    s = x * (1 - x2 * (1 / 6) * (1 - x2 * (1 / 20) * (1 - x2 * (1 / 42) * (1 - x2 * (1 / 72)))))
    c = 1 - x2 * (1 / 2) * (1 - x2 * (1 / 12) * (1 - x2 * (1 / 30) * (1 - x2 * (1 / 56))))
    quarter = quarter.to(tl.int32) & 3
    odd = (quarter & 1) == 1
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)


@triton.jit
def _rotated(x1, x2, base, offset, frequencies, factor, K: tl.constexpr, PAIRS: tl.constexpr, ROPE: tl.constexpr):
    """Halves rotated to base + offset, in their own dtype. The turns up to `base` are counted in float64, so an angle far from 0 keeps its
    digits; offsets are below 64, where float32 does."""
    if not ROPE:
        return x1, x2
    pair = tl.arange(0, K // 2)
    turning = pair < PAIRS
    turns = tl.load(frequencies + pair, mask=turning, other=0.0).to(tl.float64) * 0.15915494309189535  # 1 / (2 pi)
    before = turns * base
    before = (before - tl.floor(before + 0.5)).to(tl.float32)
    cos, sin = _cos_sin(before[None, :] + offset.to(tl.float32)[:, None] * turns.to(tl.float32)[None, :])
    length = tl.where(turning, factor, 1.0)[None, :]  # channels that do not rotate keep their length
    r1, r2 = rotate(x1.to(tl.float32), x2.to(tl.float32), cos * length, sin * length)
    return r1.to(x1.dtype), r2.to(x1.dtype)


@triton.jit
def _attend_rows(
    block,
    q,
    k,
    v,
    window_keys,
    window_values,
    frequencies,
    part_out,
    part_max,
    part_sum,
    first_index,
    last_index,
    with_new_tokens,
    bh,
    part,
    start,
    seen,
    T,
    W,
    logit_scale,
    rope_factor,
    H: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    ROPE: tl.constexpr,
):
    b, h = bh // H, bh % H
    row = block * ROWS + tl.arange(0, ROWS)
    token, head = row // R, row % R
    row_ok = token < T
    q1, q2 = load_halves(q + (b * T * H + h) * (R * K), token * (H * R) + head, row_ok, K, HALF)
    dtype = q1.dtype
    q1, q2 = _rotated(q1, q2, W, token, frequencies, rope_factor, K, PAIRS, ROPE)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, V), tl.float32)
    for i in range(first_index, last_index, BN):
        step = tl.arange(0, BN)
        index = i + step
        there = (index < last_index) & (seen - W + index >= 0)
        place = start + index
        place = tl.where(place >= W, place - W, place) * H
        k1, k2 = load_halves(window_keys + (b * W * H + h) * K, place, there, K, HALF)
        k1, k2 = _rotated(k1, k2, i, step, frequencies, rope_factor, K, PAIRS, ROPE)
        visible = there[None, :] & (index[None, :] > token[:, None])
        logits = tl.where(visible, dot_halves(q1, q2, k1, k2) * logit_scale, float("-inf"))
        p, largest, total, acc = fold(logits, largest, total, acc)
        values = load_rows(window_values + (b * W * H + h) * V, place, there, V)
        acc = tl.dot(p.to(dtype), values, acc, input_precision="tf32x3")
    if with_new_tokens:
        new = tl.arange(0, 16)
        k1, k2 = load_halves(k + (b * T * H + h) * K, new * H, new < T, K, HALF)
        k1, k2 = _rotated(k1, k2, W, new, frequencies, rope_factor, K, PAIRS, ROPE)
        lag = token[:, None] - new[None, :]
        logits = tl.where((lag >= 0) & (lag < W), dot_halves(q1, q2, k1, k2) * logit_scale, float("-inf"))
        p, largest, total, acc = fold(logits, largest, total, acc)
        values = load_rows(v + (b * T * H + h) * V, new * H, new < T, V)
        acc = tl.dot(p.to(dtype), values, acc, input_precision="tf32x3")
    at_part = part * (T * R) + row
    tl.store(part_max + at_part, largest, mask=row_ok)
    tl.store(part_sum + at_part, total, mask=row_ok)
    tl.store(part_out + at_part[:, None] * V + tl.arange(0, V)[None, :], acc, mask=row_ok[:, None])


@triton.jit
def attend_window(
    q,
    k,
    v,
    window_keys,
    window_values,
    frequencies,
    part_out,
    part_max,
    part_sum,
    first_index,
    last_index,
    with_new_tokens,
    bh,
    part,
    start,
    seen,
    T,
    W,
    logit_scale,
    rope_factor,
    H: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    BN: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    ROPE: tl.constexpr,
):
    # Once, unless large tiles exceed the registers: out of a loop the compiler moves the rotation's tables, and keeps them.
    if ROW_BLOCKS == 1:
        _attend_rows(
            0,
            q,
            k,
            v,
            window_keys,
            window_values,
            frequencies,
            part_out,
            part_max,
            part_sum,
            first_index,
            last_index,
            with_new_tokens,
            bh,
            part,
            start,
            seen,
            T,
            W,
            logit_scale,
            rope_factor,
            H,
            R,
            K,
            V,
            ROWS,
            BN,
            HALF,
            PAIRS,
            ROPE,
        )
    else:
        for block in range(0, ROW_BLOCKS):
            _attend_rows(
                block,
                q,
                k,
                v,
                window_keys,
                window_values,
                frequencies,
                part_out,
                part_max,
                part_sum,
                first_index,
                last_index,
                with_new_tokens,
                bh,
                part,
                start,
                seen,
                T,
                W,
                logit_scale,
                rope_factor,
                H,
                R,
                K,
                V,
                ROWS,
                BN,
                HALF,
                PAIRS,
                ROPE,
            )
