"""The `torch` backend: window and slots each with its log-sum-exp, merged into the one softmax. O(T (W + M)) time, any device."""

import math

import torch
from torch import Tensor

from .conventions import accumulation_dtype
from .memory import Memory
from .options import AttentionOptions
from .rope import rope_tables, rotate
from .sequence import ExtendedSequence, extend_sequence
from .slot_attention import SlotState, slot_attention
from .window_attention import window_attention


def chunked_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, options: AttentionOptions, *, cu_seqlens: Tensor | None, memory: Memory | None
) -> tuple[Tensor, Memory]:
    """Arguments as `hybrid_attention`."""
    sequence = extend_sequence(k, v, g, window=options.window, cu_seqlens=cu_seqlens, memory=memory)
    slot_output, slot_logsumexp, state = _slot_part(q, sequence, memory, options)
    if sequence.window == 0:
        output = slot_output
    else:
        window_output, window_logsumexp = _window_part(q, sequence, options)
        share = slot_share(slot_logsumexp, window_logsumexp)[..., None]
        rest = torch.sigmoid(window_logsumexp - slot_logsumexp)[..., None]
        output = rest * window_output if slot_output is None else share * slot_output + rest * window_output
    assert output is not None
    return output.to(q.dtype), _next_memory(sequence, state, options.window)


def slot_share(slot_logsumexp: Tensor, window_logsumexp: Tensor) -> Tensor:
    """Probability that the one softmax gives to the slots, from the log-sum-exps of both parts."""
    return torch.sigmoid(slot_logsumexp - window_logsumexp)


def log_sum_exps(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, options: AttentionOptions, *, cu_seqlens: Tensor | None, memory: Memory | None
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the slot logits and of the window logits, each [B, T, HQ]; -inf where a part holds nothing."""
    sequence = extend_sequence(k, v, g, window=options.window, cu_seqlens=cu_seqlens, memory=memory)
    _, slot_logsumexp, _ = _slot_part(q, sequence, memory, options)
    if sequence.window == 0:
        return slot_logsumexp, torch.full_like(slot_logsumexp, -torch.inf)
    return slot_logsumexp, _window_part(q, sequence, options)[1]


def _window_part(q: Tensor, sequence: ExtendedSequence, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    keys = sequence.keys
    if options.rope is not None:
        positions = torch.arange(keys.shape[1], device=q.device)
        cos, sin = rope_tables(positions, options.rope, options.rope_attention_factor, accumulation_dtype(q.dtype))
        keys = rotate(keys, cos, sin)
        q = rotate(q, cos[sequence.held :], sin[sequence.held :])
    scale = options.logit_scale(q.shape[-1])
    return window_attention(q, keys, sequence.values, window=sequence.window, scale=scale, documents=sequence.documents)


def _slot_part(
    q: Tensor, sequence: ExtendedSequence, memory: Memory | None, options: AttentionOptions
) -> tuple[Tensor | None, Tensor, SlotState]:
    """Output (None: zero everywhere), log-sum-exp and state of the slots."""
    dtype = accumulation_dtype(q.dtype)
    batch, num_queries, num_heads, key_dim = q.shape
    kv_heads, num_slots, value_dim = sequence.log_gates.shape[2], sequence.log_gates.shape[3], sequence.values.shape[3]
    if memory is None:
        state = Memory.empty(batch, kv_heads, num_slots, key_dim, value_dim, None, dtype=dtype, device=q.device)
    else:
        state = memory
    documents = sequence.query_documents
    first_document = None if documents is None else torch.zeros(1, dtype=torch.int64, device=q.device)
    slots = SlotState(state.slot_keys, state.slot_values, state.slot_log_decay, first_document)
    written = sequence.written_tokens()
    if written is None and memory is None:  # every slot is empty: logits 0, values 0
        empty_logsumexp = math.log(num_slots) if options.empty_slots == "attend" else -math.inf
        if documents is not None:
            slots = SlotState(slots.keys, slots.values, slots.log_decay, documents[:, -1])
        return None, q.new_full((batch, num_queries, num_heads), empty_logsumexp, dtype=dtype), slots
    if written is None:
        written = tuple(x.new_zeros(batch, num_queries, *x.shape[2:]) for x in (sequence.keys, sequence.values, sequence.log_gates))
    assert written is not None
    return slot_attention(
        q.to(dtype),
        tuple(x.to(dtype) for x in written),
        slots,
        scale=options.logit_scale(key_dim),
        empty_slots=options.empty_slots,
        anything_written=sequence.position >= sequence.window,
        documents=documents,
    )


def _next_memory(sequence: ExtendedSequence, state: SlotState, window: int | None) -> Memory:
    keys, values, log_gates = sequence.window_tail()
    slots = (state.keys, state.values, state.log_decay)
    if state.document is not None:  # a last document without tokens leaves empty slots
        belongs = state.document == sequence.num_documents - 1
        slots = tuple(torch.where(belongs.view(-1, *[1] * (slot.dim() - 1)), slot, 0.0) for slot in slots)
    return Memory(*slots, keys, values, log_gates, sequence.length.expand(keys.shape[0]).clone(), window)
