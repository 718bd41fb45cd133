"""The oracle: Native Hybrid Attention token by token, written as the paper states it (arXiv 2510.07019).

Slow on purpose and free of cleverness. Every other path is compared with it, forward and (through autograd) backward.
"""

import itertools

import torch
from torch import Tensor

from .conventions import accumulation_dtype, bias_slot_logits, softmax_with_logsumexp, write_strength
from .memory import Memory
from .options import AttentionOptions
from .rope import rope_tables, rotate


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, options: AttentionOptions, *, cu_seqlens: Tensor | None, memory: Memory | None
) -> tuple[Tensor, Memory]:
    """Arguments as `hybrid_attention`. Rows and documents run one after another, each from its own memory."""
    batch, _, num_kv_heads, key_dim = k.shape
    window = options.window
    if memory is None:
        memory = Memory.empty(batch, num_kv_heads, g.shape[-1], key_dim, v.shape[-1], window, dtype=q.dtype, device=q.device)
    starts = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, memories = [], []
    for row in range(batch):
        row_outputs, row_memory = [], memory.select_rows(torch.tensor([row]))
        for document, (start, end) in enumerate(itertools.pairwise(starts)):
            if document > 0:
                row_memory = Memory.empty(1, num_kv_heads, g.shape[-1], key_dim, v.shape[-1], window, dtype=q.dtype, device=q.device)
            part = slice(start, end)
            output, row_memory = _one_document(q[row, part], k[row, part], v[row, part], g[row, part], row_memory, options)
            row_outputs.append(output)
        outputs.append(torch.cat(row_outputs))
        memories.append(row_memory)
    return torch.stack(outputs), _stack(memories, window)


def _one_document(q: Tensor, k: Tensor, v: Tensor, g: Tensor, memory: Memory, options: AttentionOptions) -> tuple[Tensor, Memory]:
    """One sequence: q [T, HQ, K], k [T, H, K], v [T, H, V], g [T, H, M], memory of batch 1."""
    dtype = accumulation_dtype(q.dtype)
    scale = options.logit_scale(q.shape[-1])
    seen = int(memory.length)
    held = seen if memory.window is None else min(memory.window, seen)
    rows = memory.window_keys.shape[1]
    keys = torch.cat([memory.window_keys[0, rows - held :], k]).to(dtype)
    values = torch.cat([memory.window_values[0, rows - held :], v]).to(dtype)
    log_gates = torch.cat([memory.window_log_gates[0, rows - held :], g]).to(dtype)
    queries = q.to(dtype)
    window = keys.shape[0] if memory.window is None else memory.window

    rotated_keys, rotated_queries = keys, queries
    if options.rope is not None:
        cos, sin = rope_tables(torch.arange(keys.shape[0], device=q.device), options.rope, options.rope_attention_factor, dtype)
        rotated_keys = rotate(keys[None], cos, sin)[0]
        rotated_queries = rotate(queries[None], cos[held:], sin[held:])[0]

    group = q.shape[1] // k.shape[1]
    slot_keys, slot_values, slot_log_decay = memory.slot_keys[0], memory.slot_values[0], memory.slot_log_decay[0]
    written = max(0, seen - window)
    outputs = []
    for t in range(q.shape[0]):
        newest = held + t  # index of token t among `keys`
        leaving = newest - window
        if leaving >= 0:  # a token enters the slots exactly when it leaves the window
            gate = log_gates[leaving]
            keep, put = torch.exp(gate)[..., None], write_strength(gate)[..., None]
            slot_keys = keep * slot_keys + put * keys[leaving][:, None, :]
            slot_values = keep * slot_values + put * values[leaving][:, None, :]
            slot_log_decay = slot_log_decay + gate
            written += 1
        visible = slice(max(0, leaving + 1), newest + 1)
        heads = []
        for head in range(q.shape[1]):
            kv = head // group
            slot_logits = scale * slot_keys[kv] @ queries[t, head]
            slot_logits = bias_slot_logits(
                slot_logits,
                options.empty_slots,
                anything_written=torch.tensor(written > 0, device=q.device),
                slot_log_decay=slot_log_decay[kv],
            )
            window_logits = scale * rotated_keys[visible, kv] @ rotated_queries[t, head]
            p, _ = softmax_with_logsumexp(torch.cat([slot_logits, window_logits]))
            heads.append(p @ torch.cat([slot_values[kv], values[visible, kv]]))
        outputs.append(torch.stack(heads))
    output = torch.stack(outputs).to(q.dtype) if outputs else q.new_zeros(0, q.shape[1], v.shape[-1])
    kept = min(window, keys.shape[0])
    tail = slice(keys.shape[0] - kept, keys.shape[0])
    return output, Memory(
        slot_keys=slot_keys[None],
        slot_values=slot_values[None],
        slot_log_decay=slot_log_decay[None],
        window_keys=keys[None, tail].to(k.dtype),
        window_values=values[None, tail].to(v.dtype),
        window_log_gates=log_gates[None, tail],
        length=memory.length + q.shape[0],
        window=memory.window,
    )


def _stack(memories: list[Memory], window: int | None) -> Memory:
    """One batch from memories of single sequences, window rows aligned at the newest token."""
    rows = max(memory.window_keys.shape[1] for memory in memories)

    def aligned(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_zeros(1, rows - tensor.shape[1], *tensor.shape[2:]), tensor], dim=1)

    return Memory(
        slot_keys=torch.cat([memory.slot_keys for memory in memories]),
        slot_values=torch.cat([memory.slot_values for memory in memories]),
        slot_log_decay=torch.cat([memory.slot_log_decay for memory in memories]),
        window_keys=torch.cat([aligned(memory.window_keys) for memory in memories]),
        window_values=torch.cat([aligned(memory.window_values) for memory in memories]),
        window_log_gates=torch.cat([aligned(memory.window_log_gates) for memory in memories]),
        length=torch.cat([memory.length for memory in memories]),
        window=window,
    )
