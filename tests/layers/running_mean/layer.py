"""The running mean as the `self_attention` of a Megatron transformer layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nha_kernels.first_order import first_order_only
from nha_megatron.layers.documents import Documents
from tests.layers.running_mean.config import RunningMeanOptions


class RunningMean(MegatronModule):
    """[s, b, h] -> [s, b, h] (s / tp under sequence parallelism); tensor parallelism splits the channels of the mean."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        options: RunningMeanOptions,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        column: dict[str, Any] = {"config": config, "init_method": config.init_method, "gather_output": False, "tp_group": self.tp_group}
        # Held whole by every tensor rank. Under sequence parallelism each sees other tokens: Megatron sums gradients that are marked so.
        self.scale = torch.nn.Parameter(torch.empty(config.hidden_size, dtype=config.params_dtype))
        self.scale.sequence_parallel = config.sequence_parallel
        self.linear_value = build_module(ColumnParallelLinear, config.hidden_size, options.width, bias=False, **column)
        self.linear_forget = build_module(ColumnParallelLinear, config.hidden_size, options.width, bias=True, skip_bias_add=False, **column)
        self.linear_out = build_module(
            RowParallelLinear,
            options.width,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.tp_group,
        )
        self.record_statistics = False
        self.statistics: dict[str, Tensor] | None = None

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, packed_seq_params: Documents | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        hidden_states = hidden_states * self.scale
        value, _ = self.linear_value(hidden_states)
        logits, _ = self.linear_forget(hidden_states)
        forget = torch.sigmoid(logits.float())
        if self.record_statistics:
            self.record_statistics = False
            self.statistics = {"mean_forget": forget.detach().mean()}
        if packed_seq_params is not None and packed_seq_params.boundaries is not None:
            forget = forget * self._inside(packed_seq_params.boundaries, *forget.shape[:2]).to(forget.device)
        mean = running_mean(value.float(), forget, self.cp_group)
        return self.linear_out(mean.to(value.dtype))

    def _inside(self, boundaries: Sequence[int], tokens: int, rows: int) -> Tensor:
        """[s, b, 1]: 0 at the first token of a document, else 1. Boundaries are those of whole rows laid end to end."""
        length = tokens * self.cp_group.size()
        inside = torch.ones(rows * length)
        inside[[start for start in boundaries if start < rows * length]] = 0
        first = self.cp_group.rank() * tokens
        return inside.view(rows, length)[:, first : first + tokens].t().unsqueeze(-1)


def running_mean(value: Tensor, forget: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[s, b, c] of this rank's shard, continued from the ranks before: a shard maps the mean m before it to decay * m + update."""
    mean, decay = torch.zeros_like(value[0]), torch.ones_like(value[0])
    means, decays = [], []
    for v, f in zip(value, forget, strict=True):
        mean, decay = f * mean + (1 - f) * v, f * decay
        means.append(mean)
        decays.append(decay)
    own = torch.stack(means)
    if group.size() == 1:
        return own
    shards = _Gather.apply(torch.stack([decay, mean]), group)
    before = torch.zeros_like(mean)
    for rank in range(group.size()):
        # Every rank uses what all have sent, so that all run the backward; what comes after it counts nothing.
        before = torch.where(torch.tensor(rank < group.rank()), shards[rank, 0] * before + shards[rank, 1], before)
    return own + torch.stack(decays) * before


class _Gather(torch.autograd.Function):
    """[...] of every rank -> [R, ...]; the backward adds up every rank's gradient of this rank's part."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = own.new_empty(group.size(), *own.shape)
        dist.all_gather_into_tensor(gathered.view(-1), own.flatten(), group=group)
        return gathered

    @staticmethod
    @first_order_only("Compute it without context parallelism")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[ctx.group.rank()], None


def attention_spec(options: RunningMeanOptions) -> ModuleSpec:
    return ModuleSpec(module=RunningMean, params={"options": options})
