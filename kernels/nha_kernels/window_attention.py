"""Exact softmax attention over the last W tokens, in blocks, with its log-sum-exp.

Memory is that of one block of logits for any W: probabilities are recomputed in the backward from the log-sum-exp. The backward is made of
differentiable operations, so second derivatives are right; they keep every block.
"""

from typing import Any

import torch
from torch import Tensor

from .conventions import accumulation_dtype

_QUERY_BLOCK = 64
_KEY_BLOCK = 1024


def window_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attend from the last T rows of a sequence of E rows to at most `window` rows up to and including the own one.

    Args:
        q: [B, T, HQ, K], already rotated. Query t is row E - T + t.
        k, v: [B, E, H, K], already rotated, and [B, E, H, V].
        window: W >= 1, counts the own row.
        documents: [B or 1, E]; rows see only rows of their own document. None: one document.

    Returns:
        Output [B, T, HQ, V] and log-sum-exp of the scaled logits [B, T, HQ], both in the accumulation dtype; differentiable.
    """
    return _WindowAttention.apply(q, k, v, window, scale, documents)


def _blocks(num_queries: int, num_rows: int, window: int) -> list[tuple[slice, list[slice]]]:
    """Query blocks, each with the blocks of rows that its band touches."""
    held = num_rows - num_queries
    plan = []
    for start in range(0, num_queries, _QUERY_BLOCK):
        end = min(start + _QUERY_BLOCK, num_queries)
        first, last = max(0, held + start - window + 1), held + end
        plan.append((slice(start, end), [slice(a, min(a + _KEY_BLOCK, last)) for a in range(first, last, _KEY_BLOCK)]))
    return plan


def _group_heads(x: Tensor, num_kv_heads: int) -> Tensor:
    """[B, C, HQ, D] -> [B, H, R, C, D]."""
    batch, rows, heads, dim = x.shape
    return x.view(batch, rows, num_kv_heads, heads // num_kv_heads, dim).permute(0, 2, 3, 1, 4)


def _ungroup_heads(x: Tensor) -> Tensor:
    """[B, H, R, C, D] -> [B, C, HQ, D]."""
    batch, kv_heads, group, rows, dim = x.shape
    return x.permute(0, 3, 1, 2, 4).reshape(batch, rows, kv_heads * group, dim)


def _block_logits(q: Tensor, k: Tensor, queries: slice, rows: slice, held: int, window: int, scale: float, docs: Tensor | None) -> Tensor:
    """Masked logits [B, H, R, C, S] of one block; q [B, H, R, C, K], k [B, H, 1, S, K]."""
    logits = scale * q @ k.transpose(-1, -2)
    at = torch.arange(held + queries.start, held + queries.stop, device=q.device)[:, None]
    row = torch.arange(rows.start, rows.stop, device=q.device)[None, :]
    visible = (row <= at) & (row > at - window)
    if docs is not None:
        same = docs[:, held + queries.start : held + queries.stop, None] == docs[:, None, rows]
        visible = (visible & same)[:, None, None]
    return logits.masked_fill(~visible, -torch.inf)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, documents: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(q.dtype)
        held = k.shape[1] - q.shape[1]
        out = q.new_empty(*q.shape[:3], v.shape[-1], dtype=dtype)
        logsumexp = q.new_empty(q.shape[:3], dtype=dtype)
        for queries, key_blocks in _blocks(q.shape[1], k.shape[1], window):
            q_block = _group_heads(q[:, queries].to(dtype), k.shape[2])
            largest = q_block.new_full(q_block.shape[:-1], -torch.inf)
            total = torch.zeros_like(largest)
            weighted = q_block.new_zeros(*q_block.shape[:-1], v.shape[-1])
            for rows in key_blocks:  # online softmax
                k_block, v_block = (x[:, rows].to(dtype).permute(0, 2, 1, 3).unsqueeze(2) for x in (k, v))
                logits = _block_logits(q_block, k_block, queries, rows, held, window, scale, documents)
                new_largest = torch.maximum(largest, logits.amax(-1))
                finite = new_largest.clamp(min=torch.finfo(dtype).min)
                p = torch.exp(logits - finite[..., None])
                rescale = torch.exp(largest - finite)
                total = total * rescale + p.sum(-1)
                weighted = weighted * rescale[..., None] + p @ v_block
                largest = new_largest
            out[:, queries] = _ungroup_heads(weighted / total[..., None])
            logsumexp[:, queries] = _ungroup_heads((torch.log(total) + largest)[..., None])[..., 0]
        ctx.save_for_backward(q, k, v, out, logsumexp, *([] if documents is None else [documents]))
        ctx.window, ctx.scale = window, scale
        return out, logsumexp

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_logsumexp: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp, *rest = ctx.saved_tensors
        documents = rest[0] if rest else None
        dtype, kv_heads = out.dtype, k.shape[2]
        held = k.shape[1] - q.shape[1]
        d_q = torch.empty_like(q)
        d_k, d_v = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
        # d(logits) = p * (dp - <d_out, out> + d_logsumexp)
        offset = d_logsumexp - (d_out * out).sum(-1)
        for queries, key_blocks in _blocks(q.shape[1], k.shape[1], ctx.window):
            q_block = _group_heads(q[:, queries].to(dtype), kv_heads)
            d_out_block = _group_heads(d_out[:, queries], kv_heads)
            logsumexp_block = _group_heads(logsumexp[:, queries, :, None], kv_heads)
            offset_block = _group_heads(offset[:, queries, :, None], kv_heads)
            d_q_block = torch.zeros_like(q_block)
            for rows in key_blocks:
                k_block, v_block = (x[:, rows].to(dtype).permute(0, 2, 1, 3).unsqueeze(2) for x in (k, v))
                p = torch.exp(_block_logits(q_block, k_block, queries, rows, held, ctx.window, ctx.scale, documents) - logsumexp_block)
                d_logits = ctx.scale * p * (d_out_block @ v_block.transpose(-1, -2) + offset_block)
                d_q_block += d_logits @ k_block
                d_k[:, rows] += (d_logits.transpose(-1, -2) @ q_block).sum(2).permute(0, 2, 1, 3)
                d_v[:, rows] += (p.transpose(-1, -2) @ d_out_block).sum(2).permute(0, 2, 1, 3)
            d_q[:, queries] = _ungroup_heads(d_q_block).to(q.dtype)
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), None, None, None
