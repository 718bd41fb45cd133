"""Dense stand-ins, on the CPU, for flash attention and for the two packages' entry points with their published signatures."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, queries: Tensor, rows: Tensor, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q [Tq, HQ, K], k, v [Tk, H, .], sequence boundaries. Output [Tq, HQ, V] and log-sum-exp [HQ, Tq]."""
    logits = _logits(q, k, queries, rows, window, scale)
    values = torch.nan_to_num(v.repeat_interleave(q.shape[1] // v.shape[1], dim=1))
    return torch.einsum("hte,ehv->thv", logits.softmax(-1), values).contiguous(), logits.logsumexp(-1)


def dense_gradients(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    queries: Tensor,
    rows: Tensor,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a flash kernel computes from the out [Tq, HQ, V] and lse [HQ, Tq] it is given, here those of slots and window together."""
    group = q.shape[1] // k.shape[1]
    keys, values = (torch.nan_to_num(x.repeat_interleave(group, dim=1)) for x in (k, v))
    p = torch.exp(_logits(q, k, queries, rows, window, scale) - lse[..., None])
    offset = (d_out * out).sum(-1).t()[..., None]
    d_logits = scale * p * (torch.einsum("thv,ehv->hte", d_out, values) - offset)
    dk = torch.einsum("hte,thk->ehk", d_logits, q).unflatten(1, (-1, group)).sum(2)
    dv = torch.einsum("hte,thv->ehv", p, d_out).unflatten(1, (-1, group)).sum(2)
    return torch.einsum("hte,ehk->thk", d_logits, keys), dk, dv


def _logits(q: Tensor, k: Tensor, queries: Tensor, rows: Tensor, window: int | None, scale: float) -> Tensor:
    """[HQ, Tq, Tk], -inf where the mask of flash attention hides: causal, aligned at the ends of each sequence."""
    k = torch.nan_to_num(k.repeat_interleave(q.shape[1] // k.shape[1], dim=1))
    logits = scale * torch.einsum("thk,ehk->hte", q, k)
    visible = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    edges = zip(*(pair for x in (queries, rows) for pair in (x.tolist()[:-1], x.tolist()[1:])), strict=True)
    for first_q, last_q, first_k, last_k in edges:
        lag = (last_k - torch.arange(first_k, last_k))[None] - (last_q - torch.arange(first_q, last_q))[:, None]
        visible[first_q:last_q, first_k:last_k] = (lag >= 0) & (lag < (window or 10**9))
    return logits.masked_fill(~visible, -torch.inf)


def _window(left: int | None, right: int | None, causal: bool) -> int | None:
    """W, from the arguments of flash kernels."""
    assert causal and right == 0
    return None if left is None or left < 0 else left + 1


def _even(q: Tensor) -> Tensor:
    return torch.arange(0, (q.shape[0] + 1) * q.shape[1], q.shape[1])


def _heads_first(lse: Tensor, q: Tensor) -> Tensor:
    """[HQ, B*T] -> [B, HQ, T]."""
    return lse.view(lse.shape[0], q.shape[0], q.shape[1]).transpose(0, 1).contiguous()


def flash_attn_interface() -> ModuleType:
    """flash_attn/flash_attn_interface.py of 2.8.3, the entry points below its autograd functions, in their order of arguments."""
    module = ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        return_softmax: bool,
    ) -> tuple[Tensor, ...]:
        assert dropout_p == softcap == 0.0 and alibi_slopes is None and not return_softmax
        window = _window(window_size_left, window_size_right, causal)
        out, lse = dense_attention(*(x.flatten(0, 1) for x in (q, k, v)), _even(q), _even(k), window, softmax_scale)
        return out.view_as(q), _heads_first(lse, q), q.new_empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_varlen_forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        return_softmax: bool = False,
        block_table: Tensor | None = None,
        leftpad_k: Tensor | None = None,
        seqused_k: Tensor | None = None,
        zero_tensors: bool = False,
    ) -> tuple[Tensor, ...]:
        _check_edges(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        window = _window(window_size_left, window_size_right, causal)
        out, lse = dense_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, window, softmax_scale)
        return out, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        rng_state: Tensor | None = None,
    ) -> Tensor:
        assert softmax_lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and softmax_lse.is_contiguous()
        window = _window(window_size_left, window_size_right, causal)
        flat = [x.flatten(0, 1) for x in (dout, q, k, v, out)]
        gradients = dense_gradients(*flat, softmax_lse.transpose(0, 1).flatten(1), _even(q), _even(k), window, softmax_scale)
        for target, gradient in zip((dq, dk, dv), gradients, strict=True):
            target.copy_(gradient.view_as(target))
        return softmax_lse

    def _flash_attn_varlen_backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor | None,
        dk: Tensor | None,
        dv: Tensor | None,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        rng_state: Tensor | None = None,
        zero_tensors: bool = False,
    ) -> Tensor:
        _check_edges(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        assert softmax_lse.shape == (q.shape[1], q.shape[0]) and softmax_lse.is_contiguous()
        window = _window(window_size_left, window_size_right, causal)
        gradients = dense_gradients(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, window, softmax_scale)
        for target, gradient in zip((dq, dk, dv), gradients, strict=True):
            target.copy_(gradient)
        return softmax_lse

    for function in (_flash_attn_forward, _flash_attn_varlen_forward, _flash_attn_backward, _flash_attn_varlen_backward):
        setattr(module, function.__name__, function)
    return module


def cute_interface() -> ModuleType:
    """flash_attn/cute/interface.py of flash-attn-4 4.0.0b36: its two entry points, without the arguments that we do not pass."""
    package, module = ModuleType("flash_attn.cute"), ModuleType("flash_attn.cute.interface")
    package.interface = module

    def _flash_attn_fwd(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        return_lse: bool = False,
    ) -> tuple[Tensor | None, ...]:
        assert return_lse and softmax_scale is not None
        window = _window(window_size_left, window_size_right, causal)
        if cu_seqlens_q is None:
            out, lse = dense_attention(*(x.flatten(0, 1) for x in (q, k, v)), _even(q), _even(k), window, softmax_scale)
            return out.view_as(q), _heads_first(lse, q), None, None, None
        _check_edges(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return *dense_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, window, softmax_scale), None, None, None

    def _flash_attn_bwd(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        softcap: float = 0.0,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        deterministic: bool = False,
        dq: Tensor | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
        dlse: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        window = _window(window_size_left, window_size_right, causal)
        if cu_seqlens_q is None:
            assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
            flat = [x.flatten(0, 1) for x in (dout, q, k, v, out)]
            gradients = dense_gradients(*flat, lse.transpose(0, 1).flatten(1), _even(q), _even(k), window, softmax_scale)
            return tuple(d.view(x.shape) for d, x in zip(gradients, (q, k, v), strict=True))
        _check_edges(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        assert lse.shape == (q.shape[1], q.shape[0])
        return dense_gradients(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, window, softmax_scale)

    module._flash_attn_fwd, module._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    return package


def _check_edges(queries: Tensor, rows: Tensor, longest_query: int, longest_row: int) -> None:
    assert queries.dtype == rows.dtype == torch.int32 and queries.shape == rows.shape
    assert (queries.diff() >= 0).all() and (rows.diff() >= 0).all()
    assert queries.diff().max() <= longest_query and rows.diff().max() <= longest_row
