"""Slots before every chunk: one pass over what the chunks add, in Gluon. A warp takes 128 columns of a slot, 16 chunks at a time, each
chunk in registers of the same thread, so that the sums over chunks need no shuffles; the next 16 are loaded meanwhile."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..common import LENGTHS


@gluon.jit
def _compose(decay, update, next_decay, next_update):
    """Decay and update of two stretches of tokens as those of one."""
    return decay * next_decay, update * next_decay + next_update


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _carry_log(at, at_carried, at_start, num_chunks, M: gl.constexpr, FIRST: gl.constexpr, PER_SEGMENT: gl.constexpr):
    """Sums of the log-gates, 64 chunks at a time; those before each of them are stored where a segment begins."""
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    total = 0.0
    if not FIRST:
        total = gl.load(at_carried)
    for first in range(0, num_chunks, 64):
        chunk = first + gl.arange(0, 64, layout=layout)
        each = gl.load(at + chunk * M, mask=chunk < num_chunks, other=0.0)
        if PER_SEGMENT > 0:
            before = total + gl.associative_scan(each, 0, _add) - each
            begins = (chunk % PER_SEGMENT == 0) & (chunk < num_chunks)
            gl.store(at_start + chunk // PER_SEGMENT * M, before, mask=begins)
        total += gl.sum(each, 0)
    gl.store(at_carried, total)


@gluon.jit(do_not_specialize=[*LENGTHS, "first_segment"])
def carry_slots(
    updates,  # [B*H, chunks, M, K+V] becomes the slots before each chunk
    decay,  # [B*H, chunks, M] log2
    log_decay,  # [B*H, chunks, M]
    carried,  # [B*H, M, K+V+1] slots and log-decay before the slab, then after it, float32
    starts,  # [B*H, segments, M, K+V] slots before each segment, float32
    start_logs,  # [B*H, segments, M]
    num_chunks,  # of the slab
    num_segments,  # of the sequence
    first_segment,  # of the slab
    M: gl.constexpr,
    D: gl.constexpr,  # K + V
    FIRST: gl.constexpr,  # whether this is the first slab: nothing is carried into it
    PER_SEGMENT: gl.constexpr,  # chunks of a segment, 0: no starts are wanted
):
    layout: gl.constexpr = gl.BlockedLayout([16, 4], [1, 32], [1, 1], [1, 0])
    slot, bh, part = gl.program_id(0), gl.program_id(1).to(gl.int64), gl.program_id(2)
    at_carried = carried + (bh * M + slot) * (D + 1)
    at_log = log_decay + bh * num_chunks * M + slot
    at_segment = (bh * num_segments + first_segment) * M + slot
    if part == D // 128:  # the log-decay, of the gates as they are; the slots' decays floor them
        _carry_log(at_log, at_carried + D, start_logs + at_segment, num_chunks, M, FIRST, PER_SEGMENT)
    else:
        index = gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
        column = part * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
        at = updates + (bh * num_chunks * M + slot) * D + column[None, :] + index[:, None] * (M * D)
        at_decay = decay + bh * num_chunks * M + slot + index * M
        state = gl.zeros([128], gl.float32, gl.SliceLayout(0, layout))
        if not FIRST:
            state = gl.load(at_carried + column)
        update = gl.load(at, mask=(index < num_chunks)[:, None], other=0.0)
        log_factor = gl.load(at_decay, mask=index < num_chunks, other=0.0)
        for first in range(0, num_chunks, 16):
            chunk = first + index
            at_next = at + 16 * M * D
            at_decay += 16 * M
            next_update = gl.load(at_next, mask=(chunk + 16 < num_chunks)[:, None], other=0.0)
            next_factor = gl.load(at_decay, mask=chunk + 16 < num_chunks, other=0.0)
            factors = gl.zeros([16, 128], gl.float32, layout) + gl.exp2(log_factor)[:, None]
            factors, after = gl.associative_scan((factors, update.to(gl.float32)), 0, _compose)
            after = state[None, :] * factors + after
            # The slots before the first of these chunks, then those after each but the last.
            slots = updates + ((bh * num_chunks + first) * M + slot) * D + column
            gl.store(slots, state.to(updates.dtype.element_ty))
            follows = (index < 15) & (chunk + 1 < num_chunks)
            gl.store(at + M * D, after.to(updates.dtype.element_ty), mask=follows[:, None])
            if PER_SEGMENT > 0:
                at_start = starts + at_segment * D + column
                gl.store(at_start + first // PER_SEGMENT * (M * D), state, mask=first % PER_SEGMENT + column * 0 == 0)
                begins = follows & ((chunk + 1) % PER_SEGMENT == 0)
                gl.store(at_start[None, :] + ((chunk + 1) // PER_SEGMENT * (M * D))[:, None], after, mask=begins[:, None])
            state = gl.sum(gl.where((index == 15)[:, None], after, 0.0), 0)
            at = at_next
            update, log_factor = next_update, next_factor
        gl.store(at_carried + column, state)
