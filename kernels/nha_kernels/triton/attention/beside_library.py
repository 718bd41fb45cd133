"""Wide windows and full attention: the window by a library's kernel, the slots by ours, one softmax over both by their log-sum-exps."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...first_order import first_order_only
from ...options import AttentionOptions
from ..architectures.tiles import Tiles
from ..libraries.adapter import Bounds, WindowOutput
from ..libraries.choice import load_library
from .backward_slots import backward_slots
from .forward import forward
from .merge import merge_into
from .problem import Problem
from .states import SegmentStarts, segment_starts


@dataclass(frozen=True)
class Plan:
    """Who attends to the window of a call, and how the slots are read beside it."""

    options: AttentionOptions
    held: int
    slot_window: int | None  # the window that the slots go by, None where they hold nothing and nothing is written
    library: str
    tiles: Tiles | None  # None without slots


class AttentionBesideLibrary(torch.autograd.Function):
    """Output [B, T, HQ, V] and, where slots are read, the slots after the last token [B, H, M, K+V+1].

    `bounds` is None where one document fills every row of the batch."""

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
        bounds: Bounds | None,
        plan: Plan,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v, g, rotated_q, rotated_k = (x.contiguous() for x in (q, k, v, g, rotated_q, rotated_k))
        mask = (bounds, plan.options.window, plan.options.logit_scale(rotated_q.shape[-1]))
        out, lse, random_state = load_library(plan.library).forward(rotated_q, rotated_k, v, *mask)
        starts, final = None, None
        if plan.slot_window is None:
            if plan.options.empty_slots == "attend":  # M empty slots, logits and values 0
                merge_into(out, lse, math.log(g.shape[3]))
            q, k = q.new_empty(0), k.new_empty(0)  # the backward reads the rotated ones only
        else:
            problem = _problem(q, k, v, g, start, plan)
            starts = segment_starts(problem, None if initial is None else initial.contiguous())
            slot_out, slot_lse, final = forward(problem, starts)
            merge_into(out, lse, (slot_out, slot_lse))
        kept = (None, None) if starts is None else (starts.slots, starts.log_decay)
        edges = (None, None) if bounds is None else bounds
        ctx.save_for_backward(q, k, v, g, rotated_q, rotated_k, start, *edges, out, lse, *kept, *random_state)
        ctx.plan = plan
        ctx.chunks_per_segment = 0 if starts is None else starts.chunks_per_segment
        ctx.has_initial = initial is not None
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @first_order_only("Use backend='torch', which has them all")
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, g, rotated_q, rotated_k, start, queries, rows, out, lse, slots, log_decay, *random_state = ctx.saved_tensors
        bounds = None if queries is None else Bounds(queries, rows)
        plan: Plan = ctx.plan
        d_out = torch.zeros_like(out) if d_out is None else d_out.contiguous()
        result = WindowOutput(out, lse, tuple(random_state))
        mask = (bounds, plan.options.window, plan.options.logit_scale(rotated_q.shape[-1]))
        d_rotated = load_library(plan.library).backward(d_out, rotated_q, rotated_k, v, result, *mask)
        if plan.slot_window is None:
            return None, None, d_rotated[2], torch.zeros_like(g), d_rotated[0], d_rotated[1], None, None, None, None
        p = _problem(q, k, v, g, start, plan)
        starts = SegmentStarts(slots, log_decay, ctx.chunks_per_segment)
        gradients, d_initial = backward_slots(p, starts, out, lse, d_out, None if d_final is None else d_final.contiguous())
        d_initial = d_initial.view(p.batch, p.kv_heads, *d_initial.shape[1:]) if ctx.has_initial else None
        dv = d_rotated[2] + gradients.values
        return gradients.q, gradients.keys, dv, gradients.gates, d_rotated[0], d_rotated[1], d_initial, None, None, None


def _problem(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor | None, plan: Plan) -> Problem:
    assert plan.slot_window is not None and plan.tiles is not None
    return Problem(
        q,
        k,
        v,
        g,
        start,
        cos=None,
        sin=None,
        options=plan.options,
        held=plan.held,
        window=plan.slot_window,
        attend_window=False,
        tiles=plan.tiles,
    )
