"""The `triton` backend: one differentiable call over the kernels of this folder.

Kept for the backward: the inputs, the output, its log-sum-exp, the slots before each segment. Everything else is computed again.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..chunked import chunked_attention
from ..conventions import clamp_log_gates
from ..memory import Memory
from ..sequence import ExtendedSequence, extend_sequence
from .backward_slots import backward_slots
from .backward_window import backward_window
from .device import on_device_of_first_argument
from .dispatch import attends_by_library, choose_tiles, largest_group, refusal_of_slots
from .flash import sequence_bounds
from .forward import forward
from .libraries import choose_library, window_call
from .merged_attention import MergedAttention, MergedOptions
from .problem import Problem, Tiles
from .rope_table import rope_table
from .rotary import rotated_heads
from .states import SegmentStarts, segment_starts

T = TypeVar("T")


@dataclass(frozen=True)
class _Options:
    held: int
    window: int
    scale: float
    empty_slots: str
    rope_attention_factor: float


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        initial: Tensor | None,
        start: Tensor | None,
        rope: Tensor | None,
        options: _Options,
        tiles: Tiles,
    ) -> tuple[Tensor, Tensor]:
        q, k, v, g = (x.contiguous() for x in (q, k, v, g))
        cos, sin = None, None
        # What lies farther back than all rows has neither work nor angles. A multiple of 16: one compiled kernel fewer.
        window = min(options.window, -(-k.shape[1] // 16) * 16)
        if rope is not None and window > 0:
            reach = window + 2 * max(tiles.window, tiles.key_rows) + 2 * max(tiles.chunk, tiles.query_chunk, tiles.key_chunk)
            cos, sin = rope_table(rope, options.rope_attention_factor, reach, q)
        problem = Problem(
            q,
            k,
            v,
            g,
            start,
            cos,
            sin,
            held=options.held,
            window=window,
            rotated_pairs=0 if rope is None else rope.shape[0],
            scale=options.scale,
            empty_slots=options.empty_slots,
            attend_window=True,
            tiles=tiles,
        )
        starts = segment_starts(problem, None if initial is None else initial.contiguous())
        out, lse, final = forward(problem, starts)
        ctx.save_for_backward(q, k, v, g, start, cos, sin, out, lse, starts.slots, starts.log_decay)
        ctx.problem = replace(
            problem, q=q.new_empty(0), k=q.new_empty(0), v=q.new_empty(0), g=q.new_empty(0), start_or_none=None, cos=None, sin=None
        )
        ctx.chunks_per_segment = starts.chunks_per_segment
        ctx.has_initial = initial is not None
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, g, start, cos, sin, out, lse, slots, log_decay = ctx.saved_tensors
        p = replace(ctx.problem, q=q, k=k, v=v, g=g, start_or_none=start, cos=cos, sin=sin)
        d_out = torch.zeros_like(out) if d_out is None else d_out.contiguous()
        starts = SegmentStarts(slots, log_decay, ctx.chunks_per_segment)
        gradients, d_initial = backward_slots(p, starts, out, lse, d_out, None if d_final is None else d_final.contiguous())
        if p.window > 0:
            backward_window(p, lse, d_out, gradients)
        d_initial = d_initial.view(p.batch, p.kv_heads, *d_initial.shape[1:]) if ctx.has_initial else None
        return gradients.q, gradients.keys, gradients.values, gradients.gates, d_initial, None, None, None, None


@on_device_of_first_argument
def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    window: int | None,
    rope: Tensor | None,
    rope_attention_factor: float,
    scale: float,
    empty_slots: str,
    cu_seqlens: Tensor | None,
    memory: Memory | None,
) -> tuple[Tensor, Memory]:
    """Arguments as `nha_attention`; dispatch has checked that the kernels serve them."""
    if window is None or attends_by_library(q, v, window):

        def attend(part: Tensor) -> tuple[Tensor, Memory]:
            return _wide_window(part, k, v, g, window, rope, rope_attention_factor, scale, empty_slots, cu_seqlens, memory)

        reads_slots = window is not None or memory is not None
        return _in_parts_of_groups(attend, q, k.shape[2], largest_group(q, v)) if reads_slots else attend(q)
    options = _Options(
        held=0 if memory is None else memory.window_keys.shape[1],
        window=window,
        scale=scale,
        empty_slots=empty_slots,
        rope_attention_factor=rope_attention_factor,
    )
    if memory is None and cu_seqlens is None:  # nothing to prepare: no launch besides the kernels
        out, final = fused_attention(q, k, v, g, None, None, rope, options)
        tail = slice(max(0, k.shape[1] - window), k.shape[1])
        length = torch.full((k.shape[0],), k.shape[1], dtype=torch.int64, device=k.device)
        return out, _memory(final, (k[:, tail], v[:, tail], clamp_log_gates(g[:, tail])), length, k.shape[-1], window)
    sequence = extend_sequence(k, v, g, window=window, cu_seqlens=cu_seqlens, memory=memory)
    initial = _initial_slots(sequence, cu_seqlens, memory)
    start = _document_starts(sequence, cu_seqlens, memory)
    out, final = fused_attention(q, sequence.keys, sequence.values, sequence.log_gates, initial, start, rope, options)
    return out, _memory_after(sequence, final, k.shape[-1], window)


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial: Tensor | None,
    start: Tensor | None,
    rope: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """Output and final slots of the fused kernels, for any number of query heads to a KV head."""

    def attend(part: Tensor) -> tuple[Tensor, Tensor]:
        tiles = choose_tiles(part, k, v, g, options.window)  # of this part's query heads: tiles of more of them may read out of bounds
        return _FusedAttention.apply(part, k, v, g, initial, start, rope, options, tiles)

    return _in_parts_of_groups(attend, q, k.shape[2], largest_group(q, v))


def _in_parts_of_groups(attend: Callable[[Tensor], tuple[Tensor, T]], q: Tensor, kv_heads: int, most: int) -> tuple[Tensor, T]:
    """`attend` with at most `most` query heads to a KV head at a time. Each part goes through the slots again; autograd adds the gradients
    of the KV heads."""
    group = q.shape[2] // kv_heads
    if group <= most:
        return attend(q)
    parts = q.unflatten(2, (kv_heads, group)).tensor_split(-(-group // most), dim=3)
    results = [attend(part.flatten(2, 3)) for part in parts]
    outputs = [out.unflatten(2, (kv_heads, -1)) for out, _ in results]
    return torch.cat(outputs, dim=3).flatten(2, 3), results[0][1]


def _wide_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    window: int | None,
    rope: Tensor | None,
    rope_attention_factor: float,
    scale: float,
    empty_slots: Any,
    cu_seqlens: Tensor | None,
    memory: Memory | None,
) -> tuple[Tensor, Memory]:
    """The window by a library, over the memory's window rows and the new tokens."""
    if window is None and memory is not None and refusal_of_slots(q, k, v, g) is not None:  # a memory may hold slots: read them there
        return chunked_attention(
            q,
            k,
            v,
            clamp_log_gates(g),
            window=window,
            rope=rope,
            rope_attention_factor=rope_attention_factor,
            scale=scale,
            empty_slots=empty_slots,
            cu_seqlens=cu_seqlens,
            memory=memory,
        )
    sequence = extend_sequence(k, v, g, window=window, cu_seqlens=cu_seqlens, memory=memory)
    keys, held = sequence.keys, sequence.held
    one_document = memory is None and cu_seqlens is None
    rotated_q, rotated_k = q, keys
    if rope is not None:
        of_queries, of_rows = (None, None) if one_document else _positions(sequence, memory)
        rotated_q = rotated_heads(q, of_queries, rope, rope_attention_factor)
        rotated_k = rotated_heads(keys, of_rows, rope, rope_attention_factor)
    bounds = None
    if not one_document:
        begin = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device) if memory is None else held - memory.length.clamp(max=held)
        bounds = sequence_bounds(q.shape[0], q.shape[1], held, begin, cu_seqlens)
    # A full window that continues a memory reads the memory's slots, as a window does that nothing leaves.
    slots = None if window is None and memory is None else sequence.window
    options = MergedOptions(
        held=held,
        window=window,
        slots=slots,
        scale=scale,
        empty_slots=empty_slots,
        attention_library=choose_library(window_call(q, window, one_document=one_document)).name,
        tiles=None if slots is None else choose_tiles(q, k, v, g, slots),
    )
    initial = None if slots is None else _initial_slots(sequence, cu_seqlens, memory)
    start = None if slots is None else _document_starts(sequence, cu_seqlens, memory)
    out, final = MergedAttention.apply(q, keys, sequence.values, sequence.log_gates, rotated_q, rotated_k, initial, start, bounds, options)
    if final is None:
        final = q.new_zeros(*g.shape[:1], *g.shape[2:], k.shape[3] + v.shape[3] + 1, dtype=torch.float32)
    return out, _memory_after(sequence, final, k.shape[3], window)


