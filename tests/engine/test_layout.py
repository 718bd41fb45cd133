"""Ranks and groups of a grid: tensor fastest, then context, data, pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from nha_megatron.engine.layout import create_layout
from tests.distributed import RankError, RankPool
from tests.engine.programs import CPU, tiny_config


def place(parallel: dict[str, Any]) -> dict[str, Any]:
    layout = create_layout(tiny_config(parallel=parallel), CPU)
    groups = layout.groups
    return {
        "place": (layout.pp_rank, layout.dp_rank, layout.cp_rank, layout.tp_rank),
        "sizes": (layout.pp_size, layout.dp_size, layout.cp_size, layout.tp_size),
        "context group": dist.get_process_group_ranks(groups.cp),
        "gradient group": dist.get_process_group_ranks(groups.dp_cp),
        "last stage": layout.is_last_pipeline_stage,
        "text": layout.describe(),
    }


def test_order_of_ranks(ranks: RankPool) -> None:
    results = ranks.run(8, place, parallel={"tensor": 2, "context": 2, "pipeline": 2})
    assert [result["place"] for result in results] == [(pp, 0, cp, tp) for pp in range(2) for cp in range(2) for tp in range(2)]
    assert {result["sizes"] for result in results} == {(2, 1, 2, 2)}
    assert results[0]["context group"] == results[2]["context group"] == [0, 2]
    assert [result["last stage"] for result in results] == [False] * 4 + [True] * 4
    assert results[0]["text"] == "world 8 = TP 2 x CP 2 x DP 1 x PP 2"


def test_gradients_are_summed_over_data_and_context(ranks: RankPool) -> None:
    results = ranks.run(4, place, parallel={"context": 2})
    assert all(result["gradient group"] == [0, 1, 2, 3] for result in results)
    assert [result["place"][1:3] for result in results] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_world_that_does_not_fit_is_refused(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="ConfigError: world size 2: must be a multiple of tensor 1 x pipeline 1 x context 4"):
        ranks.run(2, place, parallel={"context": 4})


def single_process() -> dict[str, Any]:
    import os

    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    layout = create_layout(tiny_config(), CPU)
    return {"world": layout.world_size, "backend": dist.get_backend(), "random": torch.rand(1).item()}


def test_a_single_process_needs_no_launcher_and_is_seeded(ranks: RankPool) -> None:
    first, second = (ranks.run(1, single_process)[0] for _ in range(2))
    assert first["world"] == 1 and first["backend"] == "gloo"
    assert first == second
