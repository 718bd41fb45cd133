"""Exact context parallelism: every rank fetches the memory before its shard, then runs the single-device operator on it.

What a rank announces, the effect of its pieces on the slots and its last W tokens, does not grow with the context
(`messages.py` sends it). Every rank runs every exchange, forward and backward, in the same order, with or without
predecessors.

    forward    summary of own pieces -> message -> memory behind which the tokens already lie -> operator
    backward   operator -> gradients of memory -> message -> gradients of own pieces and tokens, added to the operator's in place

What overlaps on a GPU: in the forward, summary and message have a stream of their own, beside which the shard's keys, values and log-gates
are copied behind the memory. In the backward nothing is left to compute beside the message: the operator has finished, and what follows
needs what arrives. Streams decide when something runs, never what is added to what.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nha_kernels import AttentionOptions, ContinuedTokens, attention_statistics, continue_attention, hybrid_attention
from nha_kernels.first_order import first_order_only
from nha_kernels.slot_summary import add_summary_gradients, summarise_slots
from nha_megatron.layers.boundaries import boundaries_on, documents_of_rows

from .messages import forward_message, mark_used_on_this_stream, start_backward_message
from .plan import ContextParallelPlan, plan_context_parallel
from .summaries import compose_slots, piece_gradient


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    options: AttentionOptions,
    *,
    group: dist.ProcessGroup,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`hybrid_attention` over a sequence whose rank r of `group` holds the tokens [r L, (r + 1) L).

    Args:
        q, k, v, g: this rank's shard [B, L, ...], as `nha_attention` takes them; L is the same on every rank.
        options: with a window W >= 0. Full attention has its own exchange: `full_attention_over_ranks`.
        group: the context-parallel ranks in token order.
        cu_seqlens: document boundaries over the B rows of R L tokens laid end to end, the same on every rank; row edges are boundaries.
            Integers or a CPU tensor: they decide what is sent, and the host must not wait for a device. Rows with documents are exchanged
            one after another, each with its own plan.
        backend: as `nha_attention`.

    Returns:
        Output of the shard [B, L, HQ, V]. The backward gives exact gradients to every rank's q, k, v and g; all ranks must run it.

    Raises:
        ConfigError: what the plan refuses. ValueError: what `nha_attention` refuses, or cu_seqlens on an accelerator.
    """
    outputs = []
    for row, plan, documents in _rows(q, k, v, g, options, group, cu_seqlens):
        if plan is None:
            outputs.append(hybrid_attention(*row, options, cu_seqlens=documents, backend=backend))
        else:
            row_q, tokens = fetch_memory(*row, plan=plan, group=group)
            outputs.append(continue_attention(row_q, tokens, options, cu_seqlens=documents, backend=backend))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@torch.no_grad()
def context_parallel_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    options: AttentionOptions,
    *,
    group: dist.ProcessGroup,
    cu_seqlens: Sequence[int] | Tensor | None = None,
) -> dict[str, Tensor]:
    """`attention_statistics` of this rank's shard, arguments as `context_parallel_attention`. All ranks must call it."""
    of_rows = []
    for row, plan, documents in _rows(q, k, v, g, options, group, cu_seqlens):
        memory = None if plan is None else fetch_memory(*row, plan=plan, group=group)[1].apart()[-1]
        of_rows.append(attention_statistics(*row, options, cu_seqlens=documents, memory=memory))
    return {name: torch.stack([of_row[name] for of_row in of_rows]).mean() for name in of_rows[0]}


def _rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    options: AttentionOptions,
    group: dist.ProcessGroup,
    cu_seqlens: Sequence[int] | Tensor | None,
) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor, Tensor], ContextParallelPlan | None, Tensor | None]]:
    """(q, k, v, g), their plan (None on a single rank) and documents: the whole batch at once, or row by row where rows have documents."""
    assert options.window is not None, "full attention has its own exchange"
    size, tokens, window = group.size(), q.shape[1], options.window
    documents: Sequence[tuple[int, ...] | None] = [None]
    if cu_seqlens is not None:
        documents = documents_of_rows(cu_seqlens, q.shape[0], size * tokens)
    for row, row_documents in enumerate(documents):
        # A slice of the only row would be everything, but its gradient a copy into zeros.
        of_row = (q, k, v, g) if len(documents) == 1 else (q[row : row + 1], k[row : row + 1], v[row : row + 1], g[row : row + 1])
        plan, local = None, row_documents
        if size > 1:
            plan = plan_context_parallel(tokens_per_rank=tokens, num_ranks=size, rank=group.rank(), window=window, cu_seqlens=row_documents)
            local = plan.cu_seqlens
        # One document is the ordinary call, which is faster.
        yield of_row, plan, None if local is None or len(local) == 2 else boundaries_on(q.device, local)


