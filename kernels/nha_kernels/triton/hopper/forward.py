"""The forward of the calls that these kernels serve: output, log-sum-exp, slots after the last token, and what the backward keeps."""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .attend import attend_chunks
from .borders import carry_slots
from .conditions import HEADS
from .gates import CHUNK, SUBTILES, WRITE_ROWS, form_factors
from .prepare import prepare_chunks

GATE_FLOOR = -8.0
SLAB = 32768  # tokens whose slots are in device memory at the same time, about
REGISTERS = 128  # of a thread: 16 warps take all of a multiprocessor's


class Buffers(NamedTuple):
    """What the kernels hand to each other for a slab of `chunks` chunks."""

    border_cos: Tensor
    border_sin: Tensor
    rotated: Tensor
    angles: Tensor
    writes: Tensor
    to_row: Tensor
    to_reference: Tensor
    weights: Tensor
    slots: Tensor
    decay: Tensor
    log_decay: Tensor


class Starts(NamedTuple):
    """Slots [B*H, S, M, K+V] and log-decay [B*H, S, M] before each segment, float32."""

    slots: Tensor
    log_decay: Tensor
    chunks_per_segment: int  # of 64 tokens; a power of two, at most 16


def empty_starts(k: Tensor, v: Tensor, g: Tensor, chunks: int) -> Starts:
    """For segments of `chunks` chunks or the next power of two, at most 16."""
    chunks_per_segment = min(16, triton.next_power_of_2(chunks))
    heads, segments = k.shape[0] * k.shape[2], triton.cdiv(triton.cdiv(k.shape[1], CHUNK), chunks_per_segment)
    slots = torch.empty(heads, segments, g.shape[3], k.shape[3] + v.shape[3], dtype=torch.float32, device=k.device)
    return Starts(slots, torch.empty(slots.shape[:3], dtype=torch.float32, device=k.device), chunks_per_segment)


