"""Exact context parallelism: every rank fetches the memory before its shard, then runs the single-device operator on it.

Two messages a layer, whatever the length of the context. The halo leaves first and travels while the second is computed; both are
under way before either is waited for:

    all-to-all   halo: raw keys, values and log-gates of the last W tokens, as bytes (keys may be bf16, gates are float32)
    all-gather   what the pieces of every shard do to the slots, in float32

The backward sends the same two messages in reverse. Every rank runs both, in the same order, with or without predecessors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nha_kernels import Memory, attention_statistics, clamp_log_gates, nha_attention, slot_summary
from nha_kernels.conventions import EmptySlots, accumulation_dtype

from .boundaries import boundaries_on, documents_of_rows
from .context_parallel_plan import ContextParallelPlan, plan_context_parallel
from .context_parallel_slots import compose_slots, piece_gradient


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    window: int,
    group: dist.ProcessGroup,
    rope: Tensor | None = None,
    rope_attention_factor: float = 1.0,
    scale: float | None = None,
    empty_slots: EmptySlots = "attend",
    cu_seqlens: Sequence[int] | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`nha_attention` over a sequence whose rank r of `group` holds the tokens [r L, (r + 1) L).

    Args:
        q, k, v, g: this rank's shard [B, L, ...], as `nha_attention` takes them; L is the same on every rank.
        window: W >= 0. Full attention has its own exchange: `full_attention_over_ranks`.
        group: the context-parallel ranks in token order.
        cu_seqlens: document boundaries over the B rows of R L tokens laid end to end, the same on every rank; row edges are boundaries.
            Integers or a CPU tensor: they decide what is sent, and the host must not wait for a device. Rows with documents are exchanged
            one after another, each with its own plan.
        rope, rope_attention_factor, scale, empty_slots, backend: as `nha_attention`.

    Returns:
        Output of the shard [B, L, HQ, V]. The backward gives exact gradients to every rank's q, k, v and g; all ranks must run it.

    Raises:
        ConfigError: what the plan refuses. ValueError: what `nha_attention` refuses, or cu_seqlens on an accelerator.
    """
    options: dict[str, Any] = {
        "window": window,
        "rope": rope,
        "rope_attention_factor": rope_attention_factor,
        "scale": scale,
        "empty_slots": empty_slots,
        "backend": backend,
    }
    outputs = [
        nha_attention(*tensors, cu_seqlens=documents, memory=memory, **options)
        for tensors, documents, memory in _rows_to_continue(q, k, v, g, window, group, cu_seqlens)
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@torch.no_grad()
def context_parallel_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    window: int,
    group: dist.ProcessGroup,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """`attention_statistics` of this rank's shard, arguments as `context_parallel_attention`. All ranks must call it."""
    of_rows = [
        attention_statistics(*tensors, window=window, cu_seqlens=documents, memory=memory, **options)
        for tensors, documents, memory in _rows_to_continue(q, k, v, g, window, group, cu_seqlens)
    ]
    return {name: torch.stack([of_row[name] for of_row in of_rows]).mean() for name in of_rows[0]}


def _rows_to_continue(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, window: int, group: dist.ProcessGroup, cu_seqlens: Sequence[int] | Tensor | None
) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor | None, Memory | None]]:
    """(q, k, v, g), documents and memory to call the operator with: the whole batch at once, or row by row where rows have documents."""
    size, tokens = group.size(), q.shape[1]
    batches: list[slice] = [slice(None)]
    documents: Sequence[tuple[int, ...] | None] = [None]
    if cu_seqlens is not None:
        documents = documents_of_rows(cu_seqlens, q.shape[0], size * tokens)
        batches = [slice(row, row + 1) for row in range(q.shape[0])]
    for batch, row_documents in zip(batches, documents, strict=True):
        row_q, row_k, row_v, row_g = q[batch], k[batch], v[batch], g[batch]
        memory, local = None, row_documents
        if size > 1:
            plan = plan_context_parallel(tokens_per_rank=tokens, num_ranks=size, rank=group.rank(), window=window, cu_seqlens=row_documents)
            row_q, memory = fetch_memory(row_q, row_k, row_v, row_g, plan=plan, group=group)
            local = plan.cu_seqlens
        # One document is the ordinary call, which is faster.
        yield (row_q, row_k, row_v, row_g), None if local is None or len(local) == 2 else boundaries_on(q.device, local), memory


