"""What context ranks send each other for one layer, forward and backward. Two ways, the same on every rank:

    packed     one all-gather of bytes: the pieces (float32) and the last W tokens (keys may be bf16, gates are float32) of every rank.
               Only the next rank reads the tokens, but one message is faster than two where the ranks or the window are few.
    separate   an all-to-all of the tokens that other ranks need, which leaves before the pieces are computed; then an all-gather of the
               pieces. For many ranks, and for windows wider than a shard, whose tokens go to several ranks.

The backward sends the same in reverse: the gradients of the received tokens, and of every rank's initial slots. Nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nha_kernels.conventions import accumulation_dtype

from .cost import packs_halo
from .plan import ContextParallelPlan

Tokens = tuple[Tensor, Tensor, Tensor]  # keys, values, log-gates [B, N, H, .]


class Forward(Protocol):
    """pieces: [pieces of this rank, B, H, M, C], to be filled before `start`."""

    pieces: Tensor

    def start(self) -> None: ...

    def wait(self, halo: Tokens) -> Tensor:
        """Writes the received tokens to `halo`; returns the pieces of all ranks [N, B, H, M, C]."""


class Backward(Protocol):
    def wait(self) -> tuple[Tensor, list[Tokens]]:
        """Gradients of all ranks' initial slots [R, B, H, M, C]; gradients of the tokens of each of `plan.sends`."""


def forward_message(plan: ContextParallelPlan, group: dist.ProcessGroup, tokens: Tokens) -> Forward:
    """tokens: k, v, g of this rank's shard."""
    return (_PackedForward if _packs(plan, tokens) else _SeparateForward)(plan, group, tokens)


def start_backward_message(plan: ContextParallelPlan, group: dist.ProcessGroup, d_slots: Tensor, d_halo: Tokens) -> Backward:
    """d_slots: gradient of this rank's initial slots; d_halo: of the tokens that it received."""
    return (_PackedBackward if _packs(plan, d_halo) else _SeparateBackward)(plan, group, d_slots, d_halo)


def _packs(plan: ContextParallelPlan, like: Tokens) -> bool:
    """Known on every rank alike: documents shorten what a rank receives, but are not asked for."""
    halo_bytes = plan.window * sum(x.shape[0] * x.shape[2:].numel() * x.element_size() for x in like)
    return len(plan.pieces) > 0 and packs_halo(halo_bytes, plan.window, plan.tokens_per_rank, plan.num_ranks)


def mark_used_on_this_stream(*tensors: Tensor) -> None:
    """Tells the allocator that the current stream reads tensors that were made on the stream of the exchange."""
    for x in tensors:
        if x.is_cuda:
            x.record_stream(torch.cuda.current_stream(x.device))


