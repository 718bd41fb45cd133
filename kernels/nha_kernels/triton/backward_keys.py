"""Backward, last kernel: one program per block of rows and KV head gathers what the queries of the window give to keys and values.

Tiles are [rows of the window, queries of the group], so that no accumulator is transposed. What came through the slots is added at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2_E, unrotate
from .problem import Gradients, Problem
from .tiles import dot_halves, load_angles, load_halves, load_rows, rotated, store_halves


@triton.jit
def window_backward_keys(
    q,
    k,
    v,
    start,
    cos,
    sin,
    lse,
    delta_in,
    d_out,
    dk_written,
    dv_written,
    dk,
    dv,
    T,
    E,
    held,
    W,
    scale,
    H: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    HALF: tl.constexpr,
    DOCS: tl.constexpr,
    ROPE: tl.constexpr,
):
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    row0 = tl.program_id(0) * BN
    near = tl.arange(0, BN)
    row = row0 + near
    row_ok = row < E
    at_key = (b * E + row0) * H + h
    k1, k2 = load_halves(k + at_key * K, near * H, row_ok, K, HALF)
    k1, k2 = rotated(k1, k2, cos, sin, near, K, ROPE)
    values = load_rows(v + at_key * V, near * H, row_ok, V)
    dk1 = tl.zeros((BN, K // 2), tl.float32)
    dk2 = tl.zeros((BN, K // 2), tl.float32)
    d_values = tl.zeros((BN, V), tl.float32)

    rows = tl.arange(0, C * RP)
    token, head = rows // RP, rows % RP
    at_row = token * (H * R) + head
    for t0 in range(tl.maximum(row0 - held, 0), tl.minimum(row0 + BN - 1 + W - held, T), C):
        query_ok = (t0 + token < T) & (head < R)
        query_row = held + t0 + token
        at_query = ((b * T + t0) * H + h) * R
        q1, q2 = load_halves(q + at_query * K, at_row, query_ok, K, HALF)
        q1, q2 = rotated(q1, q2, cos, sin, query_row - row0, K, ROPE)
        do = load_rows(d_out + at_query * V, at_row, query_ok, V)
        lse_row = tl.load(lse + at_query + at_row, mask=query_ok, other=float("inf"))
        lse_row = tl.where(lse_row == float("-inf"), float("inf"), lse_row) * LOG2_E
        delta = tl.load(delta_in + at_query + at_row, mask=query_ok, other=0.0)
        if DOCS == 0:
            first = tl.zeros_like(token)
        elif DOCS == 1:
            first = tl.zeros_like(token) + tl.load(start + b)
        else:
            first = tl.load(start + tl.minimum(t0 + token, T - 1))
        lag = query_row[None, :] - row[:, None]
        visible = (lag >= 0) & (lag < W) & (row[:, None] >= first[None, :])
        p = tl.where(visible, tl.exp2(dot_halves(k1, k2, q1, q2) * (scale * LOG2_E) - lse_row[None, :]), 0.0)
        d_values = tl.dot(p.to(do.dtype), do, d_values, input_precision="ieee")
        dp = tl.dot(values, tl.trans(do), input_precision="ieee")
        de = (p * (dp - delta[None, :]) * scale).to(q1.dtype)
        dk1 = tl.dot(de, q1, dk1, input_precision="ieee")
        dk2 = tl.dot(de, q2, dk2, input_precision="ieee")

    if ROPE:
        c, s = load_angles(cos, sin, near, K)
        dk1, dk2 = unrotate(dk1, dk2, c, s)
    writer = row + W - held  # the query at which the row's token enters the slots
    if DOCS == 0:
        first = tl.zeros_like(row)
    elif DOCS == 1:
        first = tl.zeros_like(row) + tl.load(start + b)
    else:
        first = tl.load(start + tl.minimum(tl.maximum(writer, 0), T - 1))
    written = row_ok & (writer >= 0) & (writer < T) & (row >= first)
    w1, w2 = load_halves(dk_written + at_key * K, near * H, written, K, HALF)
    store_halves(dk + at_key * K, near * H, row_ok, dk1 + w1, dk2 + w2, K, HALF)
    d_values += load_rows(dv_written + at_key * V, near * H, written, V)
    at_values = dv + at_key * V + near[:, None] * (H * V) + tl.arange(0, V)[None, :]
    tl.store(at_values, d_values.to(dv.dtype.element_ty), mask=row_ok[:, None])


def backward_keys(problem: Problem, lse: Tensor, d_out: Tensor, gradients: Gradients) -> tuple[Tensor, Tensor]:
    p, d = problem, gradients
    constants = p.tile_constants()
    dk, dv = torch.empty_like(p.k), torch.empty_like(p.v)
    window_backward_keys[(triton.cdiv(p.num_rows, p.tiles.window), p.batch * p.kv_heads)](
        p.q,
        p.k,
        p.v,
        p.start,
        p.angles[0],
        p.angles[1],
        lse,
        d.delta,
        d_out,
        d.written_keys,
        d.written_values,
        dk,
        dv,
        p.num_tokens,
        p.num_rows,
        p.held,
        p.window,
        p.scale,
        **{name: constants[name] for name in ("H", "R", "RP", "K", "V", "C", "BN", "HALF", "DOCS", "ROPE")},
        num_warps=p.tiles.key_warps,
        num_stages=p.tiles.key_stages,
    )
    return dk, dv
