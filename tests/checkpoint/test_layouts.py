"""Resharding moves data and changes none of it: weights, both moments, fp32 copies, step, position, schedule, random state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nha_megatron.checkpoint import read_manifest
from nha_megatron.checkpoint.safety import require_plain_data
from tests.checkpoint.layout_programs import begin, move
from tests.distributed import RankPool

Layout = tuple[int, dict[str, Any]]
ONE: Layout = (1, {})
CHAIN: dict[str, Layout] = {
    "dp2": (2, {}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "cp2": (2, {"context": 2}),
    "dp2_tp2": (4, {"tensor": 2}),
    "pp2_interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "tp2_cp2": (4, {"tensor": 2, "context": 2}),
    "dp4": (4, {}),
    "pp2_dp2": (4, {"pipeline": 2}),
    "back": ONE,
}


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Everything in the checkpoint's tensor files, whole."""
    entries = require_plain_data(checkpoint).state_dict_metadata
    whole = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in entries.items() if isinstance(e, TensorStorageMetadata)}
    dcp.load(whole, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    return whole


SHORT = ("dp2", "tp2_sp", "pp2", "cp2", "pp2_interleaved", "back")


@pytest.mark.parametrize(
    ("chain", "precision", "model"),
    [
        pytest.param(SHORT, "fp32", {}, id="fp32-short"),
        pytest.param(tuple(CHAIN), "fp32", {}, id="fp32", marks=pytest.mark.slow),
        pytest.param(tuple(CHAIN), "bf16", {}, id="bf16", marks=pytest.mark.slow),
        pytest.param(tuple(CHAIN), "fp32", {"tie_embeddings": True}, id="tied", marks=pytest.mark.slow),
    ],
)
def test_through_other_layouts_and_back(
    ranks: RankPool, tmp_path: Path, chain: tuple[str, ...], precision: str, model: dict[str, Any]
) -> None:
    sections = {"training": {"precision": precision}, "model": model}
    (curve,) = ranks.run(1, begin, root=str(tmp_path / "start"), parallel={}, **sections)
    source = tmp_path / "start" / "step_2"
    first = tensors(source)
    assert {name.split(".")[0] for name in first} >= {"decoder", "optimizer", "rng_state"}
    for name in chain:
        world, parallel = CHAIN[name]
        updates = 3 if name == "back" else 0
        results = ranks.run(world, move, source=str(source), root=str(tmp_path / name), parallel=parallel, updates=updates, **sections)
        assert all(counted == {2.0} for _, counted in results), name
        source = tmp_path / name / "step_2"
        moved = tensors(source)
        assert moved.keys() == first.keys(), name
        differing = [key for key in first if key != "rng_state" and not torch.equal(moved[key], first[key])]
        assert differing == [], name
        manifest = read_manifest(source)
        assert (manifest.step, manifest.tokens, manifest.world_size) == (2, read_manifest(tmp_path / "start" / "step_2").tokens, world)
    # The loss and the learning rate of the next updates, bit for bit.
    assert results[0][0] == curve[2:]


def test_random_state_follows_its_rank(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, begin, root=str(tmp_path / "start"), parallel={})
    before = tensors(tmp_path / "start" / "step_2")["rng_state"]
    assert before.shape[0] == 2 and not torch.equal(before[0], before[1])
    for name, (world, parallel) in {"tp2": (2, {"tensor": 2}), "one": ONE}.items():
        ranks.run(world, move, source=str(tmp_path / "start" / "step_2"), root=str(tmp_path / name), parallel=parallel)
    assert torch.equal(tensors(tmp_path / "tp2" / "step_2")["rng_state"], before)
    # With another number of ranks the generators stay as seeded; nothing in training draws from them.
    assert tensors(tmp_path / "one" / "step_2")["rng_state"].shape[0] == 1