def hopper_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    frequencies: Tensor,
    angles: tuple[Tensor, Tensor],
    scale: float,
    empty_slots: str,
    starts: Starts | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, T, HQ, V], log-sum-exp [B, T, HQ] and slots after the last token [B, H, M, K+V+1] in float32. Fills `starts`.

    Args:
        frequencies: of the rotation, [K/2].
        angles: its cosines and sines by distance, [64 or more, K/2].
    """
    batch, num_tokens = q.shape[:2]
    frequencies = frequencies.contiguous()
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    final = torch.empty(batch, k.shape[2], g.shape[3], k.shape[3] + v.shape[3] + 1, dtype=torch.float32, device=q.device)
    chunks = triton.cdiv(num_tokens, CHUNK)
    per_segment = 1 if starts is None else starts.chunks_per_segment
    most = max(1, SLAB // CHUNK // per_segment) * per_segment
    buffers = _buffers(k, v, g, min(most, chunks))
    for first in range(0, chunks, most):
        count = min(most, chunks - first)
        _form_factors(g, frequencies, buffers, first, count)
        _prepare(k, v, g, angles, buffers, first, count)
        _carry(buffers, final, starts, first, count)
        _attend(q, k, v, buffers, out, lse, scale, empty_slots, first, count)
    return out, lse, final


def _buffers(k: Tensor, v: Tensor, g: Tensor, chunks: int) -> Buffers:
    batch, _, kv_heads, key_dim = k.shape
    tiles, slots = batch * kv_heads * chunks, g.shape[3]

    def empty(*shape: int, dtype: torch.dtype = k.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=k.device)

    return Buffers(
        border_cos=empty(chunks + 1, key_dim // 2, dtype=torch.float32),
        border_sin=empty(chunks + 1, key_dim // 2, dtype=torch.float32),
        rotated=empty(batch * (chunks + 1) * CHUNK * kv_heads * key_dim),
        angles=empty(chunks * CHUNK, 2, key_dim // 2, dtype=torch.float16),
        writes=empty(tiles * WRITE_ROWS, slots),
        to_row=empty(tiles * CHUNK, slots),
        to_reference=empty(tiles * SUBTILES, slots),
        weights=empty(tiles * CHUNK, slots),
        slots=empty(tiles * slots, key_dim + v.shape[3]),
        decay=empty(tiles, slots, dtype=torch.float32),
        log_decay=empty(tiles, slots, dtype=torch.float32),
    )


def _form_factors(g: Tensor, frequencies: Tensor, buffers: Buffers, first: int, count: int) -> None:
    batch, num_tokens, kv_heads, slots = g.shape
    b = buffers
    form_factors[(count * batch * kv_heads,)](
        g,
        b.writes,
        b.to_row,
        b.to_reference,
        b.weights,
        b.decay,
        b.log_decay,
        frequencies,
        b.border_cos,
        b.border_sin,
        num_tokens,
        batch * kv_heads,
        first,
        count,
        H=kv_heads,
        M=slots,
        P=b.angles.shape[2],
        PAIRS=frequencies.shape[0],
        FLOOR=GATE_FLOOR,
        num_warps=slots // 32,
    )


def _prepare(k: Tensor, v: Tensor, g: Tensor, angles: tuple[Tensor, Tensor], buffers: Buffers, first: int, count: int) -> None:
    batch, num_tokens, kv_heads, key_dim = k.shape
    b = buffers
    prepare_chunks[((count + 1) * batch * kv_heads,)](
        k,
        v,
        b.weights,
        b.border_cos,
        b.border_sin,
        *angles,
        b.rotated,
        b.angles,
        b.slots,
        num_tokens,
        batch * kv_heads,
        first,
        count,
        H=kv_heads,
        K=key_dim,
        V=v.shape[3],
        M=g.shape[3],
        C=CHUNK,
        num_warps=4,
        num_stages=1,
        maxnreg=128,
    )


def _carry(buffers: Buffers, final: Tensor, starts: Starts | None, first: int, count: int) -> None:
    batch, kv_heads, slots, width = final.shape
    starts_slots, starts_logs, per_segment = starts or (buffers.decay, buffers.decay, 0)
    carry_slots[(slots, batch * kv_heads, (width - 1) // 128 + 1)](
        buffers.slots,
        buffers.decay,
        buffers.log_decay,
        final,
        starts_slots,
        starts_logs,
        count,
        starts_slots.shape[1],
        first // max(1, per_segment),
        M=slots,
        D=width - 1,
        FIRST=first == 0,
        PER_SEGMENT=per_segment,
        num_warps=1,
    )


def _attend(
    q: Tensor, k: Tensor, v: Tensor, buffers: Buffers, out: Tensor, lse: Tensor, scale: float, empty_slots: str, first: int, count: int
) -> None:
    batch, num_tokens, kv_heads, key_dim = k.shape
    group = q.shape[2] // kv_heads
    columns = batch * kv_heads * (group // HEADS)
    b = buffers
    rotated = b.rotated[: batch * (count + 1) * CHUNK * kv_heads * key_dim].view(batch, (count + 1) * CHUNK, kv_heads * key_dim)
    attend_chunks[(columns, _programs_of_a_column(columns, count, _multiprocessors(q.device)))](
        _described(k.view(batch, num_tokens, -1), (1, CHUNK, 128)),
        _described(rotated, (1, 2 * CHUNK, 128)),
        _described(v.view(batch, num_tokens, -1), (1, 2 * CHUNK, 128)),
        _described(b.slots, (64, 128)),
        _described(b.writes, (64, 64)),
        _described(q, (1, CHUNK // SUBTILES, HEADS, 128)),
        _described(out, (1, CHUNK // SUBTILES, HEADS, 64)),
        b.angles,
        b.to_row,
        b.to_reference,
        lse,
        num_tokens,
        first,
        count,
        0,
        scale,
        H=kv_heads,
        R=HEADS,
        PARTS=group // HEADS,
        EMPTY={"attend": 0, "mask": 1}[empty_slots],
        REGISTERS=REGISTERS,
        num_warps=4,
        maxnreg=REGISTERS,
    )


def _described(x: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block))
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block), layout)


def _programs_of_a_column(columns: int, chunks: int, multiprocessors: int) -> int:
    """Programs that share the chunks of a tile's heads. Few, so that each loads ahead for the next of its chunks, and all run at a time;
    where columns do not fill the multiprocessors evenly, more and shorter ones."""
    programs = multiprocessors // columns
    if programs * columns < 0.9 * multiprocessors:
        programs = triton.cdiv(chunks, 4)
    return min(programs, chunks)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
