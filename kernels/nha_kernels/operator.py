"""The public operator: checks its arguments once, then hands them to a backend."""

import itertools
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .backends import choose_backend
from .chunked import slot_share
from .conventions import EMPTY_SLOTS, EmptySlots, clamp_log_gates, write_strength
from .memory import Memory
from .options import AttentionOptions


@overload
def nha_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    window: int | None,
    rope: Tensor | None = ...,
    rope_attention_factor: float = ...,
    scale: float | None = ...,
    empty_slots: EmptySlots = ...,
    cu_seqlens: Tensor | None = ...,
    memory: Memory | None = ...,
    return_memory: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def nha_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    window: int | None,
    rope: Tensor | None = ...,
    rope_attention_factor: float = ...,
    scale: float | None = ...,
    empty_slots: EmptySlots = ...,
    cu_seqlens: Tensor | None = ...,
    memory: Memory | None = ...,
    return_memory: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Memory]: ...


def nha_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    window: int | None,
    rope: Tensor | None = None,
    rope_attention_factor: float = 1.0,
    scale: float | None = None,
    empty_slots: EmptySlots = "attend",
    cu_seqlens: Tensor | None = None,
    memory: Memory | None = None,
    return_memory: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Memory]:
    """Native Hybrid Attention (arXiv 2510.07019): one softmax over M slots and the last W tokens.

        query t of a document sees   slots <- tokens 0 .. t-W   |   tokens t-W+1 .. t exactly

    Args:
        q: [B, T, HQ, K], before RoPE. HQ is a multiple of H; query head i uses KV head i // (HQ / H).
        k, v: [B, T, H, K] before RoPE, [B, T, H, V] after activation. Same dtype as q.
        g: [B, T, H, M] log-gates <= 0, float32 (float64 with float64 inputs); clamped at -40.
        window: W >= 0, counts the current token; 0 reads slots only; None never writes a slot (full attention).
        rope: inverse frequencies [rotary_dim / 2], rotary_dim <= K: the first rotary_dim channels of the window part rotate,
            halves paired. None: no rotation. Slots are never rotated.
        rope_attention_factor: multiplies the rotated channels of q and of k (YaRN), never the slot logits.
        scale: of all logits, K ** -0.5 by default.
        empty_slots: `attend`, `mask` or `weight`, see `bias_slot_logits`. A query for which nothing holds mass gets 0.
        cu_seqlens: int32 [N + 1] document boundaries, first 0 and last T; needs B = 1. A document sees nothing of another one.
        memory: continue from it; with cu_seqlens it continues the first document.
        return_memory: also return the memory after the last token (of the last document).
        backend: `reference` (token by token), `torch` (chunked), `triton` (CUDA kernels) or `auto` (the fastest that serves the call).

    Returns:
        Output [B, T, HQ, V] in q's dtype, or (output, memory). Differentiable in q, k, v, g and the memory's tensors.

    Raises:
        ValueError: shapes, dtypes or options that do not fit, with what was given and what is allowed.
    """
    options = AttentionOptions(window, rope, rope_attention_factor, scale, empty_slots)
    output, new_memory = attend_and_remember(q, k, v, g, options, cu_seqlens=cu_seqlens, memory=memory, backend=backend)
    return (output, new_memory) if return_memory else output


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    options: AttentionOptions,
    *,
    cu_seqlens: Tensor | None = None,
    memory: Memory | None = None,
    backend: str = "auto",
) -> Tensor:
    """The output of `nha_attention` for a caller that keeps the options of its calls in one object."""
    return attend_and_remember(q, k, v, g, options, cu_seqlens=cu_seqlens, memory=memory, backend=backend)[0]


def attend_and_remember(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    options: AttentionOptions,
    *,
    cu_seqlens: Tensor | None = None,
    memory: Memory | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Memory]:
    """`hybrid_attention` and the memory after the last token."""
    check_arguments(q, k, v, g, options, cu_seqlens, memory)
    chosen = choose_backend("attention", backend, q, k, v, g, options.window)
    if q.shape[0] == 0:  # kernels are not started on nothing
        chosen = choose_backend("attention", "torch")
    assert chosen is not None, "attention goes through nothing else"
    memory = None if memory is None else memory.aligned()
    if not chosen.handles_gates:
        g = clamp_log_gates(g)
    if q.shape[1] == 0:
        output = _KeepInGraph.apply(q.new_zeros(*q.shape[:3], v.shape[-1]), q, k, v, g)
        return output, memory or _empty_memory_like(q, k, v, g, options.window)
    output, new_memory = chosen.load()(q, k, v, g, options, cu_seqlens=cu_seqlens, memory=memory)
    return output if chosen.handles_gates else _KeepInGraph.apply(output, g), new_memory


