"""Backward through the slots: gradients composed over chunks from the end, then handed to the tokens that were written."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import LENGTHS, continues_state, exp, load_gates, load_starts, signed_sums, write_strength
from ..tile_operations import chunk_and_head, dot_halves, load_halves, load_rows, load_state_halves, store_halves, to_decay_dtype
from .problem import Gradients, Problem, Slab
from .states import ChunkStates


@triton.jit
def _load_step(at, at_log, at_decay, n, step, M: tl.constexpr, ok, EMPTY: tl.constexpr):
    """A chunk's own gradients and the decay of the slot over it; none does anything where there is no such chunk."""
    own = tl.load(at + n * step, mask=ok & (n >= 0), other=0.0).to(tl.float32)
    own_log = 0.0
    if EMPTY == 2:
        own_log = tl.load(at_log + n * M, mask=n >= 0, other=0.0)
    return own, own_log, tl.load(at_decay + n * M, mask=n >= 0, other=1.0)


@triton.jit
def _take_step(at, at_log, n, step, M: tl.constexpr, ok, gradient, log, own, own_log, decay, LOG: tl.constexpr):
    tl.store(at + n * step, gradient.to(at.dtype.element_ty), mask=ok & (n >= 0))
    if LOG:
        tl.store(at_log + n * M, log, mask=n >= 0)
        log = tl.where(decay >= 0, log, 0.0) + own_log
    return tl.where(decay >= 0, gradient * decay, 0.0) + own, log


@triton.jit(do_not_specialize=LENGTHS)
def compose_state_gradients(
    state_gradient,  # [B*H, N, M, K+V], in: from each chunk's reads to the slots before it; out: gradient of the slots after it
    log_gradient,  # [B*H, N, M], likewise of the sum of log-gates (LOG)
    chunk_decay,  # [B*H, N, M]
    final_gradient,  # [B*H, M, K+V+1] gradient of the slots after the slab
    initial_gradient,  # [B*H, M, K+V+1] gradient of the slots before the slab
    num_chunks,
    M: tl.constexpr,
    D: tl.constexpr,  # K + V
    BD: tl.constexpr,  # the power of two that holds D
    HAS_FINAL: tl.constexpr,
    EMPTY: tl.constexpr,
    LOG: tl.constexpr,
):
    """One program per slot. The loop waits for memory, not for arithmetic, so several chunks are loaded at a time."""
    slot = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BD)
    ok = column < D
    at_ends = (bh * M + slot) * (D + 1)
    gradient = tl.zeros((BD,), tl.float32)
    log = tl.full((), 0.0, tl.float32)
    if HAS_FINAL:
        gradient = tl.load(final_gradient + at_ends + column, mask=ok, other=0.0)
        log = tl.load(final_gradient + at_ends + D)
    at = state_gradient + (bh * num_chunks * M + slot) * D + column
    at_decay = chunk_decay + bh * num_chunks * M + slot
    at_log = log_gradient + bh * num_chunks * M + slot
    step = tl.full((), M * D, tl.int64)
    for i in range(0, num_chunks, 16):
        n = num_chunks - 1 - i
        own0, log0, decay0 = _load_step(at, at_log, at_decay, n - 0, step, M, ok, EMPTY)
        own1, log1, decay1 = _load_step(at, at_log, at_decay, n - 1, step, M, ok, EMPTY)
        own2, log2, decay2 = _load_step(at, at_log, at_decay, n - 2, step, M, ok, EMPTY)
        own3, log3, decay3 = _load_step(at, at_log, at_decay, n - 3, step, M, ok, EMPTY)
        own4, log4, decay4 = _load_step(at, at_log, at_decay, n - 4, step, M, ok, EMPTY)
        own5, log5, decay5 = _load_step(at, at_log, at_decay, n - 5, step, M, ok, EMPTY)
        own6, log6, decay6 = _load_step(at, at_log, at_decay, n - 6, step, M, ok, EMPTY)
        own7, log7, decay7 = _load_step(at, at_log, at_decay, n - 7, step, M, ok, EMPTY)
        own8, log8, decay8 = _load_step(at, at_log, at_decay, n - 8, step, M, ok, EMPTY)
        own9, log9, decay9 = _load_step(at, at_log, at_decay, n - 9, step, M, ok, EMPTY)
        own10, log10, decay10 = _load_step(at, at_log, at_decay, n - 10, step, M, ok, EMPTY)
        own11, log11, decay11 = _load_step(at, at_log, at_decay, n - 11, step, M, ok, EMPTY)
        own12, log12, decay12 = _load_step(at, at_log, at_decay, n - 12, step, M, ok, EMPTY)
        own13, log13, decay13 = _load_step(at, at_log, at_decay, n - 13, step, M, ok, EMPTY)
        own14, log14, decay14 = _load_step(at, at_log, at_decay, n - 14, step, M, ok, EMPTY)
        own15, log15, decay15 = _load_step(at, at_log, at_decay, n - 15, step, M, ok, EMPTY)
        gradient, log = _take_step(at, at_log, n - 0, step, M, ok, gradient, log, own0, log0, decay0, LOG)
        gradient, log = _take_step(at, at_log, n - 1, step, M, ok, gradient, log, own1, log1, decay1, LOG)
        gradient, log = _take_step(at, at_log, n - 2, step, M, ok, gradient, log, own2, log2, decay2, LOG)
        gradient, log = _take_step(at, at_log, n - 3, step, M, ok, gradient, log, own3, log3, decay3, LOG)
        gradient, log = _take_step(at, at_log, n - 4, step, M, ok, gradient, log, own4, log4, decay4, LOG)
        gradient, log = _take_step(at, at_log, n - 5, step, M, ok, gradient, log, own5, log5, decay5, LOG)
        gradient, log = _take_step(at, at_log, n - 6, step, M, ok, gradient, log, own6, log6, decay6, LOG)
        gradient, log = _take_step(at, at_log, n - 7, step, M, ok, gradient, log, own7, log7, decay7, LOG)
        gradient, log = _take_step(at, at_log, n - 8, step, M, ok, gradient, log, own8, log8, decay8, LOG)
        gradient, log = _take_step(at, at_log, n - 9, step, M, ok, gradient, log, own9, log9, decay9, LOG)
        gradient, log = _take_step(at, at_log, n - 10, step, M, ok, gradient, log, own10, log10, decay10, LOG)
        gradient, log = _take_step(at, at_log, n - 11, step, M, ok, gradient, log, own11, log11, decay11, LOG)
        gradient, log = _take_step(at, at_log, n - 12, step, M, ok, gradient, log, own12, log12, decay12, LOG)
        gradient, log = _take_step(at, at_log, n - 13, step, M, ok, gradient, log, own13, log13, decay13, LOG)
        gradient, log = _take_step(at, at_log, n - 14, step, M, ok, gradient, log, own14, log14, decay14, LOG)
        gradient, log = _take_step(at, at_log, n - 15, step, M, ok, gradient, log, own15, log15, decay15, LOG)
    tl.store(initial_gradient + at_ends + column, gradient, mask=ok)
    tl.store(initial_gradient + at_ends + D, log)


