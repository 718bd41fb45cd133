"""The `triton` backend of attention: puts tokens and memory before the kernels, and the memory together after them."""

import torch
from torch import Tensor

from ...chunked import chunked_attention
from ...conventions import clamp_log_gates
from ...memory import Memory
from ...options import AttentionOptions
from ...sequence import ExtendedSequence, extend_sequence
from ..device import on_device_of_first_argument
from ..dispatch import attends_by_library, choose_tiles, largest_group, refusal_of_slots
from ..libraries.adapter import sequence_bounds
from ..libraries.choice import choose_library, window_call
from .beside_library import AttentionBesideLibrary, Plan
from .fused import fused_attention, in_parts_of_groups
from .rotary import rotated_heads


@on_device_of_first_argument
def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, options: AttentionOptions, *, cu_seqlens: Tensor | None, memory: Memory | None
) -> tuple[Tensor, Memory]:
    """Arguments as `hybrid_attention`; dispatch has checked that the kernels serve them."""
    window = options.window
    if window is None or attends_by_library(q, v, window):

        def attend(part: Tensor) -> tuple[Tensor, Memory]:
            return _wide_window(part, k, v, g, options, cu_seqlens, memory)

        reads_slots = window is not None or memory is not None
        return in_parts_of_groups(attend, q, k.shape[2], largest_group(q, v)) if reads_slots else attend(q)
    if memory is None and cu_seqlens is None:  # nothing to prepare: no launch besides the kernels
        out, final = fused_attention(q, k, v, g, None, None, 0, options)
        tail = slice(max(0, k.shape[1] - window), k.shape[1])
        length = torch.full((k.shape[0],), k.shape[1], dtype=torch.int64, device=k.device)
        return out, _memory(final, (k[:, tail], v[:, tail], clamp_log_gates(g[:, tail])), length, k.shape[-1], window)
    sequence = extend_sequence(k, v, g, window=window, cu_seqlens=cu_seqlens, memory=memory)
    initial = _initial_slots(sequence, cu_seqlens, memory)
    start = _document_starts(sequence, cu_seqlens, memory)
    out, final = fused_attention(q, sequence.keys, sequence.values, sequence.log_gates, initial, start, sequence.held, options)
    return out, _memory_after(sequence, final, k.shape[-1], window)


def _wide_window(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, options: AttentionOptions, cu_seqlens: Tensor | None, memory: Memory | None
) -> tuple[Tensor, Memory]:
    """The window by a library, over the memory's window rows and the new tokens."""
    window = options.window
    if window is None and memory is not None and refusal_of_slots(q, k, v, g) is not None:  # a memory may hold slots: read them there
        return chunked_attention(q, k, v, clamp_log_gates(g), options, cu_seqlens=cu_seqlens, memory=memory)
    sequence = extend_sequence(k, v, g, window=window, cu_seqlens=cu_seqlens, memory=memory)
    keys, held = sequence.keys, sequence.held
    one_document = memory is None and cu_seqlens is None
    rotated_q, rotated_k = q, keys
    if options.rope is not None:
        of_queries, of_rows = (None, None) if one_document else _positions(sequence, memory)
        rotated_q = rotated_heads(q, of_queries, options.rope, options.rope_attention_factor)
        rotated_k = rotated_heads(keys, of_rows, options.rope, options.rope_attention_factor)
    bounds = None
    if not one_document:
        begin = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device) if memory is None else held - memory.length.clamp(max=held)
        bounds = sequence_bounds(q.shape[0], q.shape[1], held, begin, cu_seqlens)
    # A full window that continues a memory reads the memory's slots, as a window does that nothing leaves.
    slot_window = None if window is None and memory is None else sequence.window
    plan = Plan(
        options=options,
        held=held,
        slot_window=slot_window,
        library=choose_library(window_call(q, window, one_document=one_document)).name,
        tiles=None if slot_window is None else choose_tiles(q, k, v, g, slot_window),
    )
    initial = None if slot_window is None else _initial_slots(sequence, cu_seqlens, memory)
    start = None if slot_window is None else _document_starts(sequence, cu_seqlens, memory)
    tensors = (q, keys, sequence.values, sequence.log_gates, rotated_q, rotated_k, initial, start, bounds)
    out, final = AttentionBesideLibrary.apply(*tensors, plan)
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