@torch.no_grad()
def attention_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    options: AttentionOptions,
    *,
    cu_seqlens: Tensor | None = None,
    memory: Memory | None = None,
) -> dict[str, Tensor]:
    """What a layer does with its memory, as scalars on the device. Arguments as `hybrid_attention`.

    Returns:
        slot_share: mean probability that the softmax gives to the slots; mean_decay: mean of exp(g); write_strength: mean of 1 - exp(g).
    """
    check_arguments(q, k, v, g, options, cu_seqlens, memory)
    chosen = choose_backend("statistics", "auto", q, k, v, g, options.window)
    assert chosen is not None, "the torch backend has them"
    memory = None if memory is None else memory.aligned()
    g = clamp_log_gates(g)
    slots, tokens = chosen.load()(q, k, v, g, options, cu_seqlens=cu_seqlens, memory=memory)
    strength = write_strength(g).mean()
    return {"slot_share": slot_share(slots, tokens).mean(), "mean_decay": 1 - strength, "write_strength": strength}


def _empty_memory_like(q: Tensor, k: Tensor, v: Tensor, g: Tensor, window: int | None) -> Memory:
    return Memory.empty(k.shape[0], k.shape[2], g.shape[-1], k.shape[-1], v.shape[-1], window, dtype=q.dtype, device=q.device)


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, options: AttentionOptions, cu_seqlens: Tensor | None, memory: Memory | None
) -> None:
    """Everything that can be told from shapes and dtypes, without waiting for the device."""
    window, rope, empty_slots = options.window, options.rope, options.empty_slots
    if any(x.dim() != 4 for x in (q, k, v, g)):
        raise ValueError(f"q, k, v, g must have 4 axes [B, T, heads, channels], given {[tuple(x.shape) for x in (q, k, v, g)]}")
    batch, num_tokens, num_heads, key_dim = q.shape
    kv_heads = k.shape[2]
    if any(x.shape[:2] != q.shape[:2] for x in (k, v, g)) or v.shape[2] != kv_heads or g.shape[2] != kv_heads or k.shape[3] != key_dim:
        raise ValueError(
            "shapes must be q [B, T, HQ, K], k [B, T, H, K], v [B, T, H, V], g [B, T, H, M], "
            f"given {[tuple(x.shape) for x in (q, k, v, g)]}"
        )
    if kv_heads == 0 or num_heads % kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide over {kv_heads} KV heads: HQ must be a multiple of H")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must share one floating dtype, given {q.dtype}, {k.dtype}, {v.dtype}")
    wanted = torch.float64 if q.dtype == torch.float64 else torch.float32
    if g.dtype != wanted:
        raise ValueError(f"log-gates must be {wanted} with {q.dtype} inputs, given {g.dtype}: a decay near 1 has no digits left in less")
    if window is not None and window < 0:
        raise ValueError(f"window={window}: allowed are 0 (slots only), a positive number of tokens, or None (full attention)")
    if rope is not None and (rope.dim() != 1 or 2 * rope.shape[0] > key_dim):
        raise ValueError(f"rope must be [rotary_dim / 2] with rotary_dim <= K = {key_dim}, given shape {tuple(rope.shape)}")
    if empty_slots not in EMPTY_SLOTS:
        raise ValueError(f"empty_slots={empty_slots!r}: allowed are {', '.join(EMPTY_SLOTS)}")
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens needs B = 1 (documents one after another on the token axis), given B = {batch}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.is_floating_point():
            raise ValueError(f"cu_seqlens must be integers [N + 1] with N >= 1, given {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
        if cu_seqlens.device.type == "cpu" and not _are_boundaries(cu_seqlens.tolist(), num_tokens):
            raise ValueError(f"cu_seqlens must rise from 0 to T = {num_tokens}, given {cu_seqlens.tolist()[:8]} ...")
    if memory is not None:
        memory.check_matches(batch=batch, num_kv_heads=kv_heads, num_slots=g.shape[3], key_dim=key_dim, value_dim=v.shape[3], window=window)


def _are_boundaries(values: list[int], num_tokens: int) -> bool:
    return values[0] == 0 and values[-1] == num_tokens and all(a <= b for a, b in itertools.pairwise(values))


class _KeepInGraph(torch.autograd.Function):
    """Gives tensors that `output` does not depend on a zero gradient, such as gates where nothing is written; otherwise gradient reduction
    would wait for them for ever."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *unused: Tensor) -> Tensor:
        ctx.unused = [(x.shape, {"dtype": x.dtype, "device": x.device}) for x in unused]
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *(torch.zeros(shape, **options) for shape, options in ctx.unused)