class _MessageFormat:
    """Tensors in one buffer of bytes, each at a multiple of 16 so that kernels may read it as it lies."""

    def __init__(self, parts: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.parts, self.offsets, self.num_bytes = parts, [], 0
        for shape, dtype in parts:
            self.offsets.append(self.num_bytes)
            self.num_bytes += -(-prod(shape) * dtype.itemsize // 16) * 16

    def views(self, buffer: Tensor) -> list[Tensor]:
        """[num_bytes] -> its tensors."""
        return [
            buffer[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for (shape, dtype), offset in zip(self.parts, self.offsets, strict=True)
        ]


def _format(plan: ContextParallelPlan, first: tuple[int, ...], like: Tokens) -> _MessageFormat:
    """Of pieces or gradients of slots, and of W tokens."""
    tokens = [((x.shape[0], plan.window, *x.shape[2:]), x.dtype) for x in like]
    return _MessageFormat([(first, accumulation_dtype(like[0].dtype)), *tokens])


def _gather_bytes(message: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    gathered = message.new_empty(group.size(), *message.shape)
    return gathered, dist.all_gather_into_tensor(gathered.view(-1), message, group=group, async_op=True)


class _PackedForward:
    def __init__(self, plan: ContextParallelPlan, group: dist.ProcessGroup, tokens: Tokens) -> None:
        self.plan, self.group = plan, group
        self.format = _format(plan, _pieces_shape(plan, tokens), tokens)
        self.message = tokens[0].new_empty(self.format.num_bytes, dtype=torch.uint8)
        self.pieces, *tail = self.format.views(self.message)
        for part, x in zip(tail, tokens, strict=True):
            part.copy_(x[:, plan.tokens_per_rank - plan.window :])

    def start(self) -> None:
        self.gathered, self.work = _gather_bytes(self.message, self.group)

    def wait(self, halo: Tokens) -> Tensor:
        self.work.wait()
        mark_used_on_this_stream(self.gathered)
        if self.plan.halo_tokens:
            _, *tail = self.format.views(self.gathered[self.plan.rank - 1])
            for to, part in zip(halo, tail, strict=True):
                to.copy_(part[:, self.plan.window - self.plan.halo_tokens :])
        return _first_of_all_ranks(self.gathered, self.pieces)


class _PackedBackward:
    def __init__(self, plan: ContextParallelPlan, group: dist.ProcessGroup, d_slots: Tensor, d_halo: Tokens) -> None:
        self.plan = plan
        self.format = _format(plan, tuple(d_slots.shape), d_halo)
        message = d_slots.new_empty(self.format.num_bytes, dtype=torch.uint8)
        self.slots, *tail = self.format.views(message)
        self.slots.copy_(d_slots)
        for part, x in zip(tail, d_halo, strict=True):
            part[:, plan.window - plan.halo_tokens :].copy_(x)
        self.gathered, self.work = _gather_bytes(message, group)

    def wait(self) -> tuple[Tensor, list[Tokens]]:
        self.work.wait()
        received = []
        for send in self.plan.sends:
            _, keys, values, log_gates = (x[:, -send.tokens :] for x in self.format.views(self.gathered[send.rank]))
            received.append((keys, values, log_gates))
        return _first_of_all_ranks(self.gathered, self.slots[None]), received


class _SeparateForward:
    def __init__(self, plan: ContextParallelPlan, group: dist.ProcessGroup, tokens: Tokens) -> None:
        self.group = group
        self.pieces = tokens[0].new_empty(_pieces_shape(plan, tokens), dtype=accumulation_dtype(tokens[0].dtype))
        empty = _to_bytes([x[:, :0] for x in tokens])
        sent = torch.cat([_to_bytes([x[:, send.start : send.stop] for x in tokens]) for send in plan.sends] or [empty])
        self.received, self.halo_arrives = _start_all_to_all(sent, plan.send_splits, plan.receive_splits, group)

    def start(self) -> None:
        self.gathered, self.pieces_arrive = _start_all_gather(self.pieces, self.group)

    def wait(self, halo: Tokens) -> Tensor:
        self.halo_arrives.wait()
        for to, part in zip(halo, _from_bytes(self.received, halo), strict=True):
            to.copy_(part)
        if self.pieces_arrive is not None:
            self.pieces_arrive.wait()
        mark_used_on_this_stream(self.received, self.gathered)
        return self.gathered


class _SeparateBackward:
    def __init__(self, plan: ContextParallelPlan, group: dist.ProcessGroup, d_slots: Tensor, d_halo: Tokens) -> None:
        self.plan, self.d_halo = plan, d_halo
        self.received, self.halo_arrives = _start_all_to_all(_to_bytes(d_halo), plan.receive_splits, plan.send_splits, group)
        # Without pieces the slots are empty everywhere, and so is the message.
        self.gathered, self.slots_arrive = _start_all_gather(d_slots[None] if plan.pieces else d_slots.new_empty(0, *d_slots.shape), group)

    def wait(self) -> tuple[Tensor, list[Tokens]]:
        if self.slots_arrive is not None:
            self.slots_arrive.wait()
        self.halo_arrives.wait()
        keys, values, log_gates = (
            x.split([send.tokens for send in self.plan.sends], dim=1) if self.plan.sends else ()
            for x in _from_bytes(self.received, self.d_halo)
        )
        return self.gathered, list(zip(keys, values, log_gates, strict=True))


def _pieces_shape(plan: ContextParallelPlan, tokens: Tokens) -> tuple[int, ...]:
    k, v, g = tokens
    return (len(plan.pieces), g.shape[0], *g.shape[2:], k.shape[-1] + v.shape[-1] + 1)


def _first_of_all_ranks(gathered: Tensor, own: Tensor) -> Tensor:
    """[R, bytes] that begin with a tensor like `own` [N, ...] -> [R N, ...]."""
    first = gathered[:, : own.numel() * own.element_size()].view(own.dtype)
    return first.unflatten(1, own.shape).flatten(0, 1)


def _start_all_to_all(
    sent: Tensor, send_splits: list[int], receive_splits: list[int], group: dist.ProcessGroup
) -> tuple[Tensor, dist.Work]:
    received = sent.new_empty(sum(receive_splits), *sent.shape[1:])
    return received, dist.all_to_all_single(received, sent, receive_splits, send_splits, group=group, async_op=True)


def _start_all_gather(own: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work | None]:
    """[N, ...] of every rank -> [R N, ...] in rank order. Nothing is sent when N is 0, which it then is on every rank."""
    gathered = own.new_empty(group.size() * own.shape[0], *own.shape[1:])
    if own.shape[0] == 0:
        return gathered, None
    return gathered, dist.all_gather_into_tensor(gathered, own.contiguous(), group=group, async_op=True)


def _to_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors [B, N, H, .] of any dtypes -> one message [N, bytes of a token], tokens first so that it splits by rank."""
    return torch.cat([x.transpose(0, 1).flatten(1).contiguous().view(torch.uint8) for x in tensors], dim=1)


def _from_bytes(message: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `_to_bytes`; `like` gives shapes (but for the number of tokens) and dtypes."""
    sizes = [x.shape[0] * x.shape[2:].numel() * x.element_size() for x in like]
    parts = message.split(sizes, dim=1)
    return [
        part.contiguous().view(x.dtype).view(message.shape[0], x.shape[0], *x.shape[2:]).transpose(0, 1)
        for part, x in zip(parts, like, strict=True)
    ]
