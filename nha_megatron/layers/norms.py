"""RMSNorm in the three places where Megatron's stock norms do not fit.

`RMSNorm` stands at layer boundaries; Megatron's own torch norm refuses sequence parallelism. `HeadRMSNorm` normalises each query or
key head, `HeadsRMSNorm` an attention output over all heads, while tensor parallelism gives each rank only some of the heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from nha_kernels.first_order import first_order_only


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension. Megatron builds it with `(config=, hidden_size=, eps=)`.

    Under sequence parallelism each rank of a TP group sees other tokens, so Megatron must sum the weight's gradient over the group:
    it does so for parameters marked `sequence_parallel`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class HeadRMSNorm(nn.Module):
    """RMSNorm over the channels of each head, one weight [D] for all heads.

    Each TP rank sees only its heads, so the weight's gradient is a partial sum there: the copy region sums it over the group.
    """

    def __init__(self, config: TransformerConfig, head_dim: int, eps: float, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        self.eps = eps
        self.tp_group = tp_group
        self.weight = nn.Parameter(torch.empty(head_dim, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        weight = copy_to_tensor_model_parallel_region(self.weight, group=self.tp_group)
        return F.rms_norm(x, weight.shape, weight, self.eps)


class HeadsRMSNorm(nn.Module):
    """RMSNorm over all heads, exact under tensor parallelism.

    Input and output [..., width / tp]: this rank's heads. The sum of squares is taken over the whole TP group, and so is its
    gradient: with the identity there, the gradient would be wrong without any error. The weight is sharded like its input.
    """

    def __init__(self, config: TransformerConfig, width: int, eps: float, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        assert width % tp_group.size() == 0, f"{width} channels over {tp_group.size()} ranks"
        self.width = width
        self.eps = eps
        self.tp_group = tp_group
        self.weight = nn.Parameter(torch.empty(width // tp_group.size(), dtype=config.params_dtype))
        # Without these marks the gradient norm would count the shard of TP rank 0 only.
        self.weight.tensor_model_parallel = True
        self.weight.partition_dim = 0
        self.weight.partition_stride = 1

    def forward(self, x: Tensor) -> Tensor:
        if self.tp_group.size() == 1:  # one kernel instead of ten passes over the activations
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _ParallelRMSNorm.apply(x, self.weight, self.width, self.eps, self.tp_group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class _ParallelRMSNorm(torch.autograd.Function):
    """y = w x r with r = (sum over all ranks of x^2 / width + eps)^-1/2; dx = r (w dy) - x r^3 / width * sum over all ranks of (w dy x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, width: int, eps: float, group: dist.ProcessGroup) -> Tensor:
        x_fp = _up(x)
        squares = x_fp.square().sum(-1, keepdim=True)
        _sum_over(squares, group)
        inverse_rms = torch.rsqrt(squares / width + eps)
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.width, ctx.group = width, group
        return (x_fp * inverse_rms * _up(weight)).to(x.dtype)

    @staticmethod
    @first_order_only("Compute it without tensor parallelism")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        normalised, dy_fp = _up(x) * inverse_rms, _up(dy)
        dweight = (dy_fp * normalised).flatten(0, -2).sum(0).to(weight.dtype)
        dnormalised = dy_fp * _up(weight)
        projection = (dnormalised * normalised).sum(-1, keepdim=True)
        _sum_over(projection, ctx.group)
        dx = (dnormalised - normalised * (projection / ctx.width)) * inverse_rms
        return dx.to(x.dtype), dweight, None, None, None


def _up(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _sum_over(x: Tensor, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(x, group=group)
