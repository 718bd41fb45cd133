"""`slot_summary` on a GPU: segments of the sequence in parallel, composed at the end; forward and backward read every token once or twice.

The weight with which token t remains in a slot at the end is w_t = (1 - exp(g_t)) exp(A_t), with A_t the sum of the log-gates behind t.
Segments are walked from their last chunk to the first, so A_t is a plain sum of what has been seen: no difference of large sums, and
nothing that could overflow.

    update = sum of w_t x_t^T                 x: keys beside values, [K+V]
    dx_t   = sum over slots of w_t d_update
    dg_t   = -exp(g_t + A_t) c_t + sum over u < t of w_u c_u + d_log_decay        c_t = <d_update, x_t>
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .common import write_strength
from .device import on_device_of_first_argument

_CHUNK = 32
_MOST_SEGMENTS = 64
_PROGRAMS = 1024  # enough to fill any chip of today several times
_LEAST_CHUNKS = 8  # shorter segments cost more in composing than they gain


@triton.jit
def _load_gates(at, token, T, slot, H: tl.constexpr, M: tl.constexpr):
    """Log-gates [C, BM] of a chunk, 0 behind the last token; and which of them are above the clamp."""
    gate = tl.load(at + token[:, None] * (H * M) + slot[None, :], mask=(token < T)[:, None] & (slot < M)[None, :], other=0.0)
    return tl.maximum(gate, -40.0), gate >= -40.0


@triton.jit
def _summed_behind(gate, index):
    """Sum of the log-gates that follow each token in its chunk."""
    return tl.dot(tl.where(index[None, :] > index[:, None], 1.0, 0.0), gate, input_precision="tf32x3")


@triton.jit
def summarise_segments(
    k,  # [B, T, H, K], v and g likewise
    v,
    g,
    updates,  # [B * H, segments, M, K+V] of each segment
    segment_log,  # [B * H, segments, M] sum of log-gates of each segment
    chunk_log,  # [B * H, chunks, M] sum of the log-gates between a chunk and the end of its segment
    k_batch,  # strides of the batch
    v_batch,
    g_batch,
    T,
    num_chunks,
    chunks_per_segment,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    segment = tl.program_id(0)
    block_d = tl.program_id(1) % ((K + V) // BD)
    slot = tl.program_id(1) // ((K + V) // BD) * BM + tl.arange(0, BM)
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    index, column = tl.arange(0, C), block_d * BD + tl.arange(0, BD)
    if block_d * BD < K:
        x = k + b * k_batch + h * K + column[None, :]
        width = H * K
    else:
        x = v + b * v_batch + h * V + (column - K)[None, :]
        width = H * V
    gates = g + b * g_batch + h * M

    acc = tl.zeros((BD, BM), tl.float32)
    behind = tl.zeros((BM,), tl.float32)
    first = segment * chunks_per_segment
    last = tl.minimum(first + chunks_per_segment, num_chunks)
    for i in range(first, last):
        n = last - 1 - (i - first)
        token = n * C + index.to(tl.int64)
        gate, _ = _load_gates(gates, token, T, slot, H, M)
        values = tl.load(x + token[:, None] * width, mask=(token < T)[:, None], other=0.0)
        weight = write_strength(gate) * tl.exp(_summed_behind(gate, index) + behind[None, :])
        if values.dtype == tl.bfloat16:  # in two parts, so that a weight keeps 16 bits
            high = weight.to(tl.bfloat16)
            acc = tl.dot(tl.trans(values), high, acc)
            acc = tl.dot(tl.trans(values), (weight - high.to(tl.float32)).to(tl.bfloat16), acc)
        else:
            acc = tl.dot(tl.trans(values.to(tl.float32)), weight, acc, input_precision="tf32x3")
        if block_d == 0:
            tl.store(chunk_log + (bh * num_chunks + n) * M + slot, behind, mask=slot < M)
        behind += tl.sum(gate, 0)
    at = bh * tl.num_programs(0) + segment
    tl.store(updates + (at * M + slot)[None, :] * (K + V) + column[:, None], acc, mask=(slot < M)[None, :])
    if block_d == 0:
        tl.store(segment_log + at * M + slot, behind, mask=slot < M)


@triton.jit
def _logs_behind(segment_log, bh, slot, segment, num_segments, M: tl.constexpr):
    """Sum of the log-gates that follow each segment [segments], and of all of them."""
    logs = tl.load(segment_log + (bh * num_segments + segment) * M + slot, mask=segment < num_segments, other=0.0)
    return tl.sum(tl.where(segment[None, :] > segment[:, None], logs[None, :], 0.0), 1), tl.sum(logs, 0)


@triton.jit
def compose_summary(
    updates,
    segment_log,
    log_decay,  # [B * H, M]
    update,  # [B * H, M, K+V]
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
    behind, total = _logs_behind(segment_log, bh, slot, segment, num_segments, M)
    at = updates + ((bh * num_segments + segment) * M + slot)[:, None] * D + column[None, :]
    parts = tl.load(at, mask=(segment < num_segments)[:, None], other=0.0)
    tl.store(update + (bh * M + slot) * D + column, tl.sum(parts * tl.exp(behind)[:, None], 0))
    tl.store(log_decay + bh * M + slot, total)


@triton.jit
def summary_backward_segments(
    updates,
    segment_log,
    d_update,
    sums_before,  # [B * H, segments, M] sum of w c over the tokens before each segment
    logs_behind,  # [B * H, segments, M] sum of the log-gates that follow each segment
    num_segments,
    M: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """What the gates' gradient needs from other segments. The sum of w c over a segment is <d_update, its update>, decayed to the end."""
    slot = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    segment = tl.arange(0, SEGMENTS)
    ok = segment < num_segments
    behind, _ = _logs_behind(segment_log, bh, slot, segment, num_segments, M)
    products = tl.zeros((SEGMENTS,), tl.float32)
    for d in range(0, D, BD):
        column = d + tl.arange(0, BD)
        at = updates + ((bh * num_segments + segment) * M + slot)[:, None] * D + column[None, :]
        gradient = tl.load(d_update + (bh * M + slot) * D + column)
        products += tl.sum(tl.load(at, mask=ok[:, None], other=0.0) * gradient[None, :], 1)
    sums = products * tl.exp(behind)
    before = tl.sum(tl.where(segment[None, :] < segment[:, None], sums[None, :], 0.0), 1)
    at = (bh * num_segments + segment) * M + slot
    tl.store(sums_before + at, before, mask=ok)
    tl.store(logs_behind + at, behind, mask=ok)


