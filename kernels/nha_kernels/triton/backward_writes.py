"""Backward through the slots: gradients composed over chunks from the end, then handed to the tokens that were written."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import continues_state, load_gates, load_starts, write_strength
from .problem import Gradients, Problem
from .states import ChunkStates
from .tiles import dot_halves, load_halves, load_rows, load_state_halves, store_halves, to_decay_dtype


@triton.jit
def _load_step(at, at_decay, n, step, decay_step, ok):
    """A chunk's own gradient and the decay of the slots over it; neither does anything where there is no such chunk."""
    own = tl.load(at + n * step, mask=ok & (n >= 0), other=0.0).to(tl.float32)
    return own, tl.load(at_decay + n * decay_step, mask=ok & (n >= 0), other=1.0)


@triton.jit
def _take_step(at, n, step, ok, gradient, own, decay):
    tl.store(at + n * step, gradient.to(at.dtype.element_ty), mask=ok & (n >= 0))
    return tl.where(decay >= 0, gradient * decay, 0.0) + own


@triton.jit
def compose_state_gradients(
    state_gradient,  # [B*H, N, M, K+V], in: from each chunk's reads to the slots before it; out: gradient of the slots after it
    log_gradient,  # [B*H, N, M], likewise of the sum of log-gates
    chunk_decay,  # [B*H, N, M]
    final_gradient,  # [B*H, M, K+V+1] gradient of the slots after the last token
    initial_gradient,  # [B*H, M, K+V+1] gradient of the slots before the first token
    num_chunks,
    M: tl.constexpr,
    D: tl.constexpr,  # K + V
    BE: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    EMPTY: tl.constexpr,
):
    block = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    last = num_chunks - 1
    at_decay = chunk_decay + bh * num_chunks * M
    if block * BE < M * D:
        element = block * BE + tl.arange(0, BE)
        slot = element // D
        ok = element < M * D
        column = bh * M * (D + 1) + slot * (D + 1) + element % D
        gradient = tl.zeros((BE,), tl.float32)
        if HAS_FINAL:
            gradient = tl.load(final_gradient + column, mask=ok, other=0.0)
        at = state_gradient + bh * num_chunks * M * D + element
        step = tl.full((), M * D, tl.int64)
        for i in range(0, num_chunks, 4):  # four chunks are loaded at a time: the loop waits for memory, not for arithmetic
            n = last - i
            own0, decay0 = _load_step(at, at_decay + slot, n, step, M, ok)
            own1, decay1 = _load_step(at, at_decay + slot, n - 1, step, M, ok)
            own2, decay2 = _load_step(at, at_decay + slot, n - 2, step, M, ok)
            own3, decay3 = _load_step(at, at_decay + slot, n - 3, step, M, ok)
            gradient = _take_step(at, n, step, ok, gradient, own0, decay0)
            gradient = _take_step(at, n - 1, step, ok, gradient, own1, decay1)
            gradient = _take_step(at, n - 2, step, ok, gradient, own2, decay2)
            gradient = _take_step(at, n - 3, step, ok, gradient, own3, decay3)
        tl.store(initial_gradient + column, gradient, mask=ok)
    else:
        log_slot = tl.arange(0, BE)  # BE >= M
        log_ok = log_slot < M
        log_column = bh * M * (D + 1) + log_slot * (D + 1) + D
        d_log = tl.zeros((BE,), tl.float32)
        if HAS_FINAL:
            d_log = tl.load(final_gradient + log_column, mask=log_ok, other=0.0)
        at_log = log_gradient + bh * num_chunks * M + log_slot
        for i in range(0, num_chunks):
            own, decay = _load_step(at_log, at_decay + log_slot, last - i, M, M, log_ok)
            if EMPTY != 2:
                own = tl.zeros((BE,), tl.float32)
            d_log = _take_step(at_log, last - i, M, log_ok, d_log, own, tl.where(decay >= 0, 1.0, -1.0))
        tl.store(initial_gradient + log_column, d_log, mask=log_ok)