def _positions(sequence: ExtendedSequence, memory: Memory | None) -> tuple[Tensor, Tensor]:
    """Positions in their documents of the queries and of the extended rows, [B or 1, .]."""
    if memory is None:
        return sequence.position, sequence.position
    rows = memory.length[:, None] - sequence.held + torch.arange(sequence.held, device=memory.length.device)
    return sequence.position, torch.cat([rows, sequence.position.expand(rows.shape[0], -1)], dim=1)


def _initial_slots(sequence: ExtendedSequence, cu_seqlens: Tensor | None, memory: Memory | None) -> Tensor | None:
    """Slots and log-decay before the first query [B, H, M, K+V+1]; empty where the memory's document has no token in this call."""
    if memory is None:
        return None
    initial = torch.cat([memory.slot_keys, memory.slot_values, memory.slot_log_decay[..., None]], dim=-1)
    if sequence.documents is not None and cu_seqlens is not None:
        initial = torch.where(sequence.documents[:, sequence.held, None, None, None] == 0, initial, 0.0)
    return initial


def _memory_after(sequence: ExtendedSequence, final: Tensor, key_dim: int, window: int | None) -> Memory:
    if sequence.documents is not None and sequence.num_documents > 1:  # a last document without tokens leaves empty slots
        belongs = sequence.documents[:, -1] == sequence.num_documents - 1
        final = torch.where(belongs[:, None, None, None], final, 0.0)
    keys, values, log_gates = sequence.window_tail()
    length = sequence.length.expand(final.shape[0]).clone()
    return _memory(final, (keys, values, clamp_log_gates(log_gates)), length, key_dim, window)


def _memory(final: Tensor, tail: tuple[Tensor, Tensor, Tensor], length: Tensor, key_dim: int, window: int | None) -> Memory:
    return Memory(final[..., :key_dim], final[..., key_dim:-1], final[..., -1], *tail, length, window)


def _document_starts(sequence: ExtendedSequence, cu_seqlens: Tensor | None, memory: Memory | None) -> Tensor | None:
    """Extended row at which each query's document begins: None (row 0), [B], or [B = 1, T]."""
    if memory is None and cu_seqlens is None:
        return None
    held = sequence.held
    begin = torch.zeros(1, dtype=torch.int64, device=sequence.keys.device) if memory is None else held - memory.length.clamp(max=held)
    if cu_seqlens is None:
        return begin.to(torch.int32)
    assert sequence.query_documents is not None or sequence.num_documents == 1
    if sequence.num_documents == 1:
        return begin.to(torch.int32)
    boundaries = cu_seqlens.to(device=sequence.keys.device, dtype=torch.int64)
    documents = sequence.query_documents
    return torch.where(documents == 0, begin[:, None], boundaries[documents] + held).to(torch.int32)
