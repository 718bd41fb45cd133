"""Backward of forward.py. Gradients are added to what the tensors hold, so those that are zero are not written.

dx_t = sum over slots of w_t d_update
dg_t = -exp(g_t + A_t) c_t + sum over u < t of w_u c_u + d_log_decay        c_t = <d_update, x_t>
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import LENGTHS, write_strength
from ..device import on_device_of_first_argument
from .forward import (
    GONE,
    Kept,
    load_gates,
    logs_behind_segments,
    packed,
    plan_launch,
    segment_chunks,
    strides,
    summed_behind,
)

_CHUNKS_AT_ONCE = 128  # programs of a head; each goes on to a chunk so many before, as long as anything is left


@triton.jit(do_not_specialize=LENGTHS)
def summary_backward_segments(
    updates,
    segment_log,
    d_summary,  # [B * H, M, K+V+1]
    d_update,  # [B * H, M, K+V] the same in the precision of products, without the log-decay
    sums_before,  # [B * H, segments, M] sum of w c over the tokens before each segment, and d_log_decay
    logs_behind,  # [B * H, segments, M] sum of the log-gates that follow each segment
    num_segments,
    M: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """What the gates' gradient needs from other segments. The sum of w c over a segment is <d_update, its update>."""
    slot = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    segment = tl.arange(0, SEGMENTS)
    ok = segment < num_segments
    behind, _ = logs_behind_segments(segment_log, bh, slot, segment, num_segments, M)
    sums = tl.zeros((SEGMENTS,), tl.float32)
    for d in range(0, D, BD):
        column = d + tl.arange(0, BD)
        at = updates + ((bh * num_segments + segment) * M + slot)[:, None] * D + column[None, :]
        gradient = tl.load(d_summary + (bh * M + slot) * (D + 1) + column)
        tl.store(d_update + (bh * M + slot) * D + column, gradient.to(d_update.dtype.element_ty))
        sums += tl.sum(tl.load(at, mask=(ok & (behind > GONE))[:, None], other=0.0) * gradient[None, :], 1)
    before = tl.sum(tl.where(segment[None, :] > segment[:, None], sums[None, :], 0.0), 1)
    at = (bh * num_segments + segment) * M + slot
    tl.store(sums_before + at, before + tl.load(d_summary + (bh * M + slot) * (D + 1) + D), mask=ok)
    tl.store(logs_behind + at, behind, mask=ok)


@triton.jit(do_not_specialize=LENGTHS)
def summary_backward_gates(
    k,
    v,
    g,
    chunk_log,
    sums_before,
    logs_behind,
    d_update,
    dg,  # [B, T, H, M], added to
    k_batch,
    k_token,
    k_head,
    v_batch,
    v_token,
    v_head,
    g_batch,
    g_token,
    g_head,
    dg_batch,
    dg_token,
    dg_head,
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
    SHORT: tl.constexpr,
):
    segment = tl.program_id(0)
    slot = tl.program_id(1) * BM + tl.arange(0, BM)
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    index, key_column, value_column = tl.arange(0, C), tl.arange(0, K), tl.arange(0, V)
    slot_ok = slot < M
    at_segment = (bh * tl.num_programs(0) + segment) * M + slot
    summed = tl.load(sums_before + at_segment, mask=slot_ok, other=0.0)
    behind_segment = tl.load(logs_behind + at_segment, mask=slot_ok, other=GONE)
    # Nothing of this segment is left: its gates only matter through the log-decay, whose gradient is then 0 but in unusual losses.
    if tl.max(tl.where((behind_segment <= GONE) & (summed == 0.0), 0, 1)) == 0:
        return
    at_gradient = d_update + (bh * M + slot)[:, None] * (K + V)
    key_gradient = tl.load(at_gradient + key_column[None, :], mask=slot_ok[:, None], other=0.0)
    value_gradient = tl.load(at_gradient + K + value_column[None, :], mask=slot_ok[:, None], other=0.0)
    first, end = segment_chunks(segment, num_chunks, short_segments, long_chunks, SHORT)
    for j in range(first, end):
        i = end - 1 - (j - first)
        token = (num_chunks - 1 - i) * C + index.to(tl.int64)
        ok = (token < T)[:, None]
        gate, free = load_gates(g + b * g_batch + h * g_head, g_token, token, T, slot, M)
        behind = behind_segment + tl.load(chunk_log + (bh * num_chunks + i) * M + slot, mask=slot_ok, other=0.0)
        behind = summed_behind(gate, index) + behind[None, :]
        keys = tl.load(k + b * k_batch + token[:, None] * k_token + h * k_head + key_column[None, :], mask=ok, other=0.0)
        values = tl.load(v + b * v_batch + token[:, None] * v_token + h * v_head + value_column[None, :], mask=ok, other=0.0)
        dtype = d_update.dtype.element_ty
        products = tl.dot(keys.to(dtype), tl.trans(key_gradient), input_precision="tf32x3")
        products = tl.dot(values.to(dtype), tl.trans(value_gradient), products, input_precision="tf32x3")
        weighted = write_strength(gate) * tl.exp(behind) * products
        earlier = tl.where(index[None, :] < index[:, None], 1.0, 0.0)
        before = tl.dot(earlier, weighted, input_precision="tf32x3") + summed[None, :]
        gradient = tl.where(free, before - tl.exp(gate + behind) * products, 0.0)
        at = dg + b * dg_batch + token[:, None] * dg_token + h * dg_head + slot[None, :]
        there = ok & slot_ok[None, :]
        tl.store(at, tl.load(at, mask=there, other=0.0) + gradient, mask=there)
        summed += tl.sum(weighted, 0)


