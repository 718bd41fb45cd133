"""`slot_summary` on a GPU: segments of the sequence in parallel; what has decayed to nothing at the end is not even read.

The weight with which token t remains in a slot at the end is w_t = (1 - exp(g_t)) exp(A_t), with A_t the sum of the log-gates behind t.
Chunks and segments are counted from the end, so A_t is a plain sum of what has been seen: no difference of large sums, and nothing that
could overflow.

    update = sum of w_t x_t^T                 x: keys beside values, [K+V]

In float32 exp(A) is 0 for A below -104, and so are w and all gradients through it. The log-gates of all tokens are read once to find out
where that is so, keys and values only from there on: gates that forget make the summary cheap, gates that never do cost the full pass.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import LENGTHS, write_strength
from ..device import on_device_of_first_argument
from ..dispatch import architecture_for

_MOST_SEGMENTS = 64
_PROGRAMS = 1024  # enough to fill any chip of today several times
_LEAST_CHUNKS = 4  # a power of two; shorter segments cost more in composing than they gain
GONE = tl.constexpr(-104.0)  # exp of it is below half of float32's smallest number


@triton.jit
def segment_chunks(segment, num_chunks, short_segments, long_chunks, SHORT: tl.constexpr):
    """First chunk of a segment, counted from the end, and the one behind its last. The segments next to the end are short: there is
    where the work is when gates forget."""
    first = tl.where(segment < short_segments, segment * SHORT, short_segments * SHORT + (segment - short_segments) * long_chunks)
    length = tl.where(segment < short_segments, SHORT, long_chunks)
    return tl.minimum(first, num_chunks), tl.minimum(first + length, num_chunks)


@triton.jit
def load_gates(at, stride, token, T, slot, M: tl.constexpr):
    """Log-gates [C, BM] of a chunk, 0 behind the last token; and which of them are above the clamp. `stride`: from token to token."""
    gate = tl.load(at + token[:, None] * stride + slot[None, :], mask=(token < T)[:, None] & (slot < M)[None, :], other=0.0)
    return tl.maximum(gate, -40.0), gate >= -40.0


@triton.jit
def summed_behind(gate, index):
    """Sum of the log-gates that follow each token in its chunk."""
    return tl.dot(tl.where(index[None, :] > index[:, None], 1.0, 0.0), gate, input_precision="tf32x3")


@triton.jit
def log_behind_segment(segment_log, bh, segment, slot, num_segments, M: tl.constexpr, SEGMENTS: tl.constexpr):
    """Sum of the log-gates [BM] of the segments that follow this one."""
    other = tl.arange(0, SEGMENTS)
    at = segment_log + (bh * num_segments + other)[:, None] * M + slot[None, :]
    return tl.sum(tl.load(at, mask=(other < segment)[:, None] & (slot < M)[None, :], other=0.0), 0)


@triton.jit(do_not_specialize=LENGTHS)
def sum_log_gates(
    g,
    segment_log,  # [B * H, segments, M] sum of the log-gates of each segment, from the end
    chunk_log,  # [B * H, chunks, M] sum of the log-gates between a chunk and the end of its segment, chunks from the end
    g_batch,  # strides of batch, token and head
    g_token,
    g_head,
    T,
    num_chunks,
    short_segments,
    long_chunks,
    H: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    SHORT: tl.constexpr,
):
    segment = tl.program_id(0)
    slot = tl.program_id(1) * BM + tl.arange(0, BM)
    bh = tl.program_id(2).to(tl.int64)
    gates = g + bh // H * g_batch + bh % H * g_head
    step, index = tl.arange(0, SHORT), tl.arange(0, C)
    first, end = segment_chunks(segment, num_chunks, short_segments, long_chunks, SHORT)
    behind = tl.zeros((BM,), tl.float32)
    for i in range(first, end, SHORT):  # several chunks at a time: memory is slow to answer
        chunk = i + step
        token = ((num_chunks - 1 - chunk) * C)[:, None] + index[None, :]
        there = (chunk < end)[:, None] & (token < T)
        at = gates + token.to(tl.int64)[:, :, None] * g_token + slot[None, None, :]
        gate = tl.load(at, mask=there[:, :, None] & (slot < M)[None, None, :], other=0.0)
        sums = tl.sum(tl.maximum(gate, -40.0), 1)
        earlier = tl.where((step[None, :] < step[:, None])[:, :, None], sums[None, :, :], 0.0)
        mask = (chunk < end)[:, None] & (slot < M)[None, :]
        tl.store(chunk_log + (bh * num_chunks + chunk)[:, None] * M + slot[None, :], behind[None, :] + tl.sum(earlier, 1), mask=mask)
        behind += tl.sum(sums, 0)
    tl.store(segment_log + (bh * tl.num_programs(0) + segment) * M + slot, behind, mask=slot < M)


@triton.jit(do_not_specialize=LENGTHS)
def summarise_segments(
    k,  # [B, T, H, K], v and g likewise
    v,
    g,
    updates,  # [B * H, segments, M, K+V] what remains of each segment at the end; not written where that is nothing
    segment_log,
    chunk_log,
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    g_batch,
    g_token,
    g_head,
    T,
    num_chunks,
    short_segments,
    long_chunks,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    SHORT: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    segment = tl.program_id(0)
    block_d = tl.program_id(1) % ((K + V) // BD)
    slot = tl.program_id(1) // ((K + V) // BD) * BM + tl.arange(0, BM)
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    behind_segment = log_behind_segment(segment_log, bh, segment, slot, tl.num_programs(0), M, SEGMENTS)
    if tl.max(tl.where(slot < M, behind_segment, GONE)) <= GONE:
        return
    index, column = tl.arange(0, C), block_d * BD + tl.arange(0, BD)
    if block_d * BD < K:
        x = k + b * k_batch + h * k_head + column[None, :]
        stride = k_token
    else:
        x = v + b * v_batch + h * v_head + (column - K)[None, :]
        stride = v_token

    acc = tl.zeros((BD, BM), tl.float32)
    first, end = segment_chunks(segment, num_chunks, short_segments, long_chunks, SHORT)
    for i in range(first, end):
        token = (num_chunks - 1 - i) * C + index.to(tl.int64)
        gate, _ = load_gates(g + b * g_batch + h * g_head, g_token, token, T, slot, M)
        values = tl.load(x + token[:, None] * stride, mask=(token < T)[:, None], other=0.0)
        behind = behind_segment + tl.load(chunk_log + (bh * num_chunks + i) * M + slot, mask=slot < M, other=0.0)
        weight = write_strength(gate) * tl.exp(summed_behind(gate, index) + behind[None, :])
        if values.dtype == tl.bfloat16:  # in two parts, so that a weight keeps 16 bits
            high = weight.to(tl.bfloat16)
            acc = tl.dot(tl.trans(values), high, acc)
            acc = tl.dot(tl.trans(values), (weight - high.to(tl.float32)).to(tl.bfloat16), acc)
        else:
            acc = tl.dot(tl.trans(values.to(tl.float32)), weight, acc, input_precision="tf32x3")
    at = (bh * tl.num_programs(0) + segment) * M + slot
    tl.store(updates + at[None, :] * (K + V) + column[:, None], acc, mask=(slot < M)[None, :])


@triton.jit
def logs_behind_segments(segment_log, bh, slot, segment, num_segments, M: tl.constexpr):
    """Sum of the log-gates that follow each segment [segments], and of all of them."""
    logs = tl.load(segment_log + (bh * num_segments + segment) * M + slot, mask=segment < num_segments, other=0.0)
    return tl.sum(tl.where(segment[None, :] < segment[:, None], logs[None, :], 0.0), 1), tl.sum(logs, 0)


@triton.jit(do_not_specialize=LENGTHS)
def compose_summary(
    updates,
    segment_log,
    summary,  # [B * H, M, K+V+1] update and log-decay
    num_segments,
    M: tl.constexpr,
    D: tl.constexpr,  # K + V
    BD: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """All segments as one. One program per slot and block of columns."""
    slot = tl.program_id(0) // (D // BD)
    column = tl.program_id(0) % (D // BD) * BD + tl.arange(0, BD)
    bh = tl.program_id(1).to(tl.int64)
    segment = tl.arange(0, SEGMENTS)
    behind, total = logs_behind_segments(segment_log, bh, slot, segment, num_segments, M)
    at = updates + ((bh * num_segments + segment) * M + slot)[:, None] * D + column[None, :]
    parts = tl.load(at, mask=((segment < num_segments) & (behind > GONE))[:, None], other=0.0)
    at_slot = summary + (bh * M + slot) * (D + 1)
    tl.store(at_slot + column, tl.sum(parts, 0))
    tl.store(at_slot + D, total)


class Launch(NamedTuple):
    """How a run of tokens is cut: `short` segments of SHORT chunks at the end, longer ones before."""

    sizes: dict[str, int]
    tiles: dict[str, int]
    lengths: tuple[int, int, int, int]  # tokens, chunks, short segments, chunks of a longer segment
    segments: int
    slot_blocks: int
    columns: int
    gate_stages: int

    @property
    def padded_segments(self) -> int:
        return triton.next_power_of_2(self.segments)


def plan_launch(k: Tensor, v: Tensor, g: Tensor) -> Launch:
    (batch, num_tokens, heads, slots), dim = g.shape, k.shape[3] + v.shape[3]
    tiles = architecture_for(k).summary_tiles(k, v, g)
    slot_blocks = triton.cdiv(slots, tiles.slots)
    chunks = triton.cdiv(num_tokens, tiles.chunk)
    segments = min(_MOST_SEGMENTS, max(1, _PROGRAMS // (batch * heads * slot_blocks * (dim // tiles.columns))))
    short, long_chunks = 0, _LEAST_CHUNKS
    if chunks > segments * _LEAST_CHUNKS:
        short = segments // 4
        long_chunks = triton.cdiv(chunks - short * _LEAST_CHUNKS, segments - short)
    return Launch(
        sizes={"H": heads, "K": k.shape[3], "V": v.shape[3], "M": slots},
        tiles={"C": tiles.chunk, "BM": tiles.slots, "SHORT": _LEAST_CHUNKS},
        lengths=(num_tokens, chunks, short, long_chunks),
        segments=short + triton.cdiv(chunks - short * _LEAST_CHUNKS, long_chunks),
        slot_blocks=slot_blocks,
        columns=tiles.columns,
        gate_stages=tiles.gate_stages,
    )


Kept = tuple[Tensor, ...]  # what the backward needs beside the inputs


@on_device_of_first_argument
def summarise_on_gpu(k: Tensor, v: Tensor, g: Tensor, out: Tensor) -> Kept:
    """`summarise_slots` for what dispatch lets pass."""
    k, v, g = (packed(x) for x in (k, v, g))
    launch, rows, slots, dim = plan_launch(k, v, g), g.shape[0] * g.shape[2], g.shape[3], k.shape[3] + v.shape[3]
    lengths, tiles, padded = launch.lengths, launch.tiles, launch.padded_segments
    options = {"dtype": torch.float32, "device": k.device}
    updates = torch.empty(rows, launch.segments, slots, dim, **options)
    segment_log = torch.empty(rows, launch.segments, slots, **options)
    chunk_log = torch.empty(rows, lengths[1], slots, **options)
    grid = (launch.segments, launch.slot_blocks, rows)
    sum_log_gates[grid](g, segment_log, chunk_log, *g.stride()[:3], *lengths, H=g.shape[2], M=slots, **tiles)
    summarise_segments[(launch.segments, launch.slot_blocks * (dim // launch.columns), rows)](
        k,
        v,
        g,
        updates,
        segment_log,
        chunk_log,
        *strides(k, v, g),
        *lengths,
        **launch.sizes,
        **tiles,
        BD=launch.columns,
        SEGMENTS=padded,
    )
    compose_summary[(slots * (dim // 64), rows)](updates, segment_log, out, launch.segments, M=slots, D=dim, BD=64, SEGMENTS=padded)
    return updates, segment_log, chunk_log


def packed(x: Tensor) -> Tensor:
    """Channels without gaps; tokens and heads may be apart (keys and values are parts of one projection)."""
    return x if x.stride(3) == 1 else x.contiguous()


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Of batch, token and head, for each tensor."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])
