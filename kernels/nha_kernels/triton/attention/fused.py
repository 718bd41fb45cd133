"""The fused kernels as one differentiable call: slots and window under one softmax.

Kept for the backward: the inputs, the output, its log-sum-exp, the slots before each segment. Everything else is computed again.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...first_order import first_order_only
from ...options import AttentionOptions
from ..architectures.tiles import Tiles
from ..dispatch import choose_tiles, largest_group
from ..hopper.conditions import refusal as refusal_of_hopper
from .backward_slots import backward_slots
from .backward_window import backward_window
from .forward import forward
from .problem import Problem
from .rope_table import rope_table
from .states import SegmentStarts, chunks_per_segment, segment_starts

T = TypeVar("T")


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
        held: int,
        options: AttentionOptions,
        tiles: Tiles,
    ) -> tuple[Tensor, Tensor]:
        q, k, v, g = (x.contiguous() for x in (q, k, v, g))
        assert options.window is not None
        cos, sin = None, None
        # What lies farther back than all rows has neither work nor angles. A multiple of 16: one compiled kernel fewer.
        window = min(options.window, -(-k.shape[1] // 16) * 16)
        if options.rope is not None and window > 0:
            reach = window + 2 * max(tiles.window_rows, tiles.key_rows) + 2 * max(tiles.chunk, tiles.query_chunk, tiles.key_chunk)
            cos, sin = rope_table(options.rope, options.rope_attention_factor, reach, q)
        problem = Problem(
            q,
            k,
            v,
            g,
            start,
            cos,
            sin,
            options=options,
            held=held,
            window=window,
            attend_window=True,
            tiles=tiles,
        )
        ctx.set_materialize_grads(False)
        if refusal_of_hopper(q, k, v, g, options, continues=initial is not None or start is not None) is None:
            out, lse, final, starts = _forward_on_hopper(problem, wants_starts=any(ctx.needs_input_grad))
            if starts is None:
                return out, final
        else:
            starts = segment_starts(problem, None if initial is None else initial.contiguous())
            out, lse, final = forward(problem, starts)
        ctx.save_for_backward(q, k, v, g, start, cos, sin, out, lse, starts.slots, starts.log_decay)
        ctx.problem = replace(
            problem, q=q.new_empty(0), k=q.new_empty(0), v=q.new_empty(0), g=q.new_empty(0), start_or_none=None, cos=None, sin=None
        )
        ctx.chunks_per_segment = starts.chunks_per_segment
        ctx.has_initial = initial is not None
        return out, final

    @staticmethod
    @first_order_only("Use backend='torch', which has them all")
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


def _forward_on_hopper(p: Problem, *, wants_starts: bool) -> tuple[Tensor, Tensor, Tensor, SegmentStarts | None]:
    from ..hopper.forward import CHUNK, empty_starts, hopper_forward  # Gluon, which other versions of triton may not have

    assert p.options.rope is not None and p.cos is not None and p.sin is not None
    starts, of_chunks = None, CHUNK // p.C
    if wants_starts:
        starts = empty_starts(p.k, p.v, p.g, -(-chunks_per_segment(p) // of_chunks))
    scale = p.options.logit_scale(p.key_dim)
    out, lse, final = hopper_forward(p.q, p.k, p.v, p.g, p.options.rope, (p.cos, p.sin), scale, p.options.empty_slots, starts)
    if starts is None:
        return out, lse, final, None
    return out, lse, final, SegmentStarts(starts.slots, starts.log_decay, starts.chunks_per_segment * of_chunks)


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial: Tensor | None,
    start: Tensor | None,
    held: int,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Output and final slots, for any number of query heads to a KV head.

    Args:
        k, v, g: [B, held + T, ...], `held` rows of the memory's window in front of the tokens.
        initial: slots before the first query [B, H, M, K+V+1], log-decay last. None: empty.
        start: row at which each query's document begins, None (row 0), [B], or [B = 1, T].
    """
    assert options.window is not None
    window = options.window

    def attend(part: Tensor) -> tuple[Tensor, Tensor]:
        tiles = choose_tiles(part, k, v, g, window)  # of this part's query heads: tiles of more of them may read out of bounds
        return _FusedAttention.apply(part, k, v, g, initial, start, held, options, tiles)

    return in_parts_of_groups(attend, q, k.shape[2], largest_group(q, v))


def in_parts_of_groups(attend: Callable[[Tensor], tuple[Tensor, T]], q: Tensor, kv_heads: int, most: int) -> tuple[Tensor, T]:
    """`attend` with at most `most` query heads to a KV head at a time. Each part goes through the slots again; autograd adds the gradients
    of the KV heads."""
    group = q.shape[2] // kv_heads
    if group <= most:
        return attend(q)
    parts = q.unflatten(2, (kv_heads, group)).tensor_split(-(-group // most), dim=3)
    results = [attend(part.flatten(2, 3)) for part in parts]
    outputs = [out.unflatten(2, (kv_heads, -1)) for out, _ in results]
    return torch.cat(outputs, dim=3).flatten(2, 3), results[0][1]
