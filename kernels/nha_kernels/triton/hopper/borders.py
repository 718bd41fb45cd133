"""Slots before every chunk: one pass over what the chunks write, a program for a slot's 128 columns. Sixteen chunks are loaded at a time."""

import triton
import triton.language as tl

from ..common import LENGTHS


@triton.jit
def _load_chunk(at, at_decay, n, num_chunks, M: tl.constexpr, D: tl.constexpr):
    there = n < num_chunks
    return tl.load(at + n * (M * D), mask=there, other=0.0), tl.load(at_decay + n * M, mask=there, other=0.0)


@triton.jit
def _take_chunk(at, starts, n, num_chunks, chunks_per_segment, first_segment, state, update, decay, M: tl.constexpr, D: tl.constexpr, STARTS: tl.constexpr):
    """Replaces the update of chunk n by the slots before it; returns those after it."""
    tl.store(at + n * (M * D), state.to(at.dtype.element_ty), mask=n < num_chunks)
    if STARTS:
        begins = (n % chunks_per_segment == 0) & (n < num_chunks)
        tl.store(starts + (first_segment + n // chunks_per_segment) * (M * D), state, mask=begins)
    return state * tl.exp2(decay) + update.to(tl.float32)


@triton.jit(do_not_specialize=LENGTHS)
def carry_slots(
    updates,  # [B*H, chunks, M, K+V] becomes the slots before each chunk
    decay,  # [B*H, chunks, M] log2
    log_decay,  # [B*H, chunks, M]
    carried,  # [B*H, M, K+V+1] slots and log-decay before the slab, then after it, float32
    starts,  # [B*H, segments, M, K+V] slots before each segment, float32
    start_logs,  # [B*H, segments, M]
    num_chunks,  # of the slab
    num_segments,  # of the sequence
    chunks_per_segment,
    first_segment,  # of the slab
    M: tl.constexpr,
    D: tl.constexpr,  # K + V
    BD: tl.constexpr,
    FIRST: tl.constexpr,  # whether this is the first slab: nothing is carried into it
    STARTS: tl.constexpr,
):
    slot, bh, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    column = part * BD + tl.arange(0, BD)
    at = updates + (bh * num_chunks * M + slot) * D + column
    at_decay = decay + bh * num_chunks * M + slot
    at_start = starts + (bh * num_segments * M + slot) * D + column
    at_carried = carried + (bh * M + slot) * (D + 1)
    state = tl.zeros((BD,), tl.float32)
    if not FIRST:
        state = tl.load(at_carried + column)
    for n in range(0, num_chunks, 16):
        u0, d0 = _load_chunk(at, at_decay, n, num_chunks, M, D)
        u1, d1 = _load_chunk(at, at_decay, n + 1, num_chunks, M, D)
        u2, d2 = _load_chunk(at, at_decay, n + 2, num_chunks, M, D)
        u3, d3 = _load_chunk(at, at_decay, n + 3, num_chunks, M, D)
        u4, d4 = _load_chunk(at, at_decay, n + 4, num_chunks, M, D)
        u5, d5 = _load_chunk(at, at_decay, n + 5, num_chunks, M, D)
        u6, d6 = _load_chunk(at, at_decay, n + 6, num_chunks, M, D)
        u7, d7 = _load_chunk(at, at_decay, n + 7, num_chunks, M, D)
        u8, d8 = _load_chunk(at, at_decay, n + 8, num_chunks, M, D)
        u9, d9 = _load_chunk(at, at_decay, n + 9, num_chunks, M, D)
        u10, d10 = _load_chunk(at, at_decay, n + 10, num_chunks, M, D)
        u11, d11 = _load_chunk(at, at_decay, n + 11, num_chunks, M, D)
        u12, d12 = _load_chunk(at, at_decay, n + 12, num_chunks, M, D)
        u13, d13 = _load_chunk(at, at_decay, n + 13, num_chunks, M, D)
        u14, d14 = _load_chunk(at, at_decay, n + 14, num_chunks, M, D)
        u15, d15 = _load_chunk(at, at_decay, n + 15, num_chunks, M, D)
        state = _take_chunk(at, at_start, n, num_chunks, chunks_per_segment, first_segment, state, u0, d0, M, D, STARTS)
        state = _take_chunk(at, at_start, n + 1, num_chunks, chunks_per_segment, first_segment, state, u1, d1, M, D, STARTS)
        state = _take_chunk(at, at_start, n + 2, num_chunks, chunks_per_segment, first_segment, state, u2, d2, M, D, STARTS)
        state = _take_chunk(at, at_start, n + 3, num_chunks, chunks_per_segment, first_segment, state, u3, d3, M, D, STARTS)
        state = _take_chunk(at, at_start, n + 4, num_chunks, chunks_per_segment, first_segment, state, u4, d4, M, D, STARTS)
        state = _take_chunk(at, at_start, n + 5, num_chunks, chunks_per_segment, first_segment, state, u5, d5, M, D, STARTS)
        state = _take_chunk(at, at_start, n + 6, num_chunks, chunks_per_segment, first_segment, state, u6, d6, M, D, STARTS)
        state = _take_chunk(at, at_start, n + 7, num_chunks, chunks_per_segment, first_segment, state, u7, d7, M, D, STARTS)
        state = _take_chunk(at, at_start, n + 8, num_chunks, chunks_per_segment, first_segment, state, u8, d8, M, D, STARTS)
        state = _take_chunk(at, at_start, n + 9, num_chunks, chunks_per_segment, first_segment, state, u9, d9, M, D, STARTS)
        state = _take_chunk(at, at_start, n + 10, num_chunks, chunks_per_segment, first_segment, state, u10, d10, M, D, STARTS)
        state = _take_chunk(at, at_start, n + 11, num_chunks, chunks_per_segment, first_segment, state, u11, d11, M, D, STARTS)
        state = _take_chunk(at, at_start, n + 12, num_chunks, chunks_per_segment, first_segment, state, u12, d12, M, D, STARTS)
        state = _take_chunk(at, at_start, n + 13, num_chunks, chunks_per_segment, first_segment, state, u13, d13, M, D, STARTS)
        state = _take_chunk(at, at_start, n + 14, num_chunks, chunks_per_segment, first_segment, state, u14, d14, M, D, STARTS)
        state = _take_chunk(at, at_start, n + 15, num_chunks, chunks_per_segment, first_segment, state, u15, d15, M, D, STARTS)
    tl.store(at_carried + column, state)
    if part == 0:  # the log-decay: exact sums of the gates, which the slots' decays floor
        log_mass = 0.0
        if not FIRST:
            log_mass = tl.load(at_carried + D)
        # In blocks of chunks: sums before each of them, stored where a segment begins.
        block = tl.arange(0, 64)
        for first in range(0, num_chunks, 64):
            chunk = first + block
            each = tl.load(log_decay + (bh * num_chunks + chunk) * M + slot, mask=chunk < num_chunks, other=0.0)
            before = log_mass + tl.cumsum(each, 0) - each
            if STARTS:
                begins = (chunk % chunks_per_segment == 0) & (chunk < num_chunks)
                at_log = start_logs + (bh * num_segments + first_segment + chunk // chunks_per_segment) * M + slot
                tl.store(at_log, before, mask=begins)
            log_mass += tl.sum(each, 0)
        tl.store(at_carried + D, log_mass)
