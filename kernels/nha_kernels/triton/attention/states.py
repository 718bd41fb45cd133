"""Slots before every chunk: a scan over chunks, parallel over segments of the sequence, KV heads and blocks of the state.

1. each segment from empty slots      -> its update U and its decay D       (skipped with one segment)
2. composed over segments              -> slots before each segment
3. each segment from those             -> slots before each chunk, slots after the last token
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import LENGTHS, continues_state, exp, load_starts, split_tf32, write_strength
from .problem import Problem, Slab


@triton.jit(do_not_specialize=LENGTHS)
def scan_segments(
    k,
    v,
    g,
    start,
    initial,  # [B*H, segments, M, K+V] slots before each segment, or the slots after it (FIRST_PASS)
    initial_log,  # [B*H, segments, M] sum of log-gates, likewise
    decay_log,  # [B*H, segments, M] decay of the segment as a logarithm, -inf where a document begins in it (FIRST_PASS)
    state_keys,  # [B*H, chunks, M, K] slots before each chunk of the slab
    state_values,  # [B*H, chunks, M, V]
    state_log,  # [B*H, chunks, M] sum of the log-gates written so far
    chunk_decay,  # [B*H, chunks, M] decay of the slots over the chunk, -1 where they are not carried on
    final,  # [B*H, M, K+V+1] slots and log-decay after the last token, float32
    T,
    E,
    held,
    W,
    first_chunk,  # of the slab
    num_chunks,  # of the slab; all with FIRST_PASS
    num_segments,  # of the sequence
    chunks_per_segment,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    GATE_FLOOR: tl.constexpr,
    DOCS: tl.constexpr,
    FIRST_PASS: tl.constexpr,
):
    segment = first_chunk // chunks_per_segment + tl.program_id(0)
    block_m = tl.program_id(1) // ((K + V) // BD)
    block_d = tl.program_id(1) % ((K + V) // BD)
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H

    slot = block_m * BM + tl.arange(0, BM)
    index = tl.arange(0, C)
    slot_ok = slot < M
    column = block_d * BD + tl.arange(0, BD)
    keeps_log = block_d == 0

    at_segment = bh * num_segments + segment
    state_offset = (at_segment * M + slot[:, None]) * (K + V) + column[None, :]
    if FIRST_PASS:
        state = tl.zeros((BM, BD), tl.float32)
        log_mass = tl.zeros((BM,), tl.float32)
    else:
        state = tl.load(initial + state_offset, mask=slot_ok[:, None], other=0.0)
        log_mass = tl.load(initial_log + at_segment * M + slot, mask=slot_ok, other=0.0)
    log_decay = tl.zeros((BM,), tl.float32)

    of_keys = block_d * BD < K
    if of_keys:
        x, target = k, state_keys
    else:
        x, target = v, state_values
    x_column = tl.where(of_keys, column, column - K)
    if K == V:
        dim = K
    else:
        dim = tl.where(of_keys, K, V)

    begin = segment * chunks_per_segment
    for n in range(begin, tl.minimum(begin + chunks_per_segment, first_chunk + num_chunks)):
        t0 = n * C
        at_chunk = bh * num_chunks + n - first_chunk
        if not FIRST_PASS:
            tl.store(
                target + at_chunk * M * dim + slot[:, None] * dim + x_column[None, :],
                state.to(target.dtype.element_ty),
                mask=slot_ok[:, None],
            )
        first = load_starts(start, b, t0, index, T, DOCS)
        last_first = tl.max(first, 0)  # the document of the chunk's last query: documents come in order
        row = held + t0 - W + index  # extended row written at each query
        kept = (row >= first) & (t0 + index < T) & (first == last_first)
        base = b * E + held + t0 - W
        gates = g + base * (H * M) + h * M + slot[:, None] + index[None, :] * (H * M)
        gate = tl.load(gates, mask=slot_ok[:, None] & kept[None, :], other=0.0)
        floored = tl.maximum(gate, GATE_FLOOR)
        behind = tl.where(index[:, None] > index[None, :], 1.0, 0.0)
        leading, rest = split_tf32(floored)  # log-gates of the writes that follow in the chunk, summed as by `signed_sums`
        after = tl.dot(leading, behind, tl.dot(rest, behind, input_precision="tf32"), input_precision="tf32")
        weight = write_strength(floored) * exp(after)
        values = tl.load(x + (base * H + h) * dim + index[:, None] * (H * dim) + x_column[None, :], mask=kept[:, None], other=0.0)
        if values.dtype == tl.float16:  # a weight may be far below fp16's smallest number
            values = values.to(tl.bfloat16)
        update = tl.dot(weight.to(values.dtype), values, input_precision="tf32x3")

        total = tl.sum(floored, axis=1)
        continues = continues_state(last_first, held, t0)
        decay = tl.where(continues, exp(total), 0.0)
        state = tl.where(continues, state * decay[:, None], 0.0) + update
        if not FIRST_PASS:  # noqa: SIM102 (one condition is known when compiling, the other is not)
            if keeps_log:
                tl.store(state_log + at_chunk * M + slot, log_mass, mask=slot_ok)
                carried = tl.where(continues, decay, -1.0)
                tl.store(chunk_decay + at_chunk * M + slot, carried, mask=slot_ok)
        exact = tl.sum(tl.maximum(gate, -40.0), axis=1)
        log_mass = tl.where(continues, log_mass, 0.0) + exact
        log_decay = tl.where(continues, log_decay + total, float("-inf"))

    if FIRST_PASS:
        tl.store(initial + state_offset, state, mask=slot_ok[:, None])
        if keeps_log:
            tl.store(initial_log + at_segment * M + slot, log_mass, mask=slot_ok)
            tl.store(decay_log + at_segment * M + slot, log_decay, mask=slot_ok)
    elif segment == num_segments - 1:
        tl.store(final + (bh * M + slot[:, None]) * (K + V + 1) + column[None, :], state, mask=slot_ok[:, None])
        if keeps_log:
            tl.store(final + (bh * M + slot) * (K + V + 1) + K + V, log_mass, mask=slot_ok)


@triton.jit
def _load_segment(at, at_log, at_decay, segment, num_segments, M: tl.constexpr, D: tl.constexpr, ok):
    there = segment < num_segments
    update = tl.load(at + segment * (M * D), mask=ok & there, other=0.0)
    return update, tl.load(at_log + segment * M, mask=there, other=0.0), tl.load(at_decay + segment * M, mask=there, other=0.0)


@triton.jit
def _take_segment(at, at_log, segment, num_segments, M: tl.constexpr, D: tl.constexpr, ok, state, log_mass, update, log_update, log_decay):
    tl.store(at + segment * (M * D), state, mask=ok & (segment < num_segments))
    tl.store(at_log + segment * M, log_mass, mask=segment < num_segments)
    resets = log_decay == float("-inf")
    state = tl.where(resets, 0.0, state * exp(log_decay)) + update
    return state, tl.where(resets, 0.0, log_mass) + log_update


@triton.jit(do_not_specialize=LENGTHS)
def compose_segments(
    updates,
    update_logs,
    decay_log,
    initial,  # [B*H, M, K+V+1]
    num_segments,
    M: tl.constexpr,
    D: tl.constexpr,  # K + V
    BD: tl.constexpr,  # the power of two that holds D
    HAS_INITIAL: tl.constexpr,
):
    """Replaces the update of each segment by the slots before it. One program per slot; four segments are loaded at a time."""
    slot = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BD)
    ok = column < D
    state = tl.zeros((BD,), tl.float32)
    log_mass = 0.0
    if HAS_INITIAL:
        at_initial = initial + (bh * M + slot) * (D + 1)
        state = tl.load(at_initial + column, mask=ok, other=0.0)
        log_mass = tl.load(at_initial + D)
    at = updates + (bh * num_segments * M + slot) * D + column
    at_log = update_logs + bh * num_segments * M + slot
    at_decay = decay_log + bh * num_segments * M + slot
    for i in range(0, num_segments, 4):
        update0, log0, decay0 = _load_segment(at, at_log, at_decay, i, num_segments, M, D, ok)
        update1, log1, decay1 = _load_segment(at, at_log, at_decay, i + 1, num_segments, M, D, ok)
        update2, log2, decay2 = _load_segment(at, at_log, at_decay, i + 2, num_segments, M, D, ok)
        update3, log3, decay3 = _load_segment(at, at_log, at_decay, i + 3, num_segments, M, D, ok)
        state, log_mass = _take_segment(at, at_log, i, num_segments, M, D, ok, state, log_mass, update0, log0, decay0)
        state, log_mass = _take_segment(at, at_log, i + 1, num_segments, M, D, ok, state, log_mass, update1, log1, decay1)
        state, log_mass = _take_segment(at, at_log, i + 2, num_segments, M, D, ok, state, log_mass, update2, log2, decay2)
        state, log_mass = _take_segment(at, at_log, i + 3, num_segments, M, D, ok, state, log_mass, update3, log3, decay3)


class ChunkStates(NamedTuple):
    """Slots before each chunk of a slab: keys [B*H, N, M, K], values [B*H, N, M, V], log-decay [B*H, N, M]; decay over each chunk
    [B*H, N, M], -1 where a document ends. Slots after the last token: final [B*H, M, K+V+1] in float32, written by the last slab."""

    keys: Tensor
    values: Tensor
    log_decay: Tensor
    chunk_decay: Tensor
    final: Tensor


class SegmentStarts(NamedTuple):
    """Slots [B*H, S, M, K+V] and log-decay [B*H, S, M] before each segment, float32: all that the backward keeps of the states."""

    slots: Tensor
    log_decay: Tensor
    chunks_per_segment: int


_PROGRAMS = 2048  # enough to fill any chip of today several times
_SEGMENTS_OF_SLAB = 16  # a slab is scanned by itself: enough segments to fill the chip
_LEAST_CHUNKS = 8  # shorter segments cost more in composing than they gain


def chunks_per_segment(problem: Problem) -> int:
    p = problem
    heads, width = p.batch * p.kv_heads, p.key_dim + p.value_dim
    per_chunk = heads * triton.cdiv(p.num_slots, p.tiles.scan_slots) * (width // p.tiles.scan_columns)
    return max(_LEAST_CHUNKS, min(triton.cdiv(p.num_chunks * per_chunk, _PROGRAMS), p.tiles.backward_slab // _SEGMENTS_OF_SLAB))


def segment_starts(problem: Problem, initial: Tensor | None) -> SegmentStarts:
    """Slots before each segment. `initial`: slots and log-decay of the memory, [B, H, M, K+V+1] in float32."""
    p = problem
    heads, width = p.batch * p.kv_heads, p.key_dim + p.value_dim
    length = chunks_per_segment(p)
    segments = triton.cdiv(p.num_chunks, length)
    options = {"dtype": torch.float32, "device": p.k.device}
    if segments == 1:
        if initial is None:
            return SegmentStarts(
                torch.zeros(heads, 1, p.num_slots, width, **options), torch.zeros(heads, 1, p.num_slots, **options), length
            )
        slots = initial.view(heads, 1, p.num_slots, width + 1)
        return SegmentStarts(slots[..., :width].contiguous(), slots[..., width].contiguous(), length)
    slots = torch.empty(heads, segments, p.num_slots, width, **options)
    logs = torch.empty(heads, segments, p.num_slots, **options)
    decays = torch.empty_like(logs)
    _scan(p, SegmentStarts(slots, logs, length), decays, Slab(0, p.num_chunks), None)
    compose_segments[(p.num_slots, heads)](
        slots,
        logs,
        decays,
        slots if initial is None else initial,
        segments,
        M=p.num_slots,
        D=width,
        BD=triton.next_power_of_2(width),
        HAS_INITIAL=initial is not None,
        num_warps=1,
    )
    return SegmentStarts(slots, logs, length)


def slabs(problem: Problem, starts: SegmentStarts, chunks: int) -> list[Slab]:
    """Slabs of about `chunks` chunks, each of whole segments so that it can be scanned by itself."""
    length = starts.chunks_per_segment * max(1, chunks // starts.chunks_per_segment)
    firsts = range(0, problem.num_chunks, length)
    return [Slab(first, min(length, problem.num_chunks - first)) for first in firsts]


def empty_states(problem: Problem, chunks: int) -> ChunkStates:
    p = problem
    heads = p.batch * p.kv_heads
    options = {"dtype": torch.float32, "device": p.k.device}
    return ChunkStates(
        torch.empty(heads * chunks, p.num_slots, p.key_dim, dtype=p.k.dtype, device=p.k.device),
        torch.empty(heads * chunks, p.num_slots, p.value_dim, dtype=p.k.dtype, device=p.k.device),
        torch.empty(heads * chunks, p.num_slots, **options),
        torch.empty(heads * chunks, p.num_slots, **options),
        torch.empty(heads, p.num_slots, p.key_dim + p.value_dim + 1, **options),
    )


def scan_slab(problem: Problem, starts: SegmentStarts, slab: Slab, states: ChunkStates) -> None:
    """Fills `states`, which may be longer than the slab: its first rows are used."""
    _scan(problem, starts, starts.log_decay, slab, states)


def _scan(p: Problem, starts: SegmentStarts, decays: Tensor, slab: Slab, states: ChunkStates | None) -> None:
    """Without `states` their arguments are never touched; any pointer of the right type stands in."""
    keys, values, log_decay, chunk_decay, final = states or (p.k, p.v, decays, decays, decays)
    grid = (
        triton.cdiv(slab.chunks, starts.chunks_per_segment),
        triton.cdiv(p.num_slots, p.tiles.scan_slots) * ((p.key_dim + p.value_dim) // p.tiles.scan_columns),
        p.batch * p.kv_heads,
    )
    scan_segments[grid](
        p.k,
        p.v,
        p.g,
        p.start,
        starts.slots,
        starts.log_decay,
        decays,
        keys,
        values,
        log_decay,
        chunk_decay,
        final,
        p.num_tokens,
        p.num_rows,
        p.held,
        p.window,
        slab.first,
        slab.chunks,
        starts.slots.shape[1],
        starts.chunks_per_segment,
        H=p.kv_heads,
        K=p.key_dim,
        V=p.value_dim,
        M=p.num_slots,
        C=p.C,
        BM=p.tiles.scan_slots,
        BD=p.tiles.scan_columns,
        GATE_FLOOR=p.GATE_FLOOR,
        DOCS=p.DOCS,
        FIRST_PASS=states is None,
        num_warps=p.tiles.scan_warps,
        num_stages=p.tiles.scan_stages,
    )
