"""Backward of what queries read from the slots: one program per chunk and KV head.

Gives the gradient of the queries (the window adds its part later), what the chunk's reads send to the slots before it (`state_gradient`,
composed over chunks by the next kernel), and the gradients of the chunk's own writes as far as the chunk itself reads them. Probabilities
are recomputed from the log-sum-exp. With e the slot logits, p their probabilities and d the gradient of out:

    de = p * (d S_v - <d, out>)        dG_t[m] = sum over the group of  de * e + p * (d S_v)       (G: exponent of the decay at token t)

`gate_gradient` receives, for the token written at query i, -exp(g_i) c_i + sum over t >= i of (dG_t - s_t c_t), with c the gradient of the
write strength s.
"""

import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2_E, channel_halves, continues_state, group_sum, load_gates, load_starts, write_strength
from .problem import Gradients, Problem
from .states import ChunkStates
from .tiles import (
    SMALLEST_NORMAL,
    biased_logits,
    decayed,
    dot_halves,
    load_halves,
    load_rows,
    log_mass_rows,
    pair_factors,
    row_decays,
    store_halves,
    to_decay_dtype,
    visible_pairs,
)


@triton.jit
def slot_backward_reads(
    q,
    k,
    v,
    g,
    start,
    state_keys,
    state_values,
    state_log,
    out,
    lse,
    d_out,
    dq,
    delta_out,  # [B, T, HQ] <d_out, out>
    state_gradient,  # [B*H, N, M, K+V]
    log_gradient,  # [B*H, N, M] gradient of the sum of log-gates before the chunk (EMPTY == 2)
    dk_written,  # [B, E, H, K]
    dv_written,  # [B, E, H, V]
    gate_gradient,  # [B, E, H, M]
    T,
    E,
    held,
    W,
    num_chunks,
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
    HALF: tl.constexpr,
    GATE_FLOOR: tl.constexpr,
    GATE_DOT: tl.constexpr,
    EMPTY: tl.constexpr,
    DOCS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    t0 = n * C
    rows = tl.arange(0, C * RP)
    token, head = rows // RP, rows % RP
    index = tl.arange(0, C)
    row_ok = (t0 + token < T) & (head < R)

    at_row = token * (H * R) + head
    at_query = ((b * T + t0) * H + h) * R
    q1, q2 = load_halves(q + at_query * K, at_row, row_ok, K, HALF)
    dtype = q1.dtype
    do = load_rows(d_out + at_query * V, at_row, row_ok, V)
    o = load_rows(out + at_query * V, at_row, row_ok, V)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_out + at_query + at_row, delta, mask=row_ok)
    lse_row = tl.load(lse + at_query + at_row, mask=row_ok, other=float("inf"))
    lse_row = tl.where(lse_row == float("-inf"), float("inf"), lse_row) * LOG2_E  # nothing visible: probabilities 0
    first = load_starts(start, b, t0, token, T, DOCS)
    index_first = load_starts(start, b, t0, index, T, DOCS)
    query_row = held + t0 + token

    written_row = held + t0 - W + index
    written = (written_row >= index_first) & (t0 + index < T)
    at_written = (b * E + held + t0 - W) * H + h
    k1, k2 = load_halves(k + at_written * K, index * H, written, K, HALF)
    values = load_rows(v + at_written * V, index * H, written, V)
    # Products with the chunk's writes have the writes as their rows: no accumulator is transposed for the gradients of the writes, and
    # Triton 3.6 reads outside of shared memory for [64, .] @ [., 16] by 8 warps.
    pairs = tl.trans(visible_pairs(token, first, index, index_first, written, DOCS))
    at_own = index[:, None] == token[None, :]
    earlier = pairs & (index[:, None] < token[None, :])
    # The write that a query brings along is read undecayed. It is kept apart: in the gradient of the decays it would cancel, not exactly.
    scores = dot_halves(k1, k2, q1, q2)
    own_score = tl.sum(tl.where(pairs & at_own, scores, 0.0), 0)
    scores = to_decay_dtype(tl.where(earlier, scores, 0.0), q1)
    value_scores = tl.dot(values, tl.trans(do), input_precision="tf32x3")
    own_value_score = tl.sum(tl.where(pairs & at_own, value_scores, 0.0), 0)
    value_scores = to_decay_dtype(tl.where(earlier, value_scores, 0.0), q1)
    continues = continues_state(first, held, t0)
    at_state = (bh * (num_chunks + 1) + n) * M
    key_weights = tl.zeros((C, C * RP), tl.float32)  # d logit / d (q . k_written), summed over slots
    value_weights = tl.zeros((C, C * RP), tl.float32)
    dq1 = tl.zeros((C * RP, K // 2), tl.float32)
    dq2 = tl.zeros((C * RP, K // 2), tl.float32)
    for m in range(0, M, BM):
        slot = m + tl.arange(0, BM)
        slot_ok = slot < M
        gate = load_gates(g + at_written * M, index * H, slot, written, M)
        floored = tl.maximum(gate, GATE_FLOOR)
        strength = write_strength(floored)
        exponent, from_state, at_reference = row_decays(
            token, first, index, index_first, floored, continues, BLOCK, DOCS, ONE_BLOCK, GATE_DOT
        )
        own_strength = tl.dot(tl.where(index[None, :] == token[:, None], 1.0, 0.0), strength, input_precision=GATE_DOT)
        s1, s2 = load_halves(state_keys + at_state * K, slot, slot_ok, K, HALF)
        state = load_rows(state_values + at_state * V, slot, slot_ok, V)
        logits = decayed(dot_halves(q1, q2, s1, s2), from_state, at_reference, ONE_BLOCK)
        dp = decayed(tl.dot(do, tl.trans(state), input_precision="tf32x3"), from_state, at_reference, ONE_BLOCK)
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
                GATE_DOT,
            )
            from_write = to_decay_dtype(strength * to_reference, q1)
            logits += to_row * tl.dot(tl.trans(scores), from_write, input_precision="tf32x3")
            dp += to_row * tl.dot(tl.trans(value_scores), from_write, input_precision="tf32x3")
        logits += own_score[:, None] * own_strength
        dp += own_value_score[:, None] * own_strength
        log_mass = logits
        if EMPTY == 2:
            log_before = tl.load(state_log + at_state + slot, mask=slot_ok, other=0.0)
            log_mass = log_mass_rows(token, first, index, index_first, tl.maximum(gate, -40.0), log_before, continues, GATE_DOT)
        biased = biased_logits(logits * (scale * LOG2_E), log_mass, query_row - W >= first, slot, M, BM, EMPTY)
        p = tl.exp2(biased - lse_row[:, None])
        softmax_gradient = p * (dp - delta[:, None])
        de = softmax_gradient * scale
        own_gradient = group_sum(de * own_score[:, None] + p * own_value_score[:, None], C, RP, BM)
        exponent_gradient = group_sum(de * logits + p * dp, C, RP, BM) - strength * own_gradient
        if EMPTY == 2:
            mass = write_strength(log_mass)
            d_log = tl.where(mass > SMALLEST_NORMAL, softmax_gradient * (1 - 1 / tl.maximum(mass, SMALLEST_NORMAL)), 0.0)
            to_state = tl.sum(tl.where(continues[:, None], d_log, 0.0), 0)
            tl.store(log_gradient + (bh * num_chunks + n) * M + slot, to_state, mask=slot_ok)
            exponent_gradient += group_sum(d_log, C, RP, BM)

        de_state = decayed(de, from_state, at_reference, ONE_BLOCK).to(dtype)
        p_state = decayed(p, from_state, at_reference, ONE_BLOCK).to(dtype)
        dq1 = tl.dot(de_state, s1, dq1, input_precision="tf32x3")
        dq2 = tl.dot(de_state, s2, dq2, input_precision="tf32x3")
        at_gradient = state_gradient + ((bh * num_chunks + n) * M) * (K + V)
        d_state = tl.dot(tl.trans(p_state), do, input_precision="tf32x3")
        at_values = at_gradient + slot[:, None] * (K + V) + K + tl.arange(0, V)[None, :]
        tl.store(at_values, d_state.to(state_gradient.dtype.element_ty), mask=slot_ok[:, None])
        turned = tl.trans(de_state)
        d_state1 = tl.dot(turned, q1, input_precision="tf32x3")
        d_state2 = tl.dot(turned, q2, input_precision="tf32x3")
        c1, c2 = channel_halves(tl.arange(0, K // 2), K, HALF)
        at_keys = at_gradient + slot[:, None] * (K + V)
        tl.store(at_keys + c1[None, :], d_state1.to(state_gradient.dtype.element_ty), mask=slot_ok[:, None])
        tl.store(at_keys + c2[None, :], d_state2.to(state_gradient.dtype.element_ty), mask=slot_ok[:, None])

        strength_gradient = tl.zeros((C, BM), tl.float32)
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
                GATE_DOT,
            )
            from_write = to_decay_dtype(strength * to_reference, q1)
            de_row = to_decay_dtype(de * to_row, q1)
            p_row = to_decay_dtype(p * to_row, q1)
            key_weights = tl.dot(from_write, tl.trans(de_row), key_weights, input_precision="tf32x3")
            value_weights = tl.dot(from_write, tl.trans(p_row), value_weights, input_precision="tf32x3")
            received = tl.dot(scores, de_row, input_precision="tf32x3")
            received = tl.dot(value_scores, p_row, received, input_precision="tf32x3")
            strength_gradient += received * to_reference
        later = (index[None, :] >= index[:, None]) & (index_first[None, :] == index_first[:, None])
        summed = tl.dot(tl.where(later, 1.0, 0.0), exponent_gradient - strength * strength_gradient, input_precision=GATE_DOT)
        strength_gradient += own_gradient
        dg = tl.where(gate < -40.0, 0.0, summed - tl.exp(floored) * strength_gradient)
        at_gates = gate_gradient + at_written * M + index[:, None] * (H * M) + slot[None, :]
        tl.store(at_gates, dg, mask=written[:, None] & slot_ok[None, :])

    weights = tl.where(pairs, key_weights, 0.0).to(dtype)
    turned = tl.trans(weights)
    dq1 = tl.dot(turned, k1, dq1, input_precision="tf32x3")
    dq2 = tl.dot(turned, k2, dq2, input_precision="tf32x3")
    store_halves(dq + at_query * K, at_row, row_ok, dq1, dq2, K, HALF)
    dk1 = tl.dot(weights, q1, input_precision="tf32x3")
    dk2 = tl.dot(weights, q2, input_precision="tf32x3")
    store_halves(dk_written + at_written * K, index * H, written, dk1, dk2, K, HALF)
    weights = tl.where(pairs, value_weights, 0.0).to(dtype)
    dv = tl.dot(weights, do, input_precision="tf32x3")
    at_values = dv_written + at_written * V + index[:, None] * (H * V) + tl.arange(0, V)[None, :]
    tl.store(at_values, dv.to(dv_written.dtype.element_ty), mask=written[:, None])


def backward_reads(problem: Problem, states: ChunkStates, out: Tensor, lse: Tensor, d_out: Tensor, gradients: Gradients) -> None:
    p, d = problem, gradients
    slot_backward_reads[(p.num_chunks, p.batch * p.kv_heads)](
        p.q,
        p.k,
        p.v,
        p.g,
        p.start,
        states.keys,
        states.values,
        states.log_decay,
        out,
        lse,
        d_out,
        d.q,
        d.delta,
        d.states,
        d.logs,
        d.written_keys,
        d.written_values,
        d.gates,
        p.num_tokens,
        p.num_rows,
        p.held,
        p.window,
        p.num_chunks,
        p.scale,
        **p.tile_constants("H R RP K V M C BLOCK BM HALF GATE_FLOOR GATE_DOT EMPTY DOCS ONE_BLOCK"),
        num_warps=p.tiles.read_warps,
        num_stages=p.tiles.read_stages,
    )
