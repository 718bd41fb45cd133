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

from ..common import LENGTHS, LOG2_E, continues_state, exp, load_gates, load_starts, rounded_sums, signed_sums, write_strength
from ..tile_operations import (
    SMALLEST_NORMAL,
    biased_logits,
    chunk_and_head,
    decayed,
    load_group,
    load_rows,
    load_rows_again,
    load_tile,
    log_mass_rows,
    pair_factors,
    row_decays,
    to_decay_dtype,
    visible_pairs,
)
from .problem import Gradients, Problem, Slab
from .states import ChunkStates


@triton.jit(do_not_specialize=LENGTHS)
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
    delta_out,  # [B, T, HQ] <d_out, out>, not written with SLOTS_ALONE
    state_gradient,  # [B*H, N, M, K+V]
    log_gradient,  # [B*H, N, M] gradient of the sum of log-gates before the chunk (EMPTY == 2)
    dk_written,  # [B, E, H, K]
    dv_written,  # [B, E, H, V]
    gate_gradient,  # [B, E, H, M]
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
    HALF: tl.constexpr,
    GATE_FLOOR: tl.constexpr,
    EMPTY: tl.constexpr,
    DOCS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    SLOTS_ALONE: tl.constexpr,
):
    n, bh = chunk_and_head(num_chunks)
    b, h = bh // H, bh % H
    t0 = (first_chunk + n) * C
    rows = tl.arange(0, C * RP)
    token, head = rows // RP, rows % RP
    index = tl.arange(0, C)
    row_ok = (t0 + token < T) & (head < R)

    at_row = token.to(tl.int64) * (H * R) + head.to(tl.int64)
    at_query = ((b * T + t0) * H + h) * R
    queries = load_group(q + at_query * K, T - t0, C, R, RP, H, K)
    dtype = queries.dtype
    do = load_group(d_out + at_query * V, T - t0, C, R, RP, H, V)
    if SLOTS_ALONE:
        delta = tl.zeros((C * RP,), tl.float32)
    else:
        o = load_group(out + at_query * V, T - t0, C, R, RP, H, V)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        tl.store(delta_out + at_query + at_row, delta, mask=row_ok)  # for the window's gradients
    lse_row = tl.load(lse + at_query + at_row, mask=row_ok, other=float("inf"))
    lse_row = tl.where(lse_row == float("-inf"), float("inf"), lse_row) * LOG2_E  # nothing visible: probabilities 0
    first = load_starts(start, b, t0, token, T, DOCS)
    index_first = load_starts(start, b, t0, index, T, DOCS)
    query_row = held + t0 + token

    written_row = held + t0 - W + index
    written = (written_row >= index_first) & (t0 + index < T)
    at_written = (b * E + held + t0 - W) * H + h
    keys = load_rows(k + at_written * K, index * H, written, K)
    values = load_rows(v + at_written * V, index * H, written, V)
    # Products with the chunk's writes have the writes as their rows: no accumulator is transposed for the gradients of the writes, and
    # Triton 3.6 reads outside of shared memory for [64, .] @ [., 16] by 8 warps.
    pairs = tl.trans(visible_pairs(token, first, index, index_first, written, DOCS))
    at_own = index[:, None] == token[None, :]
    same_token = tl.where(at_own, 1.0, 0.0)
    earlier = pairs & (index[:, None] < token[None, :])
    # The write that a query brings along is read undecayed. It is kept apart: in the gradient of the decays it would cancel, not exactly.
    scores = tl.dot(keys, tl.trans(queries), input_precision="tf32x3")
    own_score = tl.sum(tl.where(pairs & at_own, scores, 0.0), 0)
    scores = to_decay_dtype(tl.where(earlier, scores, 0.0), queries)
    value_scores = tl.dot(values, tl.trans(do), input_precision="tf32x3")
    own_value_score = tl.sum(tl.where(pairs & at_own, value_scores, 0.0), 0)
    value_scores = to_decay_dtype(tl.where(earlier, value_scores, 0.0), queries)
    continues = continues_state(first, held, t0)
    at_state = (bh * num_chunks + n) * M
    key_weights = tl.zeros((C, C * RP), tl.float32)  # d logit / d (q . k_written), summed over slots
    value_weights = tl.zeros((C, C * RP), tl.float32)
    dq_rows = tl.zeros((C * RP, K), tl.float32)
    # Where queries see nothing but slots, a first turn over them sums <d_out, out> up. That of an output rounded to 16 bits would be most
    # of the error: where slots are alike, little of de is left for the gradient of the queries.
    blocks: tl.constexpr = (M + BM - 1) // BM
    # Unrolled: as a loop, Triton 3.6 gave wrong gradients of queries and keys for M 128 and 256 on an H100 (check.py found it).
    for turn in tl.static_range(-blocks if SLOTS_ALONE else 0, blocks):
        m = (turn % blocks) * BM
        slot = m + tl.arange(0, BM)
        slot_ok = slot < M
        gate = load_gates(g + at_written * M, index * H, slot, written, M)
        floored = tl.maximum(gate, GATE_FLOOR)
        strength = write_strength(floored)
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
        logits = decayed(tl.dot(queries, tl.trans(state), input_precision="tf32x3"), from_state, at_reference, ONE_BLOCK)
        state = load_tile(state_values + (at_state + m) * V, M - m, BM, V)
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
            )
            from_write = to_decay_dtype(strength * to_reference, queries)
            logits += to_row * tl.dot(tl.trans(scores), from_write, input_precision="tf32x3")
            dp += to_row * tl.dot(tl.trans(value_scores), from_write, input_precision="tf32x3")
        own_strength = rounded_sums(tl.where(index[None, :] == token[:, None], 1.0, 0.0), strength, queries)
        with_own = logits + own_score[:, None] * own_strength
        log_mass = logits
        if EMPTY == 2:
            log_before = tl.load(state_log + at_state + slot, mask=slot_ok, other=0.0)
            log_mass = log_mass_rows(
                token,
                first,
                index,
                index_first,
                tl.maximum(gate, -40.0),
                log_before,
                continues,
            )
        biased = biased_logits(with_own * (scale * LOG2_E), log_mass, query_row - W >= first, slot, M, BM, EMPTY)
        p = tl.exp2(biased - lse_row[:, None])
        dp_with_own = dp + own_value_score[:, None] * own_strength
        if turn < 0:
            delta += tl.sum(p * dp_with_own, 1)
        else:
            softmax_gradient = p * (dp_with_own - delta[:, None])
            de = softmax_gradient * scale
            own_gradient = rounded_sums(same_token, de * own_score[:, None] + p * own_value_score[:, None], queries)
            exponent_gradient = rounded_sums(same_token, de * logits + p * dp, queries)
            if EMPTY == 2:
                mass = write_strength(log_mass)
                d_log = tl.where(mass > SMALLEST_NORMAL, softmax_gradient * (1 - 1 / tl.maximum(mass, SMALLEST_NORMAL)), 0.0)
                to_state = tl.sum(tl.where(continues[:, None], d_log, 0.0), 0)
                tl.store(log_gradient + (bh * num_chunks + n) * M + slot, to_state, mask=slot_ok)
                exponent_gradient += rounded_sums(same_token, d_log, queries)

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
                )
                from_write = to_decay_dtype(strength * to_reference, queries)
                de_row = to_decay_dtype(de * to_row, queries)
                p_row = to_decay_dtype(p * to_row, queries)
                key_weights = tl.dot(from_write, tl.trans(de_row), key_weights, input_precision="tf32x3")
                value_weights = tl.dot(from_write, tl.trans(p_row), value_weights, input_precision="tf32x3")
                received = tl.dot(scores, de_row, input_precision="tf32x3")
                received = tl.dot(value_scores, p_row, received, input_precision="tf32x3")
                strength_gradient += received * to_reference
            later = (index[None, :] >= index[:, None]) & (index_first[None, :] == index_first[:, None])
            summed = signed_sums(tl.where(later, 1.0, 0.0), exponent_gradient - strength * strength_gradient)
            strength_gradient += own_gradient
            dg = tl.where(gate < -40.0, 0.0, summed - exp(floored) * strength_gradient)
            at_gates = gate_gradient + at_written * M + index[:, None] * (H * M) + slot[None, :]
            tl.store(at_gates, dg, mask=written[:, None] & slot_ok[None, :])

            p_state = decayed(p, from_state, at_reference, ONE_BLOCK).to(dtype)
            de_state = decayed(de, from_state, at_reference, ONE_BLOCK).to(dtype)
            at_gradient = state_gradient + ((bh * num_chunks + n) * M) * (K + V)
            do_again = load_group(d_out + at_query * V, T - t0, C, R, RP, H, V, True)
            d_state = tl.dot(tl.trans(p_state), do_again, input_precision="tf32x3")
            at_values = at_gradient + slot[:, None] * (K + V) + K + tl.arange(0, V)[None, :]
            tl.store(at_values, d_state.to(state_gradient.dtype.element_ty), mask=slot_ok[:, None])
            q_again = load_group(q + at_query * K, T - t0, C, R, RP, H, K, True)
            d_state = tl.dot(tl.trans(de_state), q_again, input_precision="tf32x3")
            at_keys = at_gradient + slot[:, None] * (K + V) + tl.arange(0, K)[None, :]
            tl.store(at_keys, d_state.to(state_gradient.dtype.element_ty), mask=slot_ok[:, None])
            state = load_tile(state_keys + (at_state + m) * K, M - m, BM, K, True)
            dq_rows = tl.dot(de_state, state, dq_rows, input_precision="tf32x3")

    weights = tl.where(pairs, key_weights, 0.0).to(dtype)
    keys = load_rows_again(k + at_written * K, index * H, written, K)
    dq_rows = tl.dot(tl.trans(weights), keys, dq_rows, input_precision="tf32x3")
    at_dq = dq + at_query * K + at_row[:, None] * K + tl.arange(0, K)[None, :]
    tl.store(at_dq, dq_rows.to(dtype), mask=row_ok[:, None])
    q_again = load_group(q + at_query * K, T - t0, C, R, RP, H, K, True)
    dk = tl.dot(weights, q_again, input_precision="tf32x3")
    at_keys = dk_written + at_written * K + index[:, None] * (H * K) + tl.arange(0, K)[None, :]
    tl.store(at_keys, dk.to(dk_written.dtype.element_ty), mask=written[:, None])
    weights = tl.where(pairs, value_weights, 0.0).to(dtype)
    do_again = load_group(d_out + at_query * V, T - t0, C, R, RP, H, V, True)
    dv = tl.dot(weights, do_again, input_precision="tf32x3")
    at_values = dv_written + at_written * V + index[:, None] * (H * V) + tl.arange(0, V)[None, :]
    tl.store(at_values, dv.to(dv_written.dtype.element_ty), mask=written[:, None])


def backward_reads(
    problem: Problem, slab: Slab, states: ChunkStates, out: Tensor, lse: Tensor, d_out: Tensor, gradients: Gradients
) -> None:
    p, d = problem, gradients
    slot_backward_reads[(slab.chunks * p.batch * p.kv_heads,)](
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
        d.keys,
        d.values,
        d.gates,
        p.num_tokens,
        p.num_rows,
        p.held,
        p.window,
        slab.first,
        slab.chunks,
        p.scale,
        **p.tile_constants("H R RP K V M C BLOCK BM HALF GATE_FLOOR EMPTY DOCS ONE_BLOCK SLOTS_ALONE"),
        num_warps=p.tiles.read_warps,
        num_stages=p.tiles.read_stages,
    )