def fetch_memory(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, plan: ContextParallelPlan, group: dist.ProcessGroup
) -> tuple[Tensor, Memory]:
    """The memory before this rank's shard, differentiable in k, v and g of all ranks; and q, which must be used in its place.

    q passes through the exchange so that every rank's output depends on it: a rank that uses nothing of its memory would
    otherwise leave the exchange out of its backward, and the other ranks would wait for it for ever.
    """
    spans = [(plan.first_sent_token, plan.tokens_per_rank), *((piece.start, piece.stop) for piece in plan.pieces)]
    tail, *pieces = zip(*(_cut(x, spans) for x in (k, v, clamp_log_gates(g))), strict=True)
    halo = _start_halo(plan, group, *tail)
    # Without pieces the slots stay empty everywhere; the empty message only carries their shape.
    announced = torch.stack([_announce(*piece) for piece in pieces]) if pieces else _no_pieces(k, v, g)
    q, window_keys, window_values, window_log_gates, slots = _Exchange.apply(plan, group, halo, q, *tail, announced)
    log_decay, slot_keys, slot_values = slots.split([1, k.shape[-1], v.shape[-1]], dim=-1)
    memory = Memory(
        slot_keys=slot_keys,
        slot_values=slot_values,
        slot_log_decay=log_decay.squeeze(-1),
        window_keys=window_keys,
        window_values=window_values,
        window_log_gates=window_log_gates,
        length=torch.full((k.shape[0],), plan.length, dtype=torch.int64, device=k.device),
        window=plan.window,
    )
    return q, memory


