"""Sizes and costs of a running-mean layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nha_megatron.layers.kind import ModelShape, RankShape, Weight, dense_flops
from tests.layers.running_mean.config import RunningMeanOptions

if TYPE_CHECKING:
    import torch


def weights(o: RunningMeanOptions, model: ModelShape) -> tuple[Weight, ...]:
    def bias(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Logits of f so that channels average over 1 to `longest` tokens: f = 1 - 1 / tokens."""
        import torch

        tokens = 1 + torch.rand(shape, generator=generator, device=generator.device) * (o.longest - 1)
        return torch.log(tokens - 1 + 1e-3)

    return (
        Weight("scale", (model.hidden_size,), initial="ones", decayed=False, sharded=False),
        Weight("linear_value.weight", (o.width, model.hidden_size)),
        Weight("linear_forget.weight", (o.width, model.hidden_size)),
        Weight("linear_forget.bias", (o.width,), initial=bias, decayed=False),
        Weight("linear_out.weight", (model.hidden_size, o.width), initial="residual"),
    )


def flops(o: RunningMeanOptions, model: ModelShape) -> float:
    return 3 * dense_flops(o.width, model.hidden_size) + 3 * o.width


def state_bytes(o: RunningMeanOptions) -> int:
    return 4 * o.width


def kept_bytes(o: RunningMeanOptions, rank: RankShape) -> int:
    """v, the logits of f, f and m."""
    return rank.tokens * 4 * o.width * rank.element_bytes // rank.tensor


def sent_bytes(o: RunningMeanOptions, rank: RankShape) -> int:
    """Decay and mean of a shard, in fp32."""
    return rank.micro_batch_size * 2 * o.width // rank.tensor * 4
