"""Backward of the window. Probabilities are recomputed from the log-sum-exp over slots and window.

Queries: one program per chunk and KV head. Keys and values: one per block of rows and KV head, with tiles [rows, queries of the group], so
that no accumulator is transposed. Each adds its part to what came through the slots.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..common import LENGTHS, LOG2_E, load_starts, unrotate
from ..tile_operations import (
    chunk_and_head,
    dot_halves,
    load_angles,
    load_group,
    load_group_halves,
    load_halves,
    load_rows,
    rotated,
    store_halves,
    window_visible,
)
from .problem import Gradients, Problem


@triton.jit
def _block_gradient(
    k,
    v,
    in_block,  # rows from that of k and v on
    distance,  # from the first row of the window
    ok,
    r1,
    r2,
    d_out,
    cos,
    sin,
    visible,
    lse,
    delta,
    scale,
    dq1,
    dq2,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    HALF: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Adds what one block of window rows gives to the gradient of the rotated queries."""
    k1, k2 = load_halves(k, in_block * H, ok, K, HALF)
    k1, k2 = rotated(k1, k2, cos, sin, distance, K, ROPE)
    values = load_rows(v, in_block * H, ok, V)
    p = tl.where(visible, tl.exp2(dot_halves(r1, r2, k1, k2) * (scale * LOG2_E) - lse[:, None]), 0.0)
    dp = tl.dot(d_out, tl.trans(values), input_precision="tf32x3")
    de = (p * (dp - delta[:, None]) * scale).to(r1.dtype)
    return tl.dot(de, k1, dq1, input_precision="tf32x3"), tl.dot(de, k2, dq2, input_precision="tf32x3")