@triton.jit(do_not_specialize=LENGTHS)
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
    first_chunk,  # of the slab
    num_chunks,  # of the slab
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    HALF: tl.constexpr,
    GATE_FLOOR: tl.constexpr,
    DOCS: tl.constexpr,
    LOG: tl.constexpr,
):
    """Adds what later chunks give to the tokens written in a chunk: through the slots after the chunk, whose gradient is known."""
    n, bh = chunk_and_head(num_chunks)
    b, h = bh // H, bh % H
    t0 = (first_chunk + n) * C
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
        to_end = exp(signed_sums(behind, floored))

        at_gradient = state_gradient + (bh * num_chunks + n) * M * (K + V)
        d1, d2 = load_state_halves(at_gradient, slot, slot_ok, K, K + V, HALF)
        at_values = at_gradient + K + slot[:, None] * (K + V) + tl.arange(0, V)[None, :]
        dsv = tl.load(at_values, mask=slot_ok[:, None], other=0.0)
        at_state = (bh * num_chunks + n) * M
        s1, s2 = load_halves(state_keys + at_state * K, slot, slot_ok, K, HALF)
        sv = load_rows(state_values + at_state * V, slot, slot_ok, V)
        held_before = tl.sum(s1.to(tl.float32) * d1.to(tl.float32) + s2.to(tl.float32) * d2.to(tl.float32), 1)
        held_before += tl.sum(sv.to(tl.float32) * dsv.to(tl.float32), 1)
        held_before = tl.where(continues, held_before * exp(tl.sum(floored, 0)), 0.0)
        if LOG:
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
        dg = held_before[None, :] + signed_sums(earlier, strength * strength_gradient)
        dg -= exp(floored) * strength_gradient
        at_gates = gate_gradient + at_written * M + index[:, None] * (H * M) + slot[None, :]
        gates_ok = kept[:, None] & slot_ok[None, :]
        before = tl.load(at_gates, mask=gates_ok, other=0.0)
        tl.store(at_gates, before + tl.where(gate < -40.0, 0.0, dg), mask=gates_ok)

    b1, b2 = load_halves(dk_written + at_written * K, index * H, kept, K, HALF)
    store_halves(dk_written + at_written * K, index * H, kept, dk1 + b1, dk2 + b2, K, HALF)
    at_values = dv_written + at_written * V + index[:, None] * (H * V) + tl.arange(0, V)[None, :]
    before = tl.load(at_values, mask=kept[:, None], other=0.0)
    tl.store(at_values, (dv + before).to(dv_written.dtype.element_ty), mask=kept[:, None])


def backward_writes(
    problem: Problem, slab: Slab, states: ChunkStates, gradients: Gradients, d_after: Tensor | None, *, uses_log: bool
) -> Tensor:
    """Completes the gradients of keys, values and gates written in a slab. From the gradient of the slots after it to that before it."""
    p, d = problem, gradients
    width = p.key_dim + p.value_dim
    heads = p.batch * p.kv_heads
    d_before = torch.empty(heads, p.num_slots, width + 1, dtype=torch.float32, device=p.q.device)
    compose_state_gradients[(p.num_slots, heads)](
        d.states,
        d.logs,
        states.chunk_decay,
        d_before if d_after is None else d_after,
        d_before,
        slab.chunks,
        M=p.num_slots,
        D=width,
        BD=triton.next_power_of_2(width),
        HAS_FINAL=d_after is not None,
        EMPTY=p.EMPTY,
        LOG=uses_log,
        num_warps=1,
    )
    slot_backward_writes[(slab.chunks * heads,)](
        p.k,
        p.v,
        p.g,
        p.start,
        states.keys,
        states.values,
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
        **p.tile_constants("H K V M C BM HALF GATE_FLOOR DOCS"),
        LOG=uses_log,
        num_warps=4,
        num_stages=1,
        maxnreg=p.tiles.write_registers,
    )
    return d_before