@triton.jit
def summary_backward_gates(
    k,
    v,
    g,
    chunk_log,
    sums_before,
    logs_behind,
    d_log_decay,  # [B * H, M]
    d_update,  # [B * H, M, K+V]
    dg,  # [B, T, H, M]
    k_batch,
    v_batch,
    g_batch,
    T,
    num_chunks,
    chunks_per_segment,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
):
    segment = tl.program_id(0)
    slot = tl.program_id(1) * BM + tl.arange(0, BM)
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    index, key_column, value_column = tl.arange(0, C), tl.arange(0, K), tl.arange(0, V)
    slot_ok = slot < M
    at_segment = (bh * tl.num_programs(0) + segment) * M + slot
    summed = tl.load(sums_before + at_segment, mask=slot_ok, other=0.0)
    behind_segment = tl.load(logs_behind + at_segment, mask=slot_ok, other=0.0)
    from_decay = tl.load(d_log_decay + bh * M + slot, mask=slot_ok, other=0.0)
    at_gradient = d_update + (bh * M + slot)[:, None] * (K + V)
    key_gradient = tl.load(at_gradient + key_column[None, :], mask=slot_ok[:, None], other=0.0)
    value_gradient = tl.load(at_gradient + K + value_column[None, :], mask=slot_ok[:, None], other=0.0)
    first = segment * chunks_per_segment
    for n in range(first, tl.minimum(first + chunks_per_segment, num_chunks)):
        token = n * C + index.to(tl.int64)
        ok = (token < T)[:, None]
        gate, free = _load_gates(g + b * g_batch + h * M, token, T, slot, H, M)
        behind = behind_segment + tl.load(chunk_log + (bh * num_chunks + n) * M + slot, mask=slot_ok, other=0.0)
        behind = _summed_behind(gate, index) + behind[None, :]
        keys = tl.load(k + b * k_batch + token[:, None] * (H * K) + h * K + key_column[None, :], mask=ok, other=0.0)
        values = tl.load(v + b * v_batch + token[:, None] * (H * V) + h * V + value_column[None, :], mask=ok, other=0.0)
        dtype = d_update.dtype.element_ty
        products = tl.dot(keys.to(dtype), tl.trans(key_gradient), input_precision="tf32x3")
        products = tl.dot(values.to(dtype), tl.trans(value_gradient), products, input_precision="tf32x3")
        weighted = write_strength(gate) * tl.exp(behind) * products
        earlier = tl.where(index[None, :] < index[:, None], 1.0, 0.0)
        before = tl.dot(earlier, weighted, input_precision="tf32x3") + summed[None, :]
        gradient = before + from_decay[None, :] - tl.exp(gate + behind) * products
        at = dg + ((b * T + token) * H + h)[:, None] * M + slot[None, :]
        tl.store(at, tl.where(free, gradient, 0.0), mask=ok & slot_ok[None, :])
        summed += tl.sum(weighted, 0)


