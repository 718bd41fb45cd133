"""Every layout trains the same model: loss, every gradient and a loss curve against one rank with the same weights and data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed import RankPool
from tests.engine.programs import tiny_config, train

TP, SP, PP = {"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}
INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
CP, CP4 = {"context": 2}, {"context": 4}

# name -> (world size, parallel section); what the layouts leave of the world is data parallel.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, TP),
    "tp2_sp": (2, SP),
    "pp2": (2, PP),
    "pp2_interleaved": (2, INTERLEAVED),
    "dp2": (2, {}),
    "cp2": (2, CP),
    "cp4": (4, CP4),
    "tp2_cp2": (4, TP | CP),
    "tp2_sp_cp2": (4, SP | CP),
    "pp2_cp2": (4, PP | CP),
    "interleaved_cp2": (4, INTERLEAVED | CP),
    "tp2_pp2": (4, SP | PP),
    "dp2_tp2": (4, SP),
    "dp2_cp2": (4, CP),
    "dp2_pp2": (4, PP),
    "tp2_pp2_cp2": (8, SP | PP | CP),
    "tp2_interleaved_cp2": (8, SP | INTERLEAVED | CP),
    "dp2_tp2_cp2": (8, SP | CP),
    "dp2_interleaved_cp2": (8, INTERLEAVED | CP),
    "dp2_tp2_pp2_cp2": (16, SP | PP | CP),
    "dp2_tp2_interleaved_cp2": (16, SP | INTERLEAVED | CP),
}
SLOW = {name for name, (world_size, _) in LAYOUTS.items() if world_size > 4}  # three axes at a time, and all at once

# A model as it comes out of a pretrained language model, with every option that a from-scratch model does not use.
CONVERTED = {"qk_norm": "rms", "qkv_bias": True, "output_norm": "none", "value_activation": "none", "empty_slots": "mask"}

# Different models: section -> changed fields, and options of the batches.
VARIANTS: dict[str, tuple[dict[str, dict[str, Any]], dict[str, Any]]] = {
    "default": ({}, {}),
    "uneven_masks": ({}, {"masks": "uneven"}),
    "converted": ({"model": CONVERTED}, {}),
    "tied": ({"model": {"tie_embeddings": True}}, {}),
    "full_layer": ({"model": {"window": "16,full,0,7", "empty_slots": "weight"}}, {}),
    "full_layers_gathered": (
        {
            "model": {"window": "16,full,40,full"},
            "parallel": {"cp_comm_type": "all_gather"},
            "training": {"micro_batch_size": 2, "recompute": "selective"},
        },
        {"documents": True},
    ),
    "documents": ({"training": {"micro_batch_size": 2}}, {"documents": True}),
    # Over a shard of CP 2 (32 tokens), as wide as the sequence, and one token over a shard.
    "wide_windows": ({"model": {"window": "40,3,64,33"}}, {}),
    "recomputed_layers": ({"training": {"micro_batch_size": 2, "recompute": "full"}}, {"documents": True}),
    "recomputed": ({"model": {"window": "40,3,0,7"}, "training": {"micro_batch_size": 2, "recompute": "selective"}}, {"documents": True}),
}


def slow(*values: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="session")
def one_rank(ranks: RankPool) -> Callable[[str], dict[str, Any]]:
    """variant -> result of one rank, run once."""

    @functools.cache
    def run(variant: str) -> dict[str, Any]:
        sections, options = VARIANTS[variant]
        return ranks.run(1, train, config=tiny_config(**sections), **options)[0]

    return run


def run_layout(ranks: RankPool, layout: str, variant: str) -> dict[str, Any]:
    """Result of all ranks of a layout, joined."""
    world_size, parallel = LAYOUTS[layout]
    sections, options = VARIANTS[variant]
    # Eight ranks on two cores that others use too may need minutes.
    config = tiny_config(**sections | {"parallel": parallel | sections.get("parallel", {})})
    return join_stages(ranks.run(world_size, train, timeout=60.0 * max(2, world_size), config=config, **options))


def join_stages(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What all ranks must agree on, and the union of the stages' full tensors."""
    joined = dict(results[0])
    for key in ("losses", "grad_norms", "tokens", "validation"):
        assert all(result[key] == joined[key] for result in results), f"ranks disagree about {key}"
    for key in ("gradients", "weights"):
        joined[key] = {}
        for result in results:
            for name, tensor in result[key].items():
                # Tied embeddings lie on the first and the last stage.
                assert name not in joined[key] or torch.equal(tensor, joined[key][name]), f"stages disagree about {key} of {name}"
                joined[key][name] = tensor
    return joined


