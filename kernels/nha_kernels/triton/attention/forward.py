"""Forward: one program per chunk and KV head reads slots and window under one online softmax.

slot logits    from the slots before the chunk, decayed, and from the chunk's own writes
window logits  rotated relative to the first row that the program touches: only distances matter
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import LENGTHS, LN_2, LOG2_E, continues_state, load_gates, load_starts, write_strength
from ..tile_operations import (
    biased_logits,
    chunk_and_head,
    decayed,
    dot_halves,
    fold,
    load_group,
    load_group_halves,
    load_halves,
    load_rows,
    load_tile,
    log_mass_rows,
    pair_factors,
    rotated,
    row_decays,
    to_decay_dtype,
    visible_pairs,
    window_visible,
)
from .problem import Problem, Slab
from .states import ChunkStates, SegmentStarts, empty_states, scan_slab, slabs


@triton.jit(do_not_specialize=LENGTHS)
def attention_forward(
    q,
    k,
    v,
    g,
    start,
    cos,
    sin,
    state_keys,
    state_values,
    state_log,
    out,  # [B, T, HQ, V]
    lse,  # [B, T, HQ] natural log-sum-exp over slots and window, -inf where a query sees nothing
    T,
    E,
    held,
    W,
    first_chunk,  # of the slab
    num_chunks,  # of the slab
    scale,
    H: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HALF: tl.constexpr,
    GATE_FLOOR: tl.constexpr,
    EMPTY: tl.constexpr,
    DOCS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    ROPE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    n, bh = chunk_and_head(num_chunks)
    b, h = bh // H, bh % H
    t0 = (first_chunk + n) * C
    rows = tl.arange(0, C * RP)
    token, head = rows // RP, rows % RP
    index = tl.arange(0, C)
    row_ok = (t0 + token < T) & (head < R)
    logit_scale = scale * LOG2_E

    at_row = token * (H * R) + head
    at_query = ((b * T + t0) * H + h) * R
    first = load_starts(start, b, t0, token, T, DOCS)
    index_first = load_starts(start, b, t0, index, T, DOCS)
    query_row = held + t0 + token

    # Slots before the window, so that the raw and the rotated queries are never in registers together.
    queries = load_group(q + at_query * K, T - t0, C, R, RP, H, K)
    dtype = queries.dtype
    largest = tl.full((C * RP,), float("-inf"), tl.float32)
    total = tl.zeros((C * RP,), tl.float32)
    acc = tl.zeros((C * RP, V), tl.float32)

    written_row = held + t0 - W + index
    written = (written_row >= index_first) & (t0 + index < T)
    at_written = (b * E + held + t0 - W) * H + h
    keys = load_rows(k + at_written * K, index * H, written, K)
    pairs = visible_pairs(token, first, index, index_first, written, DOCS)
    scores = tl.dot(queries, tl.trans(keys), input_precision="tf32x3")
    scores = to_decay_dtype(tl.where(pairs, scores, 0.0), queries)
    continues = continues_state(first, held, t0)
    at_state = (bh * num_chunks + n) * M
    for m in range(0, M, BM):
        slot = m + tl.arange(0, BM)
        gate = load_gates(g + at_written * M, index * H, slot, written, M)
        floored = tl.maximum(gate, GATE_FLOOR)
        exponent, from_state, at_reference = row_decays(
            token,
            first,
            index,
            index_first,
            floored,
            continues,
            BLOCK,
            DOCS,
            ONE_BLOCK,
        )
        state = load_tile(state_keys + (at_state + m) * K, M - m, BM, K)
        slot_logits = decayed(tl.dot(queries, tl.trans(state), input_precision="tf32x3"), from_state, at_reference, ONE_BLOCK)
        strength = write_strength(floored)
        for block in tl.static_range(0, C, BLOCK):
            to_row, to_reference = pair_factors(
                exponent,
                from_state,
                token,
                first,
                index,
                index_first,
                floored,
                start,
                b,
                t0,
                T,
                held,
                block,
                BLOCK,
                DOCS,
                ONE_BLOCK,
            )
            slot_logits += to_row * tl.dot(scores, to_decay_dtype(strength * to_reference, queries), input_precision="tf32x3")
        slot_logits = slot_logits * logit_scale
        log_mass = slot_logits
        if EMPTY == 2:
            log_before = tl.load(state_log + at_state + slot, mask=slot < M, other=0.0)
            log_mass = log_mass_rows(
                token,
                first,
                index,
                index_first,
                tl.maximum(gate, -40.0),
                log_before,
                continues,
            )
        slot_logits = biased_logits(slot_logits, log_mass, query_row - W >= first, slot, M, BM, EMPTY)
        slot_p, largest, total, acc = fold(slot_logits, largest, total, acc)

        state = load_tile(state_values + (at_state + m) * V, M - m, BM, V)
        acc = tl.dot(decayed(slot_p, from_state, at_reference, ONE_BLOCK).to(dtype), state, acc, input_precision="tf32x3")
        weights = tl.zeros((C * RP, C), tl.float32)
        for block in tl.static_range(0, C, BLOCK):
            to_row, to_reference = pair_factors(
                exponent,
                from_state,
                token,
                first,
                index,
                index_first,
                floored,
                start,
                b,
                t0,
                T,
                held,
                block,
                BLOCK,
                DOCS,
                ONE_BLOCK,
            )
            weights = tl.dot(
                to_decay_dtype(slot_p * to_row, queries),
                tl.trans(to_decay_dtype(strength * to_reference, queries)),
                weights,
                input_precision="tf32x3",
            )
        values = load_rows(v + at_written * V, index * H, written, V)
        acc = tl.dot(tl.where(pairs, weights, 0.0).to(dtype), values, acc, input_precision="tf32x3")

    if WINDOW:
        readable = tl.min(index_first, 0)  # rows before the chunk's first document may hold anything, NaN too
        lowest = -((W - 1 + BN - 1) // BN) * BN  # first row of the window, relative to the chunk's own first row
        q1, q2 = load_group_halves(q + at_query * K, T - t0, C, R, RP, H, K, HALF)
        r1, r2 = rotated(q1, q2, cos, sin, token - lowest, K, ROPE)
        at_own = (b * E + held + t0) * H + h
        in_block = tl.arange(0, BN)
        for offset in range(tl.maximum(lowest, -tl.cdiv(held + t0 - readable, BN) * BN), 0, BN):
            near = offset + in_block
            row = held + t0 + near
            at_block = at_own + offset * H
            k1, k2 = load_halves(k + at_block * K, in_block * H, (row >= readable) & (row < E), K, HALF)
            k1, k2 = rotated(k1, k2, cos, sin, near - lowest, K, ROPE)
            logits = dot_halves(r1, r2, k1, k2) * logit_scale
            logits = tl.where(window_visible(row, query_row, first, W), logits, float("-inf"))
            p, largest, total, acc = fold(logits, largest, total, acc)
            values = load_rows(v + at_block * V, in_block * H, (row >= readable) & (row < E), V)
            acc = tl.dot(p.to(dtype), values, acc, input_precision="tf32x3")
        row = held + t0 + index
        k1, k2 = load_halves(k + at_own * K, index * H, row < E, K, HALF)
        k1, k2 = rotated(k1, k2, cos, sin, index - lowest, K, ROPE)
        logits = dot_halves(r1, r2, k1, k2) * logit_scale
        logits = tl.where(window_visible(row, query_row, first, W), logits, float("-inf"))
        p, largest, total, acc = fold(logits, largest, total, acc)
        values = load_rows(v + at_own * V, index * H, row < E, V)
        acc = tl.dot(p.to(dtype), values, acc, input_precision="tf32x3")

    nothing = total == 0.0
    safe = tl.where(nothing, 1.0, total)
    result = acc / safe[:, None]
    at_out = out + at_query * V + at_row[:, None] * V + tl.arange(0, V)[None, :]
    tl.store(at_out, result.to(dtype), mask=row_ok[:, None])
    logsumexp = tl.where(nothing, float("-inf"), (largest + tl.log2(safe)) * LN_2)
    tl.store(lse + at_query + at_row, logsumexp, mask=row_ok)


def forward(problem: Problem, starts: SegmentStarts) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, T, HQ, V] in the inputs' dtype, log-sum-exp [B, T, HQ] and slots after the last token [B, H, M, K+V+1] in float32."""
    p = problem
    out = torch.empty(*p.q.shape[:3], p.value_dim, dtype=p.q.dtype, device=p.q.device)
    lse = torch.empty(p.q.shape[:3], dtype=torch.float32, device=p.q.device)
    parts = slabs(p, starts, p.tiles.forward_slab)
    states = empty_states(p, parts[0].chunks)
    for slab in parts:
        scan_slab(p, starts, slab, states)
        _attend(p, slab, states, out, lse)
    return out, lse, states.final.view(p.batch, p.kv_heads, *states.final.shape[1:])


def _attend(p: Problem, slab: Slab, states: ChunkStates, out: Tensor, lse: Tensor) -> None:
    attention_forward[(slab.chunks * p.batch * p.kv_heads,)](
        p.q,
        p.k,
        p.v,
        p.g,
        p.start,
        p.angles[0],
        p.angles[1],
        states.keys,
        states.values,
        states.log_decay,
        out,
        lse,
        p.num_tokens,
        p.num_rows,
        p.held,
        p.window,
        slab.first,
        slab.chunks,
        p.scale,
        **p.tile_constants("H R RP K V M C BLOCK BM BN HALF GATE_FLOOR EMPTY DOCS ONE_BLOCK ROPE WINDOW"),
        num_warps=p.tiles.forward_warps,
        num_stages=p.tiles.forward_stages,
        maxnreg=p.tiles.forward_registers,
    )