@triton.jit
def slot_backward_writes(
    k,
    v,
    g,
    start,
    state_keys,
    state_values,
    state_gradient,
    log_gradient,
    dk_written,
    dv_written,
    gate_gradient,
    T,
    E,
    held,
    W,
    num_chunks,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    HALF: tl.constexpr,
    GATE_FLOOR: tl.constexpr,
    GATE_DOT: tl.constexpr,
    DOCS: tl.constexpr,
):
    """Adds what later chunks give to the tokens written in a chunk: through the slots after the chunk, whose gradient is known."""
    n = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    t0 = n * C
    index = tl.arange(0, C)
    first = load_starts(start, b, t0, index, T, DOCS)
    written_row = held + t0 - W + index
    last_first = tl.max(first, 0)
    kept = (written_row >= first) & (t0 + index < T) & (first == last_first)
    continues = continues_state(last_first, held, t0)
    at_written = (b * E + held + t0 - W) * H + h
    k1, k2 = load_halves(k + at_written * K, index * H, kept, K, HALF)
    values = load_rows(v + at_written * V, index * H, kept, V)
    k1, k2, values = to_decay_dtype(k1, k1), to_decay_dtype(k2, k2), to_decay_dtype(values, values)

    dk1 = tl.zeros((C, K // 2), tl.float32)
    dk2 = tl.zeros((C, K // 2), tl.float32)
    dv = tl.zeros((C, V), tl.float32)
    for m in range(0, M, BM):
        slot = m + tl.arange(0, BM)
        slot_ok = slot < M
        gate = load_gates(g + at_written * M, index * H, slot, kept, M)
        floored = tl.maximum(gate, GATE_FLOOR)
        strength = write_strength(floored)
        behind = tl.where(index[None, :] > index[:, None], 1.0, 0.0)
        to_end = tl.exp(tl.dot(behind, floored, input_precision=GATE_DOT))

        at_gradient = state_gradient + (bh * num_chunks + n) * M * (K + V)
        d1, d2 = load_state_halves(at_gradient, slot, slot_ok, K, K + V, HALF)
        at_values = at_gradient + K + slot[:, None] * (K + V) + tl.arange(0, V)[None, :]
        dsv = tl.load(at_values, mask=slot_ok[:, None], other=0.0)
        at_state = (bh * (num_chunks + 1) + n) * M
        s1, s2 = load_halves(state_keys + at_state * K, slot, slot_ok, K, HALF)
        sv = load_rows(state_values + at_state * V, slot, slot_ok, V)
        held_before = tl.sum(s1.to(tl.float32) * d1.to(tl.float32) + s2.to(tl.float32) * d2.to(tl.float32), 1)
        held_before += tl.sum(sv.to(tl.float32) * dsv.to(tl.float32), 1)
        held_before = tl.where(continues, held_before * tl.exp(tl.sum(floored, 0)), 0.0)
        held_before += tl.load(log_gradient + (bh * num_chunks + n) * M + slot, mask=slot_ok, other=0.0)

        weight = to_decay_dtype(strength * to_end, k1)
        dk1 = tl.dot(weight, d1, dk1, input_precision="tf32x3")
        dk2 = tl.dot(weight, d2, dk2, input_precision="tf32x3")
        dv = tl.dot(weight, dsv, dv, input_precision="tf32x3")
        received = dot_halves(k1, k2, d1, d2)
        received = tl.dot(values, tl.trans(dsv), received, input_precision="tf32x3")
        strength_gradient = received * to_end
        # A gate decays what the slots held before the chunk and what earlier tokens of the chunk wrote.
        earlier = tl.where(index[None, :] < index[:, None], 1.0, 0.0)
        dg = held_before[None, :] + tl.dot(earlier, strength * strength_gradient, input_precision=GATE_DOT)
        dg -= tl.exp(floored) * strength_gradient
        at_gates = gate_gradient + at_written * M + index[:, None] * (H * M) + slot[None, :]
        gates_ok = kept[:, None] & slot_ok[None, :]
        before = tl.load(at_gates, mask=gates_ok, other=0.0)
        tl.store(at_gates, before + tl.where(gate < -40.0, 0.0, dg), mask=gates_ok)

    b1, b2 = load_halves(dk_written + at_written * K, index * H, kept, K, HALF)
    store_halves(dk_written + at_written * K, index * H, kept, dk1 + b1, dk2 + b2, K, HALF)
    at_values = dv_written + at_written * V + index[:, None] * (H * V) + tl.arange(0, V)[None, :]
    before = tl.load(at_values, mask=kept[:, None], other=0.0)
    tl.store(at_values, (dv + before).to(dv_written.dtype.element_ty), mask=kept[:, None])


def backward_writes(problem: Problem, states: ChunkStates, gradients: Gradients, d_final: Tensor | None) -> Tensor:
    """Completes the gradients of written keys, written values and gates. Returns that of the slots before the first token."""
    p, d = problem, gradients
    width = p.key_dim + p.value_dim
    heads = p.batch * p.kv_heads
    d_initial = torch.empty(heads, p.num_slots, width + 1, dtype=torch.float32, device=p.q.device)
    elements = 512
    compose_state_gradients[(triton.cdiv(p.num_slots * width, elements) + 1, heads)](
        d.states,
        d.logs,
        states.chunk_decay,
        d_initial if d_final is None else d_final,
        d_initial,
        p.num_chunks,
        M=p.num_slots,
        D=width,
        BE=elements,
        HAS_FINAL=d_final is not None,
        EMPTY={"attend": 0, "mask": 1, "weight": 2}[p.empty_slots],
        num_warps=2,
    )
    slot_backward_writes[(p.num_chunks, heads)](
        p.k,
        p.v,
        p.g,
        p.start,
        states.keys,
        states.values,
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
        **p.tile_constants("H K V M C BM HALF GATE_FLOOR GATE_DOT DOCS"),
        num_warps=4,
        num_stages=1,
    )
    return d_initial
