"""Wide windows and full attention: the window by a library's kernel, the slots by ours, one softmax over both by their log-sum-exps."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backward_slots import backward_slots
from .flash import Bounds, flash_backward, flash_forward
from .forward import forward
from .full_attention import cudnn_backward, cudnn_forward, full_attention_kernel
from .problem import Problem, Tiles
from .states import SegmentStarts, segment_starts


@dataclass(frozen=True)
class MergedOptions:
    held: int
    window: int | None  # None: full attention, no slot is ever written
    scale: float
    empty_slots: str
    tiles: Tiles


class MergedAttention(torch.autograd.Function):
    """Output [B, T, HQ, V] and, unless the window is full, the slots after the last token [B, H, M, K+V+1].

    `start` is None where one document fills every row of the batch."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        rotated_q: Tensor,
        rotated_k: Tensor,
        initial: Tensor | None,
        start: Tensor | None,
        bounds: Bounds,
        options: MergedOptions,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v, g, rotated_q, rotated_k = (x.contiguous() for x in (q, k, v, g, rotated_q, rotated_k))
        ctx.by_cudnn = options.window is None and full_attention_kernel(q, v, one_document=start is None) == "cudnn"
        random_state: list[Tensor | None] = []
        if ctx.by_cudnn:
            window_out, window_lse, random_state = cudnn_forward(rotated_q, rotated_k, v, options.scale)
        else:
            window_out, window_lse = flash_forward(rotated_q, rotated_k, v, bounds, options.window, options.scale)
        problem, starts, final = None, None, None
        if options.window is None:
            slot_out = None
            empty = math.log(g.shape[3]) if options.empty_slots == "attend" else -math.inf
            slot_lse = torch.full_like(window_lse, empty)
        else:
            problem = _problem(q, k, v, g, start, options)
            starts = segment_starts(problem, None if initial is None else initial.contiguous())
            slot_out, slot_lse, final = forward(problem, starts)
        lse = torch.logaddexp(slot_lse, window_lse)
        out = torch.exp(window_lse - lse)[..., None] * window_out
        if slot_out is not None:
            out = out + torch.exp(slot_lse - lse)[..., None] * slot_out
        out = out.to(q.dtype).contiguous()
        kept = (None, None) if starts is None else (starts.slots, starts.log_decay)
        if options.window is None:  # the backward of full attention reads the rotated ones only
            q, k = q.new_empty(0), k.new_empty(0)
        ctx.save_for_backward(q, k, v, g, rotated_q, rotated_k, start, *bounds, out, lse, *kept, *random_state)
        ctx.options = options
        ctx.chunks_per_segment = 0 if starts is None else starts.chunks_per_segment
        ctx.has_initial = initial is not None
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, g, rotated_q, rotated_k, start, queries, rows, out, lse, slots, log_decay, *random_state = ctx.saved_tensors
        bounds = Bounds(queries, rows)
        options: MergedOptions = ctx.options
        d_out = torch.zeros_like(out) if d_out is None else d_out.contiguous()
        if ctx.by_cudnn:
            d_rotated = cudnn_backward(d_out, rotated_q, rotated_k, v, out, lse, random_state, options.scale)
        else:
            d_rotated = flash_backward(d_out, rotated_q, rotated_k, v, out, lse, bounds, options.window, options.scale)
        if options.window is None:
            return None, None, d_rotated[2], torch.zeros_like(g), d_rotated[0], d_rotated[1], None, None, None, None
        p = _problem(q, k, v, g, start, options)
        starts = SegmentStarts(slots, log_decay, ctx.chunks_per_segment)
        gradients, d_initial = backward_slots(p, starts, out, lse, d_out, None if d_final is None else d_final.contiguous())
        d_initial = d_initial.view(p.batch, p.kv_heads, *d_initial.shape[1:]) if ctx.has_initial else None
        dv = d_rotated[2] + gradients.values
        return gradients.q, gradients.keys, dv, gradients.gates, d_rotated[0], d_rotated[1], d_initial, None, None, None


def _problem(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor | None, options: MergedOptions) -> Problem:
    assert options.window is not None
    return Problem(
        q,
        k,
        v,
        g,
        start,
        cos=None,
        sin=None,
        held=options.held,
        window=options.window,
        rotated_pairs=0,
        scale=options.scale,
        empty_slots=options.empty_slots,
        attend_window=False,
        tiles=options.tiles,
    )