def _announce(k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """[B, H, M, 1 + K + V]: log-decay and updates of one piece."""
    log_decay, keys, values = slot_summary(k, v, g)
    return torch.cat([log_decay.unsqueeze(-1), keys, values], dim=-1)


def _no_pieces(k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    batch, _, heads, slots = g.shape
    return k.new_empty(0, batch, heads, slots, 1 + k.shape[-1] + v.shape[-1], dtype=accumulation_dtype(k.dtype))


def _cut(x: Tensor, spans: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    return _Cut.apply(x, spans)


class _Cut(torch.autograd.Function):
    """x [B, L, ...] -> views of several token spans. Their gradients meet in one buffer; slicing would fill one of x's size for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spans: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.spans = x.shape, spans
        return tuple(x[:, start:stop] for start, stop in spans)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].new_zeros(ctx.shape)
        for (start, stop), gradient in zip(ctx.spans, gradients, strict=True):
            total[:, start:stop] += gradient
        return total, None


class _Exchange(torch.autograd.Function):
    """Both messages of a layer in one node, so that their order is the same on every rank, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: ContextParallelPlan,
        group: dist.ProcessGroup,
        halo: tuple[Tensor, dist.Work],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        announced: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """halo: of `_start_halo`. k, v, g: the tokens from `plan.first_sent_token` on. announced: [pieces of this rank, B, H, M, C]."""
        received, halo_arrives = halo
        gathered, pieces_arrive = _start_all_gather(announced, group)
        halo_arrives.wait()
        pieces_arrive.wait()

        slots = compose_slots(gathered, plan.initial)
        ctx.plan, ctx.group = plan, group
        ctx.halo_like = [x.new_empty(x.shape[0], 0, *x.shape[2:]) for x in (k, v, g)]
        ctx.tail_tokens = k.shape[1]
        ctx.save_for_backward(gathered[..., :1].contiguous(), *(compose_slots(gathered, piece.before) for piece in plan.pieces))
        return q.view_as(q), *_from_bytes(received, ctx.halo_like), slots

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor, d_g: Tensor, d_slots: Tensor) -> tuple[Any, ...]:
        plan: ContextParallelPlan = ctx.plan
        log_decays, *slots_before = ctx.saved_tensors
        received, halo_arrives = _start_all_to_all(_to_bytes(d_k, d_v, d_g), plan.receive_splits, plan.send_splits, ctx.group)
        if plan.pieces:
            slot_gradients, slots_arrive = _start_all_gather(d_slots[None], ctx.group)
            slots_arrive.wait()
            d_pieces = [
                piece_gradient(plan, piece, slot_gradients, log_decays, before)
                for piece, before in zip(plan.pieces, slots_before, strict=True)
            ]
            d_announced = torch.stack(d_pieces)
        else:
            d_announced = d_slots.new_empty(0, *d_slots.shape)
        halo_arrives.wait()
        d_tails = [_sum_sent(plan, gradient, ctx.tail_tokens) for gradient in _from_bytes(received, ctx.halo_like)]
        return None, None, None, d_q, *d_tails, d_announced


@torch.no_grad()  # the derivative is that of `_Exchange`
def _start_halo(plan: ContextParallelPlan, group: dist.ProcessGroup, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, dist.Work]:
    tail = _to_bytes(k, v, g)
    sent = torch.cat([tail[_rows(plan, send.start, send.stop)] for send in plan.sends] or [tail[:0]])
    return _start_all_to_all(sent, plan.send_splits, plan.receive_splits, group)


def _start_all_to_all(
    sent: Tensor, send_splits: list[int], receive_splits: list[int], group: dist.ProcessGroup
) -> tuple[Tensor, dist.Work]:
    received = sent.new_empty(sum(receive_splits), *sent.shape[1:])
    return received, dist.all_to_all_single(received, sent, receive_splits, send_splits, group=group, async_op=True)


def _start_all_gather(own: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work | _Arrived]:
    """[N, ...] of every rank -> [R N, ...] in rank order. Nothing is sent when N is 0, which it then is on every rank."""
    gathered = own.new_empty(group.size() * own.shape[0], *own.shape[1:])
    if own.shape[0] == 0:
        return gathered, _Arrived()
    return gathered, dist.all_gather_into_tensor(gathered, own.contiguous(), group=group, async_op=True)


class _Arrived:
    def wait(self) -> None:
        return None


def _rows(plan: ContextParallelPlan, start: int, stop: int) -> slice:
    """Tokens of the shard as rows of the tail that is sent from."""
    return slice(start - plan.first_sent_token, stop - plan.first_sent_token)


def _sum_sent(plan: ContextParallelPlan, gradients: Tensor, tail_tokens: int) -> Tensor:
    """Gradients [B, sum of sent tokens, ...] returned by the receivers -> gradient of the tail they were sent from."""
    shape = (gradients.shape[0], tail_tokens, *gradients.shape[2:])
    total = gradients.new_zeros(shape, dtype=accumulation_dtype(gradients.dtype))
    parts = gradients.split([send.tokens for send in plan.sends], dim=1) if plan.sends else ()
    for send, part in zip(plan.sends, parts, strict=True):
        total[:, _rows(plan, send.start, send.stop)] += part
    return total.to(gradients.dtype)


def _to_bytes(*tensors: Tensor) -> Tensor:
    """Tensors [B, N, H, .] of any dtypes -> one message [N, bytes of a token], tokens first so that it splits by rank."""
    return torch.cat([x.transpose(0, 1).flatten(1).contiguous().view(torch.uint8) for x in tensors], dim=1)


def _from_bytes(message: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `_to_bytes`; `like` gives shapes (but for the number of tokens) and dtypes."""
    sizes = [x.shape[0] * x.shape[2:].numel() * x.element_size() for x in like]
    parts = message.split(sizes, dim=1)
    return [
        part.contiguous().view(x.dtype).view(message.shape[0], x.shape[0], *x.shape[2:]).transpose(0, 1).contiguous()
        for part, x in zip(parts, like, strict=True)
    ]
