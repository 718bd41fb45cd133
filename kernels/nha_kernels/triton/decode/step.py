"""One decode step in two launches: the memory is read once, and only what changes is written.

1. `attend_pieces`   one program per (piece, row of the batch, KV head). A piece is 16 slots or a stretch of the window. A program of slots
                     writes the leaving tokens to its slots in place and reads them after each write; every program leaves its part of the
                     softmax: largest logit, sum, weighted values.
2. `merge_pieces`    one program per query head: merges the parts, and puts the new tokens where the leaving ones stood.

The leaving tokens are overwritten by the second launch, because every program of slots reads them in the first. Pieces do not depend on the
batch, so the result of a sequence does not either.

The window is a ring, see `DecodeMemory`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...conventions import EMPTY_SLOTS
from ...decode import DecodeMemory
from ...options import AttentionOptions
from ..device import on_device_of_first_argument
from ..dispatch import architecture_for
from .pieces import attend_pieces

_LEAST_WINDOW_ROWS = 64  # of a piece, and a multiple of it
_MOST_WINDOW_PIECES = 32


@triton.jit
def merge_pieces(
    k,
    v,
    g,
    window_keys,
    window_values,
    window_log_gates,
    length,
    window_start,
    part_out,
    part_max,
    part_sum,
    old_start,
    out,  # [B, T, HQ, V]
    T,
    W,
    num_pieces,
    H: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    SLOTS: tl.constexpr,  # powers of two that hold M and the pieces
    PIECES: tl.constexpr,
):
    bh = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    b, h = bh // H, bh % H
    token, head = row // R, row % R
    piece = tl.arange(0, PIECES)
    ok = piece < num_pieces
    at_part = (bh * num_pieces + piece) * (T * R) + row
    largest = tl.load(part_max + at_part, mask=ok, other=float("-inf"))
    top = tl.max(largest, 0)
    weight = tl.exp2(largest - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight * tl.load(part_sum + at_part, mask=ok, other=0.0), 0)
    channel = tl.arange(0, V)
    parts = tl.load(part_out + at_part[:, None] * V + channel[None, :], mask=ok[:, None], other=0.0)
    merged = tl.sum(parts * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)  # nothing visible: 0
    tl.store(out + ((b * T + token) * (H * R) + h * R + head) * V + channel, merged.to(out.dtype.element_ty))

    if (head == 0) & (token >= T - W):
        place = (b * W + (tl.load(old_start + b) + token) % tl.maximum(W, 1)) * H + h
        at_new = (b * T + token) * H + h
        tl.store(window_values + place * V + channel, tl.load(v + at_new * V + channel))
        key_channel = tl.arange(0, K)
        tl.store(window_keys + place * K + key_channel, tl.load(k + at_new * K + key_channel))
        slot = tl.arange(0, SLOTS)
        gate = tl.load(g + at_new * M + slot, mask=slot < M, other=0.0)
        tl.store(window_log_gates + place * M + slot, tl.maximum(gate, -40.0), mask=slot < M)
    if (row == 0) & (h == 0):
        tl.store(window_start + b, (tl.load(old_start + b) + T) % tl.maximum(W, 1))
        tl.store(length + b, tl.load(length + b) + T)


@on_device_of_first_argument
def decode_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, memory: DecodeMemory, options: AttentionOptions) -> Tensor:
    """Output [B, T, HQ, V]; `memory` is updated. `nha_decode_step` has checked that these kernels serve the call."""
    q, k, v, g = (x.contiguous() for x in (q, k, v, g))
    batch, num_tokens, query_heads, key_dim = q.shape
    kv_heads, value_dim, num_slots, window = k.shape[2], v.shape[3], g.shape[3], memory.window_keys.shape[1]
    group = query_heads // kv_heads
    tiles = architecture_for(q).decode_tiles(q, k, v)
    window_rows = _LEAST_WINDOW_ROWS * max(1, triton.cdiv(window, _LEAST_WINDOW_ROWS * _MOST_WINDOW_PIECES))
    pieces = num_slots // tiles.slots + max(1, triton.cdiv(window, window_rows))
    part_max = torch.empty(batch * kv_heads, pieces, num_tokens * group, dtype=torch.float32, device=q.device)
    part_sum = torch.empty_like(part_max)
    part_out = torch.empty(*part_max.shape, value_dim, dtype=torch.float32, device=q.device)
    old_start = torch.empty_like(memory.window_start)
    out = torch.empty(*q.shape[:3], value_dim, dtype=q.dtype, device=q.device)
    pairs = 0 if options.rope is None else options.rope.shape[0]
    sizes = {"H": kv_heads, "R": group, "K": key_dim, "V": value_dim, "M": num_slots}
    ring = (memory.window_keys, memory.window_values, memory.window_log_gates)
    parts = (part_out, part_max, part_sum, old_start)
    attend_pieces[(batch * kv_heads, pieces)](
        q,
        k,
        v,
        g,
        memory.slot_keys,
        memory.slot_values,
        memory.slot_log_decay,
        *ring,
        memory.length,
        memory.window_start,
        q if options.rope is None else options.rope.contiguous(),  # never read without rotation
        *parts,
        num_tokens,
        window,
        window_rows,
        options.logit_scale(key_dim),
        options.rope_attention_factor,
        **sizes,
        BM=tiles.slots,
        ROWS=tiles.query_rows,
        ROW_BLOCKS=triton.cdiv(num_tokens * group, tiles.query_rows),
        BN=tiles.window_rows,
        HALF=pairs or key_dim // 2,
        PAIRS=pairs,
        EMPTY=EMPTY_SLOTS.index(options.empty_slots),
        ROPE=options.rope is not None and window > 0,
        num_warps=4,
        num_stages=tiles.stages,
        maxnreg=tiles.registers,
    )
    merge_pieces[(batch * kv_heads, num_tokens * group)](
        k,
        v,
        g,
        *ring,
        memory.length,
        memory.window_start,
        *parts,
        out,
        num_tokens,
        window,
        pieces,
        **sizes,
        SLOTS=triton.next_power_of_2(num_slots),
        PIECES=triton.next_power_of_2(pieces),
        num_warps=4,
    )
    return out
