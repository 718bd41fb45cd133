"""cuDNN's causal attention through PyTorch, for `full` layers: on Hopper 1.7 times as fast as PyTorch's flash kernel.

As with flash.py, its backward from the merged output and log-sum-exp gives the gradients of the attention's part of a softmax over more.
It takes no window and, through PyTorch, no packed documents, and its backward is not deterministic.
"""

import torch
from torch import Tensor

_CUDNN_CAPABILITIES = {(9, 0)}
_WIDEST_FOR_CUDNN = 128  # channels of a head that its backward takes on every such device


def full_attention_kernel(q: Tensor, v: Tensor, *, one_document: bool) -> str:
    """`cudnn` or `flash`: the kernel of a call with window=None. `one_document`: neither cu_seqlens nor a memory was given."""
    if not one_document or max(q.shape[3], v.shape[3]) > _WIDEST_FOR_CUDNN or not torch.backends.cudnn.is_available():
        return "flash"
    if q.shape[1] < 2 or not torch.backends.cuda.cudnn_sdp_enabled():  # cuDNN takes no single token; the user may have switched it off
        return "flash"
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return "flash"
    on_gpu = q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) in _CUDNN_CAPABILITIES
    return "cudnn" if on_gpu else "flash"


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """q [B, T, HQ, K], k [B, T, H, K], v [B, T, H, V], rotated already. Output, lse [B, T, HQ], and what the backward wants besides."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads_first, None, True, 0.0, True, False, scale=scale
    )
    lse = lse.view(q.shape[0], q.shape[2], q.shape[1])
    return out.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous(), [seed, offset]


def cudnn_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, random_state: list[Tensor | None], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from the merged output and log-sum-exp [B, T, HQ]. `random_state` is that of a dropout of 0."""
    heads_first = (x.transpose(1, 2) for x in (d_out, q, k, v, out))
    lse = lse.transpose(1, 2).contiguous()[..., None]
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *heads_first, lse, *random_state, None, None, None, q.shape[1], k.shape[1], 0.0, True, scale=scale
    )
    dq, dk, dv = (x.transpose(1, 2).contiguous() for x in gradients)
    return dq, dk, dv