@triton.jit
def summary_backward_tokens(
    g,
    chunk_log,
    logs_behind,
    d_update,
    dk,  # [B, T, H, K]
    dv,  # [B, T, H, V]
    g_batch,
    T,
    num_segments,
    chunks_per_segment,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    n = tl.program_id(0)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    bh = tl.program_id(2).to(tl.int64)
    b, h = bh // H, bh % H
    index = tl.arange(0, C)
    token = n * C + index.to(tl.int64)
    at_segment = (bh * num_segments + n // chunks_per_segment) * M
    acc = tl.zeros((C, BD), tl.float32)
    for m in range(0, M, BM):
        slot = m + tl.arange(0, BM)
        gate, _ = _load_gates(g + b * g_batch + h * M, token, T, slot, H, M)
        behind = tl.load(logs_behind + at_segment + slot, mask=slot < M, other=0.0)
        behind += tl.load(chunk_log + (bh * tl.num_programs(0) + n) * M + slot, mask=slot < M, other=0.0)
        weight = write_strength(gate) * tl.exp(_summed_behind(gate, index) + behind[None, :])
        at = d_update + (bh * M + slot)[:, None] * (K + V) + column[None, :]
        gradient = tl.load(at, mask=(slot < M)[:, None], other=0.0)
        acc = tl.dot(weight.to(gradient.dtype), gradient, acc, input_precision="tf32x3")
    at_token = (b * T + token) * H + h
    ok = (token < T)[:, None]
    if tl.program_id(1) * BD < K:
        tl.store(dk + at_token[:, None] * K + column[None, :], acc.to(dk.dtype.element_ty), mask=ok)
    else:
        tl.store(dv + at_token[:, None] * V + (column - K)[None, :], acc.to(dv.dtype.element_ty), mask=ok)


class _Summary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Log-decay [B, H, M] and update [B, H, M, K+V]."""
        k, v, g = (_packed(x) for x in (k, v, g))
        sizes = _sizes(k, v, g)
        batch, num_tokens, heads, slots = g.shape
        dim = sizes["K"] + sizes["V"]
        chunks = triton.cdiv(num_tokens, _CHUNK)
        slot_block, columns = _slot_block(k, v, slots), _columns(k, v)
        programs_per_segment = batch * heads * triton.cdiv(slots, slot_block) * (dim // columns)
        segments = min(_MOST_SEGMENTS, triton.cdiv(chunks, _LEAST_CHUNKS), max(1, _PROGRAMS // programs_per_segment))
        length = triton.cdiv(chunks, segments)
        segments = triton.cdiv(chunks, length)
        options = {"dtype": torch.float32, "device": k.device}
        updates = torch.empty(batch * heads, segments, slots, dim, **options)
        segment_log = torch.empty(batch * heads, segments, slots, **options)
        chunk_log = torch.empty(batch * heads, chunks, slots, **options)
        strides = (k.stride(0), v.stride(0), g.stride(0))
        summarise_segments[(segments, triton.cdiv(slots, slot_block) * (dim // columns), batch * heads)](
            k, v, g, updates, segment_log, chunk_log, *strides, num_tokens, chunks, length, **sizes, C=_CHUNK, BM=slot_block, BD=columns
        )
        log_decay = torch.empty(batch, heads, slots, **options)
        update = torch.empty(batch, heads, slots, dim, **options)
        compose_summary[(slots * (dim // 64), batch * heads)](
            updates, segment_log, log_decay, update, segments, M=slots, D=dim, BD=64, SEGMENTS=triton.next_power_of_2(segments)
        )
        ctx.save_for_backward(k, v, g, updates, segment_log, chunk_log)
        ctx.length = length
        return log_decay, update

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_log_decay: Tensor, d_update: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v, g, updates, segment_log, chunk_log = ctx.saved_tensors
        sizes = _sizes(k, v, g)
        batch, num_tokens, heads, slots = g.shape
        dim = sizes["K"] + sizes["V"]
        chunks, segments = chunk_log.shape[1], updates.shape[1]
        d_log_decay, d_update = d_log_decay.contiguous(), d_update.contiguous()
        sums_before, logs_behind = torch.empty_like(segment_log), torch.empty_like(segment_log)
        summary_backward_segments[(slots, batch * heads)](
            updates,
            segment_log,
            d_update,
            sums_before,
            logs_behind,
            segments,
            M=slots,
            D=dim,
            BD=64,
            SEGMENTS=triton.next_power_of_2(segments),
        )
        if k.dtype != torch.float32:
            d_update = d_update.to(torch.bfloat16)
        slot_block, columns = _slot_block(k, v, slots), _columns(k, v)
        dk, dv, dg = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v, g))
        strides = (k.stride(0), v.stride(0), g.stride(0))
        summary_backward_gates[(segments, triton.cdiv(slots, slot_block), batch * heads)](
            k,
            v,
            g,
            chunk_log,
            sums_before,
            logs_behind,
            d_log_decay,
            d_update,
            dg,
            *strides,
            num_tokens,
            chunks,
            ctx.length,
            **sizes,
            C=_CHUNK,
            BM=slot_block,
            num_stages=1 if k.dtype == torch.float32 else 3,
        )
        summary_backward_tokens[(chunks, dim // columns, batch * heads)](
            g,
            chunk_log,
            logs_behind,
            d_update,
            dk,
            dv,
            strides[2],
            num_tokens,
            segments,
            ctx.length,
            **sizes,
            C=_CHUNK,
            BM=slot_block,
            BD=columns,
        )
        return dk, dv, dg


@on_device_of_first_argument
def slot_summary_on_gpu(k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`slot_summary` for what `refusal_of_summary` lets pass."""
    log_decay, update = _Summary.apply(k, v, g)
    return log_decay, update[..., : k.shape[-1]], update[..., k.shape[-1] :]


def _packed(x: Tensor) -> Tensor:
    """Tokens, heads and channels without gaps; rows of the batch may be apart (a shard's piece is a slice of tokens)."""
    return x if x[0].is_contiguous() else x.contiguous()


def _sizes(k: Tensor, v: Tensor, g: Tensor) -> dict[str, int]:
    return {"H": k.shape[2], "K": k.shape[3], "V": v.shape[3], "M": g.shape[3]}


def _slot_block(k: Tensor, v: Tensor, slots: int) -> int:
    most = 64 if k.dtype == torch.bfloat16 else 32
    if k.dtype == torch.float32 and max(k.shape[3], v.shape[3]) > 128:
        most = 16
    return min(most, triton.next_power_of_2(slots))


def _columns(k: Tensor, v: Tensor) -> int:
    """32 keeps products in full precision off the Hopper instruction that cannot read them transposed."""
    if k.dtype != torch.bfloat16:
        return 32
    return 128 if k.shape[3] % 128 == v.shape[3] % 128 == 0 else 64