def fetch_memory(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, plan: ContextParallelPlan, group: dist.ProcessGroup
) -> tuple[Tensor, ContinuedTokens]:
    """This rank's tokens behind the memory before them, differentiable in k, v and g of all ranks; and q, to be used in its place.

    q passes through the exchange so that every rank's output depends on it: a rank that uses nothing of its memory would
    otherwise leave the exchange out of its backward, and the other ranks would wait for it for ever.

    The tokens may be given to `continue_attention` or taken `apart()`, once: the backward adds to their gradients in place.
    """
    q, keys, values, log_gates, slots = _Exchange.apply(plan, group, q, k, v, g)
    return q, ContinuedTokens(keys, values, log_gates, slots, length=plan.length, window=plan.window)


@contextmanager
def _exchange_stream(device: torch.device) -> Iterator[None]:
    """Inside, work is queued on the exchange's stream, behind all that the current stream has queued before."""
    if device.type != "cuda":
        yield
        return
    stream = _stream_of(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield


def _wait_for_exchange_stream(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_stream_of(device))


@lru_cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)  # small kernels, which would else wait behind the copies


class _Exchange(torch.autograd.Function):
    """A layer's exchange in one node, so that its order is the same on every rank, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, plan: ContextParallelPlan, group: dist.ProcessGroup, q: Tensor, k: Tensor, v: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q as it came; keys, values and log-gates [B, P + L, H, .] with P received rows in front; initial slots [B, H, M, C]."""
        with _exchange_stream(k.device):
            message = forward_message(plan, group, (k, v, g))
            kept = [
                summarise_slots(k[:, piece.start : piece.stop], v[:, piece.start : piece.stop], g[:, piece.start : piece.stop], out)
                if piece.consumers
                else ()
                for piece, out in zip(plan.pieces, message.pieces, strict=True)
            ]
            message.start()
        held = plan.halo_tokens
        extended = [x.new_empty(x.shape[0], held + x.shape[1], *x.shape[2:]) for x in (k, v, g)]
        for rows, x in zip(extended, (k, v, g), strict=True):
            rows[:, held:].copy_(x)
        _wait_for_exchange_stream(k.device)
        pieces = message.wait(tuple(rows[:, :held] for rows in extended))

        ctx.plan, ctx.group = plan, group
        ctx.num_kept = [len(of_piece) for of_piece in kept]
        slots_before = [compose_slots(pieces, piece.before) for piece in plan.pieces]
        ctx.save_for_backward(*extended, pieces[..., -1:].contiguous(), *slots_before, *itertools.chain(*kept))
        return q.view_as(q), *extended, compose_slots(pieces, plan.initial)

    @staticmethod
    @first_order_only("Compute it without context parallelism")
    def backward(ctx: Any, d_q: Tensor, *gradients: Tensor) -> tuple[Any, ...]:
        plan: ContextParallelPlan = ctx.plan
        keys, values, log_gates, log_decays, *saved = ctx.saved_tensors
        slots_before, kept = saved[: len(plan.pieces)], iter(saved[len(plan.pieces) :])
        *d_extended, d_slots = gradients
        held = plan.halo_tokens
        d_extended = [x.contiguous() for x in d_extended]  # made by the operator's backward for this function alone
        message = start_backward_message(plan, ctx.group, d_slots, tuple(x[:, :held] for x in d_extended))
        d_tokens = [x[:, held:] for x in d_extended]
        slot_gradients, d_sent = message.wait()
        for piece, before, count in zip(plan.pieces, slots_before, ctx.num_kept, strict=True):
            of_piece = tuple(itertools.islice(kept, count))
            if piece.consumers:
                d_piece = piece_gradient(plan, piece, slot_gradients, log_decays, before)
                k, v, g = (x[:, held + piece.start : held + piece.stop] for x in (keys, values, log_gates))
                dk, dv, dg = (x[:, piece.start : piece.stop] for x in d_tokens)
                mark_used_on_this_stream(*of_piece)
                add_summary_gradients(k, v, g, of_piece, d_piece, dk, dv, dg)
        for send, d_rows in zip(plan.sends, d_sent, strict=True):
            for total, gradient in zip(d_tokens, d_rows, strict=True):
                total[:, send.start : send.stop] += gradient
        return None, None, d_q, *d_tokens