@triton.jit(do_not_specialize=LENGTHS)
def summary_backward_tokens(
    g,
    chunk_log,
    logs_behind,
    d_update,
    dk,  # [B, T, H, K], added to
    dv,  # [B, T, H, V], added to
    g_batch,
    g_token,
    g_head,
    dk_batch,
    dk_token,
    dk_head,
    dv_batch,
    dv_token,
    dv_head,
    T,
    num_chunks,
    num_segments,
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
):
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    index = tl.arange(0, C)
    left = 0.0  # what is left of a chunk, as a logarithm; once nothing is, nothing is left of those before it
    for i in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        if left > GONE:
            if i < short_segments * SHORT:
                segment = i // SHORT
            else:
                segment = short_segments + (i - short_segments * SHORT) // long_chunks
            token = (num_chunks - 1 - i) * C + index.to(tl.int64)
            at_segment = (bh * num_segments + segment) * M
            at_chunk = (bh * num_chunks + i) * M
            acc = tl.zeros((C, BD), tl.float32)
            left = GONE
            for m in range(0, M, BM):
                slot = m + tl.arange(0, BM)
                behind = tl.load(logs_behind + at_segment + slot, mask=slot < M, other=GONE)
                behind += tl.load(chunk_log + at_chunk + slot, mask=slot < M, other=0.0)
                most = tl.max(behind)
                if most > GONE:
                    gate, _ = load_gates(g + b * g_batch + h * g_head, g_token, token, T, slot, M)
                    weight = write_strength(gate) * tl.exp(summed_behind(gate, index) + behind[None, :])
                    at = d_update + (bh * M + slot)[:, None] * (K + V) + column[None, :]
                    gradient = tl.load(at, mask=(slot < M)[:, None], other=0.0)
                    acc = tl.dot(weight.to(gradient.dtype), gradient, acc, input_precision="tf32x3")
                left = tl.maximum(left, most)
            if left > GONE:
                ok = (token < T)[:, None]
                if tl.program_id(1) * BD < K:
                    at_key = dk + b * dk_batch + token[:, None] * dk_token + h * dk_head + column[None, :]
                    tl.store(at_key, (tl.load(at_key, mask=ok, other=0.0) + acc).to(dk.dtype.element_ty), mask=ok)
                else:
                    at_value = dv + b * dv_batch + token[:, None] * dv_token + h * dv_head + (column - K)[None, :]
                    tl.store(at_value, (tl.load(at_value, mask=ok, other=0.0) + acc).to(dv.dtype.element_ty), mask=ok)


@on_device_of_first_argument
def add_summary_gradients_on_gpu(
    k: Tensor, v: Tensor, g: Tensor, kept: Kept, d_summary: Tensor, dk: Tensor, dv: Tensor, dg: Tensor
) -> None:
    """`add_summary_gradients` after `summarise_on_gpu`."""
    k, v, g = (packed(x) for x in (k, v, g))
    assert all(x.stride(3) == 1 for x in (dk, dv, dg)), "gradients are added to in place"
    updates, segment_log, chunk_log = kept
    launch, rows, slots, dim = plan_launch(k, v, g), g.shape[0] * g.shape[2], g.shape[3], k.shape[3] + v.shape[3]
    num_tokens, chunks, short, long_chunks = launch.lengths
    sums_before, logs_behind = torch.empty_like(segment_log), torch.empty_like(segment_log)
    exact = k.dtype == torch.float32
    d_update = torch.empty(rows, slots, dim, device=k.device, dtype=torch.float32 if exact else torch.bfloat16)
    summary_backward_segments[(slots, rows)](
        updates,
        segment_log,
        d_summary.contiguous(),
        d_update,
        sums_before,
        logs_behind,
        launch.segments,
        M=slots,
        D=dim,
        BD=128 if dim % 128 == 0 else 64,
        SEGMENTS=launch.padded_segments,
    )
    summary_backward_gates[(launch.segments, launch.slot_blocks, rows)](
        k,
        v,
        g,
        chunk_log,
        sums_before,
        logs_behind,
        d_update,
        dg,
        *strides(k, v, g, dg),
        *launch.lengths,
        **launch.sizes,
        **launch.tiles,
        num_stages=launch.gate_stages,
    )
    summary_backward_tokens[(min(chunks, _CHUNKS_AT_ONCE), dim // launch.columns, rows)](
        g,
        chunk_log,
        logs_behind,
        d_update,
        dk,
        dv,
        *strides(g, dk, dv),
        num_tokens,
        chunks,
        launch.segments,
        short,
        long_chunks,
        **launch.sizes,
        **launch.tiles,
        BD=launch.columns,
    )