@triton.jit(do_not_specialize=LENGTHS)
def window_backward_queries(
    q,
    k,
    v,
    start,
    cos,
    sin,
    lse,
    delta_in,
    d_out,
    dq,
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
    n, bh = chunk_and_head(tl.cdiv(T, C))
    b, h = bh // H, bh % H
    t0 = n * C
    rows = tl.arange(0, C * RP)
    token, head = rows // RP, rows % RP
    index = tl.arange(0, C)
    row_ok = (t0 + token < T) & (head < R)
    at_row = token * (H * R) + head
    at_query = ((b * T + t0) * H + h) * R
    lowest = -((W - 1 + BN - 1) // BN) * BN
    q1, q2 = load_group_halves(q + at_query * K, T - t0, C, R, RP, H, K, HALF)
    r1, r2 = rotated(q1, q2, cos, sin, token - lowest, K, ROPE)
    do = load_group(d_out + at_query * V, T - t0, C, R, RP, H, V)
    lse_row = tl.load(lse + at_query + at_row, mask=row_ok, other=float("inf"))
    lse_row = tl.where(lse_row == float("-inf"), float("inf"), lse_row) * LOG2_E  # nothing visible: probabilities 0
    delta = tl.load(delta_in + at_query + at_row, mask=row_ok, other=0.0)
    first = load_starts(start, b, t0, token, T, DOCS)
    readable = tl.min(load_starts(start, b, t0, index, T, DOCS), 0)  # rows before it may hold anything, NaN too
    query_row = held + t0 + token
    at_own = (b * E + held + t0) * H + h
    dq1 = tl.zeros((C * RP, K // 2), tl.float32)
    dq2 = tl.zeros((C * RP, K // 2), tl.float32)
    in_block = tl.arange(0, BN)
    for offset in range(tl.maximum(lowest, -tl.cdiv(held + t0 - readable, BN) * BN), 0, BN):
        row = held + t0 + offset + in_block
        visible = window_visible(row, query_row, first, W)
        ok = (row >= readable) & (row < E)
        dq1, dq2 = _block_gradient(
            k + (at_own + offset * H) * K,
            v + (at_own + offset * H) * V,
            in_block,
            offset + in_block - lowest,
            ok,
            r1,
            r2,
            do,
            cos,
            sin,
            visible,
            lse_row,
            delta,
            scale,
            dq1,
            dq2,
            H,
            K,
            V,
            HALF,
            ROPE,
        )
    own_row = held + t0 + index
    own_visible = window_visible(own_row, query_row, first, W)
    dq1, dq2 = _block_gradient(
        k + at_own * K,
        v + at_own * V,
        index,
        index - lowest,
        own_row < E,
        r1,
        r2,
        do,
        cos,
        sin,
        own_visible,
        lse_row,
        delta,
        scale,
        dq1,
        dq2,
        H,
        K,
        V,
        HALF,
        ROPE,
    )
    if ROPE:
        c, s = load_angles(cos, sin, token - lowest, K)
        dq1, dq2 = unrotate(dq1, dq2, c, s)
    b1, b2 = load_halves(dq + at_query * K, at_row, row_ok, K, HALF)
    store_halves(dq + at_query * K, at_row, row_ok, dq1 + b1, dq2 + b2, K, HALF)


@triton.jit(do_not_specialize=LENGTHS)
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
    dk,  # in: gradient through the slots, where a row was written; out: with the window's part
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
    n, bh = chunk_and_head(tl.cdiv(E, BN))
    b, h = bh // H, bh % H
    row0 = n * BN
    near = tl.arange(0, BN)
    row = row0 + near
    row_ok = row < E
    readable = row_ok
    if DOCS > 0:  # rows before the first document may hold anything, NaN too
        readable = row_ok & (row >= tl.load(start + b * (2 - DOCS)))
    at_key = (b * E + row0) * H + h
    k1, k2 = load_halves(k + at_key * K, near * H, readable, K, HALF)
    k1, k2 = rotated(k1, k2, cos, sin, near, K, ROPE)
    values = load_rows(v + at_key * V, near * H, readable, V)
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
        q1, q2 = load_group_halves(q + at_query * K, T - t0, C, R, RP, H, K, HALF)
        q1, q2 = rotated(q1, q2, cos, sin, query_row - row0, K, ROPE)
        do = load_group(d_out + at_query * V, T - t0, C, R, RP, H, V)
        lse_row = tl.load(lse + at_query + at_row, mask=query_ok, other=float("inf"))
        lse_row = tl.where(lse_row == float("-inf"), float("inf"), lse_row) * LOG2_E
        delta = tl.load(delta_in + at_query + at_row, mask=query_ok, other=0.0)
        first = load_starts(start, b, t0, token, T, DOCS)
        lag = query_row[None, :] - row[:, None]
        visible = (lag >= 0) & (lag < W) & (row[:, None] >= first[None, :])
        p = tl.where(visible, tl.exp2(dot_halves(k1, k2, q1, q2) * (scale * LOG2_E) - lse_row[None, :]), 0.0)
        d_values = tl.dot(p.to(do.dtype), do, d_values, input_precision="tf32x3")
        dp = tl.dot(values, tl.trans(do), input_precision="tf32x3")
        de = (p * (dp - delta[None, :]) * scale).to(q1.dtype)
        dk1 = tl.dot(de, q1, dk1, input_precision="tf32x3")
        dk2 = tl.dot(de, q2, dk2, input_precision="tf32x3")

    if ROPE:
        c, s = load_angles(cos, sin, near, K)
        dk1, dk2 = unrotate(dk1, dk2, c, s)
    writer = row + W - held  # the query at which the row's token enters the slots
    writer_first = load_starts(start, b, 0, tl.maximum(writer, 0), T, DOCS)
    written = row_ok & (writer >= 0) & (writer < T) & (row >= writer_first)
    w1, w2 = load_halves(dk + at_key * K, near * H, written, K, HALF)
    store_halves(dk + at_key * K, near * H, row_ok, dk1 + w1, dk2 + w2, K, HALF)
    d_values += load_rows(dv + at_key * V, near * H, written, V)
    at_values = dv + at_key * V + near[:, None] * (H * V) + tl.arange(0, V)[None, :]
    tl.store(at_values, d_values.to(dv.dtype.element_ty), mask=row_ok[:, None])


def backward_window(problem: Problem, lse: Tensor, d_out: Tensor, gradients: Gradients) -> None:
    """Adds the window's part to the gradients of queries, keys and values."""
    p, d = problem, gradients
    constants = p.tile_constants("H R RP K V HALF DOCS ROPE")
    heads = p.batch * p.kv_heads
    window_backward_queries[(triton.cdiv(p.num_tokens, p.tiles.query_chunk) * heads,)](
        p.q,
        p.k,
        p.v,
        p.start,
        p.angles[0],
        p.angles[1],
        lse,
        d.delta,
        d_out,
        d.q,
        p.num_tokens,
        p.num_rows,
        p.held,
        p.window,
        p.scale,
        **constants,
        C=p.tiles.query_chunk,
        BN=p.tiles.window_rows,
        num_warps=p.tiles.query_warps,
        num_stages=p.tiles.query_stages,
    )
    window_backward_keys[(triton.cdiv(p.num_rows, p.tiles.key_rows) * heads,)](
        p.q,
        p.k,
        p.v,
        p.start,
        p.angles[0],
        p.angles[1],
        lse,
        d.delta,
        d_out,
        d.keys,
        d.values,
        p.num_tokens,
        p.num_rows,
        p.held,
        p.window,
        p.scale,
        **constants,
        C=p.tiles.key_chunk,
        BN=p.tiles.key_rows,
        num_warps=p.tiles.key_warps,
        num_stages=p.tiles.key_stages,
    )
