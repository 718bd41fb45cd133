"""RMSNorm over all heads, split over tensor-parallel ranks, against the formula on one rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nha_megatron.layers.norms import HeadRMSNorm, HeadsRMSNorm, RMSNorm
from tests.distributed import RankPool

CONFIG: Any = SimpleNamespace(params_dtype=torch.float64, sequence_parallel=True)
WIDTH, EPS = 24, 1e-2


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, dy = torch.randn(2, 5, 2, WIDTH, generator=generator, dtype=torch.float64)
    return x, 1 + torch.rand(WIDTH, generator=generator, dtype=torch.float64), dy


def formula() -> tuple[Tensor, Tensor, Tensor]:
    x, weight, dy = inputs()
    x.requires_grad_(), weight.requires_grad_()
    y = weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS)
    y.backward(dy)
    return y.detach(), x.grad, weight.grad  # type: ignore[return-value]


def normalise_shard() -> tuple[Tensor, Tensor, Tensor]:
    world = dist.group.WORLD
    assert world is not None
    x, weight, dy = (tensor.chunk(world.size(), -1)[world.rank()].clone() for tensor in inputs())
    norm = HeadsRMSNorm(CONFIG, WIDTH, EPS, world).double()
    norm.weight.data.copy_(weight)
    x.requires_grad_()
    y = norm(x)
    y.backward(dy)
    return y.detach(), x.grad, norm.weight.grad  # type: ignore[return-value]


@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_norm_over_all_heads_is_exact_under_tensor_parallelism(ranks: RankPool, tp_size: int) -> None:
    for expected, *shards in zip(formula(), *ranks.run(tp_size, normalise_shard), strict=True):
        # float64 up to rounding of a sum of 24 squares.
        torch.testing.assert_close(torch.cat(shards, -1), expected, rtol=1e-12, atol=1e-12)


def test_gradient_by_finite_differences(ranks: RankPool) -> None:
    assert ranks.run(1, check_gradient) == [True]


def check_gradient() -> bool:
    world = dist.group.WORLD
    assert world is not None
    norm = HeadsRMSNorm(CONFIG, WIDTH, EPS, world).double()
    x, weight, _ = inputs()
    norm.weight.data.copy_(weight)
    return torch.autograd.gradcheck(norm, (x[:1].requires_grad_(),))


def per_head_weight_gradient() -> Tensor:
    world = dist.group.WORLD
    assert world is not None
    x, _, dy = inputs()
    heads = x.unflatten(-1, (4, 6)).chunk(world.size(), -2)[world.rank()]
    norm = HeadRMSNorm(CONFIG, 6, EPS, world).double()
    norm.weight.data.fill_(1)
    norm(heads).backward(dy.unflatten(-1, (4, 6)).chunk(world.size(), -2)[world.rank()])
    return norm.weight.grad  # type: ignore[return-value]


def test_weight_of_the_per_head_norm_gets_the_gradient_of_all_heads_on_every_rank(ranks: RankPool) -> None:
    (expected,) = ranks.run(1, per_head_weight_gradient)
    for gradient in ranks.run(2, per_head_weight_gradient):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_boundary_norm_is_marked_for_the_sum_over_sequence_shards() -> None:
    norm = RMSNorm(config=CONFIG, hidden_size=8, eps=EPS)
    assert norm.weight.sequence_parallel
    norm.weight.data.fill_(2)
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(norm(x), 2 * x / torch.sqrt(x.square().mean(-1, keepdim=True) + EPS))