def assert_same_training(result: dict[str, Any], expected: dict[str, Any], gradients: float = 5e-6) -> None:
    """Equal but for rounding. `gradients`: allowed relative difference of each."""
    assert result["weights"].keys() == expected["weights"].keys() == result["gradients"].keys()
    for name, weight in expected["weights"].items():
        assert torch.equal(result["weights"][name], weight), f"initial weight {name}"
    assert result["tokens"] == expected["tokens"]
    for name, gradient in expected["gradients"].items():
        difference = (result["gradients"][name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        # fp32 sums of 256 tokens in another order: about sqrt(256) * 6e-8 = 1e-6 a layer, times 4 layers.
        assert difference < gradients, f"gradient of {name}: relative difference {difference:.1e}"
    # One number, summed over 256 tokens of loss about 5.
    assert result["losses"][0] == pytest.approx(expected["losses"][0], rel=2e-6)
    # Adam divides by the gradient's size, so that rounding of the smallest gradients moves weights: 1e-3 * 1e-2 of them a step at most.
    assert result["losses"] == pytest.approx(expected["losses"], rel=5e-5)
    assert result["grad_norms"] == pytest.approx(expected["grad_norms"], rel=5e-4)
    assert result["validation"] == pytest.approx(expected["validation"], rel=5e-5)


@pytest.mark.parametrize("layout", [slow(name) if name in SLOW else name for name in LAYOUTS])
def test_layout_trains_like_one_rank(ranks: RankPool, one_rank: Callable[[str], dict[str, Any]], layout: str) -> None:
    assert_same_training(run_layout(ranks, layout, "default"), one_rank("default"))


@pytest.mark.parametrize(
    ("layout", "variant"),
    [
        ("tp2_sp", "converted"),
        ("pp2", "tied"),
        ("dp2", "uneven_masks"),
        ("cp2", "uneven_masks"),
        ("tp2", "full_layer"),
        ("cp2", "full_layer"),
        ("tp2_cp2", "full_layer"),
        ("cp2", "full_layers_gathered"),
        ("tp2_sp", "documents"),
        ("cp2", "documents"),
        ("cp2", "wide_windows"),
        slow("cp2", "converted"),
        slow("tp2", "tied"),
        slow("pp2_interleaved", "tied"),
        slow("dp2_pp2", "tied"),
        slow("tp2_pp2_cp2", "uneven_masks"),
        slow("tp2_pp2_cp2", "converted"),
        slow("tp2_pp2_cp2", "tied"),
        slow("pp2", "documents"),
        slow("cp4", "wide_windows"),
        slow("cp4", "recomputed"),
        slow("tp2_pp2_cp2", "documents"),
        slow("tp2_interleaved_cp2", "recomputed"),
        slow("dp2_tp2_cp2", "recomputed"),
        slow("tp2_pp2_cp2", "recomputed_layers"),
        slow("dp2_tp2_cp2", "recomputed_layers"),
        slow("tp2_interleaved_cp2", "recomputed_layers"),
        slow("dp2_tp2_pp2_cp2", "recomputed_layers"),
        slow("dp2_tp2_pp2_cp2", "full_layers_gathered"),
        slow("pp2_interleaved", "full_layer"),
        slow("cp4", "full_layer"),
        slow("tp2_pp2_cp2", "full_layer"),
        slow("cp4", "full_layers_gathered"),
        slow("tp2_interleaved_cp2", "full_layers_gathered"),
    ],
)
def test_variant_trains_like_one_rank(ranks: RankPool, one_rank: Callable[[str], dict[str, Any]], layout: str, variant: str) -> None:
    assert_same_training(run_layout(ranks, layout, variant), one_rank(variant))
