"""A gradient that is not finite on one rank is applied on none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nha_megatron.engine.megatron import MegatronEngine
from nha_megatron.model.parameters import global_parameters
from tests.distributed import RankPool
from tests.engine import programs


def poison_gradient(engine: MegatronEngine, rank: int, pattern: str) -> None:
    """The next backward of `rank` writes NaN into one element of the gradient of a parameter whose name contains `pattern`."""
    if engine.layout.rank == rank:
        parameter = next(parameter for name, parameter in global_parameters(engine.model_chunks) if pattern in name)
        handle = parameter.register_hook(lambda gradient: handle.remove() or gradient.index_fill(0, torch.tensor([0]), math.nan))


def two_steps_second_one_poisoned(rank: int, pattern: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """Program of the rank pool: what steps 1 to 3 report, and whether this rank's weights moved in each."""
    config = programs.tiny_config(**sections)
    engine = programs.make_engine(config)
    results, moved = [], []
    for step in range(3):
        if step == 1:
            poison_gradient(engine, rank, pattern)
        before = [parameter.detach().clone() for _, parameter in engine.named_parameters()]
        results.append(engine.train_step(programs.micro_batches(config, engine.layout, step), 1e-3))
        pairs = zip(before, engine.named_parameters(), strict=True)
        moved.append(not all(torch.equal(old, parameter) for old, (_, parameter) in pairs))
    finite = all(parameter.isfinite().all() for _, parameter in engine.named_parameters())
    return {"skipped": [result.skipped for result in results], "norm": results[1].grad_norm, "moved": moved, "finite": finite}


LAYOUTS = {
    "dp2": ({}, "linear_fc1"),
    "tp2": ({"tensor": 2}, "linear_fc1"),
    # All tensor ranks hold this one, and Megatron's norm looks at the first rank's only.
    "tp2_replicated": ({"tensor": 2}, "pre_mlp_layernorm"),
    "pp2": ({"pipeline": 2}, "linear_fc1"),
    "cp2": ({"context": 2}, "linear_fc1"),
}


SLOW = ("tp2", "pp2")


@pytest.mark.parametrize(
    ("parallel", "pattern"), [pytest.param(*LAYOUTS[name], id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LAYOUTS]
)
def test_all_ranks_skip_the_step_in_which_one_has_a_nan(ranks: RankPool, parallel: dict[str, Any], pattern: str) -> None:
    results = ranks.run(2, two_steps_second_one_poisoned, rank=1, pattern=pattern, parallel=parallel)
    for result in results:
        assert result["skipped"] == [False, True, False]
        assert result["moved"] == [True, False, True]
        assert not math.isfinite(result["norm"]) and result["finite"]


def loss_limits() -> list[tuple[bool, bool]]:
    """Program: whether updates with a limit above and below their loss were skipped, and whether they moved the weights."""
    config = programs.tiny_config()
    engine = programs.make_engine(config)
    weight = next(parameter for _, parameter in engine.named_parameters())
    seen = []
    for limit in (10.0, 1.0):  # the loss of fresh weights is near log(100) = 4.6
        before = weight.detach().clone()
        result = engine.train_step(programs.micro_batches(config, engine.layout, 0), 1e-3, max_loss=limit)
        seen.append((result.skipped, not torch.equal(before, weight)))
    return seen


def test_an_update_above_the_loss_limit_is_not_applied(ranks: RankPool) -> None:
    assert ranks.run(1, loss_limits) == [[(False, True), (True, False)]]
