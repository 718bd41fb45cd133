"""The first launch of a decode step (step.py): every program attends to one piece of the memory, and writes to it if it is slots.

`index` counts the tokens of the window by age: 0 the oldest place of the ring, W the first new token. A query at token t of the step stands
at W + t, sees indices above t, and the token at index t leaves when it comes.
"""

import triton
import triton.language as tl

from ..common import LOG2_E, write_strength
from ..tile_operations import biased_logits
from .window import attend_window


@triton.jit
def _attend_slots(
    q,
    k,
    v,
    g,
    slot_keys,
    slot_values,
    slot_log_decay,
    window_keys,
    window_values,
    window_log_gates,
    part_out,
    part_max,
    part_sum,
    piece,
    bh,
    part,
    start,
    seen,
    T,
    W,
    logit_scale,
    H: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    BM: tl.constexpr,
    EMPTY: tl.constexpr,
):
    b, h = bh // H, bh % H
    slot = piece * BM + tl.arange(0, BM)
    key_channel, value_channel = tl.arange(0, K), tl.arange(0, V)
    at_keys = slot_keys + (bh * M + slot)[:, None] * K + key_channel[None, :]
    at_values = slot_values + (bh * M + slot)[:, None] * V + value_channel[None, :]
    keys, values = tl.load(at_keys), tl.load(at_values)
    log_decay = tl.load(slot_log_decay + bh * M + slot)
    head = tl.arange(0, 16)
    for t in range(T):
        held = (t < W) & (seen + t >= W)  # the leaving token is in the ring
        place = (b * W + (start + t) % tl.maximum(W, 1)) * H + h
        fresh = t >= W  # it came in this very step
        at_new = (b * T + t - W) * H + h
        gate = tl.load(window_log_gates + place * M + slot, mask=(slot < M) & held, other=0.0)
        gate += tl.load(g + at_new * M + slot, mask=(slot < M) & fresh, other=0.0)
        gate = tl.maximum(gate, -40.0)
        key = tl.load(window_keys + place * K + key_channel, mask=(key_channel < K) & held, other=0.0).to(tl.float32)
        key += tl.load(k + at_new * K + key_channel, mask=(key_channel < K) & fresh, other=0.0).to(tl.float32)
        value = tl.load(window_values + place * V + value_channel, mask=(value_channel < V) & held, other=0.0).to(tl.float32)
        value += tl.load(v + at_new * V + value_channel, mask=(value_channel < V) & fresh, other=0.0).to(tl.float32)
        decay, strength = tl.exp(gate), write_strength(gate)
        keys = keys * decay[:, None] + strength[:, None] * key[None, :]
        values = values * decay[:, None] + strength[:, None] * value[None, :]
        log_decay += gate

        at_query = q + (((b * T + t) * H + h) * R + head)[:, None] * K + key_channel[None, :]
        queries = tl.load(at_query, mask=(head < R)[:, None], other=0.0)
        logits = tl.dot(queries, tl.trans(keys.to(queries.dtype)), input_precision="tf32x3") * logit_scale
        log_mass = tl.zeros_like(logits) + log_decay[None, :]
        anything_written = head * 0 + seen + t >= W
        logits = biased_logits(logits, log_mass, anything_written, slot, M, BM, EMPTY)
        largest = tl.max(logits, 1)
        p = tl.exp2(logits - tl.where(largest == float("-inf"), 0.0, largest)[:, None])
        at_part = part * (T * R) + t * R + head
        tl.store(part_max + at_part, largest, mask=head < R)
        tl.store(part_sum + at_part, tl.sum(p, 1), mask=head < R)
        acc = tl.dot(p.to(queries.dtype), values.to(queries.dtype), input_precision="tf32x3")
        tl.store(part_out + at_part[:, None] * V + value_channel[None, :], acc, mask=(head < R)[:, None])
    if seen + T > W:
        tl.store(at_keys, keys)
        tl.store(at_values, values)
        tl.store(slot_log_decay + bh * M + slot, log_decay)


@triton.jit
def attend_pieces(
    q,  # [B, T, HQ, K], k, v, g likewise: the new tokens
    k,
    v,
    g,
    slot_keys,  # [B, H, M, K]
    slot_values,  # [B, H, M, V]
    slot_log_decay,  # [B, H, M]
    window_keys,  # [B, W, H, K]
    window_values,  # [B, W, H, V]
    window_log_gates,  # [B, W, H, M]
    length,  # [B]
    window_start,  # [B]
    frequencies,
    part_out,  # [B * H, pieces, T * R, V] values weighted by exp2(logit - part_max)
    part_max,  # [B * H, pieces, T * R] largest logit, base 2
    part_sum,  # [B * H, pieces, T * R]
    old_start,  # [B] copy of window_start: the second launch changes that one
    T,
    W,
    window_rows,  # of a piece
    scale,
    rope_factor,
    H: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    BM: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    BN: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    EMPTY: tl.constexpr,
    ROPE: tl.constexpr,
):
    bh = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    num_pieces = tl.num_programs(1)
    part = bh * num_pieces + piece
    start, seen = tl.load(window_start + bh // H), tl.load(length + bh // H)
    if piece < M // BM:
        if (piece == 0) & (bh % H == 0):
            tl.store(old_start + bh // H, start)
        _attend_slots(
            q,
            k,
            v,
            g,
            slot_keys,
            slot_values,
            slot_log_decay,
            window_keys,
            window_values,
            window_log_gates,
            part_out,
            part_max,
            part_sum,
            piece,
            bh,
            part,
            start,
            seen,
            T,
            W,
            scale * LOG2_E,
            H,
            R,
            K,
            V,
            M,
            BM,
            EMPTY,
        )
    else:
        first = (piece - M // BM) * window_rows
        attend_window(
            q,
            k,
            v,
            window_keys,
            window_values,
            frequencies,
            part_out,
            part_max,
            part_sum,
            first,
            tl.minimum(first + window_rows, W),
            piece == num_pieces - 1,
            bh,
            part,
            start,
            seen,
            T,
            W,
            scale * LOG2_E,
            rope_factor,
            H,
            R,
            K,
            V,
            ROWS,
            ROW_BLOCKS,
            BN,
            HALF,
            PAIRS,
            ROPE,
        )
