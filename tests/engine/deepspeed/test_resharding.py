"""A checkpoint of either engine continues the run under either, at any ZeRO stage and in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nha_megatron.checkpoint.safety import read_metadata
from nha_megatron.checkpoint.weights import CheckpointWeights
from tests.distributed import RankPool
from tests.engine.deepspeed.programs import (
    few_threads,  # noqa: F401
    make_engine,
    zero,
)
from tests.engine.programs import micro_batches, tiny_config
from tests.optional import needs_deepspeed

pytestmark = [needs_deepspeed, pytest.mark.usefixtures("few_threads")]

Numbers = list[tuple[float, float]]


def train(engine: Any, steps: range) -> Numbers:
    results = [engine.train_step(micro_batches(engine.config, engine.layout, step), 1e-2) for step in steps]
    return [(result.loss, result.grad_norm) for result in results]


def train_and_save(sections: dict[str, Any], folder: str) -> Numbers:
    """Two updates, a checkpoint, two more updates: the numbers of the last two."""
    engine = make_engine(tiny_config(**sections))
    train(engine, range(2))
    dist_checkpointing.save(engine.sharded_state_dict(is_loading=False), folder)
    return train(engine, range(2, 4))


def load_and_train(sections: dict[str, Any], folder: str) -> Numbers:
    """Other initial weights, everything from the checkpoint, two updates."""
    config = tiny_config(**sections | {"training": sections.get("training", {}) | {"seed": 99}})
    engine = make_engine(config)
    state = dist_checkpointing.load(engine.sharded_state_dict(is_loading=True), folder, strict=StrictHandling.RAISE_ALL)
    engine.load_state_dict(state)
    return train(engine, range(2, 4))


def run(stage: int | None, bf16: bool = False, **parallel: Any) -> dict[str, Any]:
    """Sections of a run: ZeRO `stage`, or the Megatron engine with None."""
    training = {} if stage is None else zero(stage)
    return {"training": {**training, **({"precision": "bf16"} if bf16 else {})}, "parallel": parallel}


def described_run(world: int, sections: dict[str, Any]) -> str:
    training = sections["training"]
    stage = f"zero{training['deepspeed']['zero_optimization']['stage']}" if "deepspeed" in training else "megatron"
    return "_".join([stage, str(world), *sections["parallel"], training.get("precision", "")]).rstrip("_")


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("stage", "bf16"),
    [(1, True), (2, False), (3, False), slow(1, False), slow(2, True), slow(3, True)],
    ids=["1-bf16", "2", "3", "1", "2-bf16", "3-bf16"],
)
def test_the_same_run_continues_bit_for_bit(ranks: RankPool, tmp_path: Path, stage: int, bf16: bool) -> None:
    expected = ranks.run(2, train_and_save, sections=run(stage, bf16), folder=str(tmp_path))
    assert ranks.run(2, load_and_train, sections=run(stage, bf16), folder=str(tmp_path)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_same_tensor_parallel_run_continues_bit_for_bit(ranks: RankPool, tmp_path: Path, stage: int) -> None:
    sections = run(stage, tensor=2, sequence=True)
    expected = ranks.run(4, train_and_save, timeout=300, sections=sections, folder=str(tmp_path))
    assert ranks.run(4, load_and_train, timeout=300, sections=sections, folder=str(tmp_path)) == expected


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        slow((2, run(2)), (2, run(3, context=2))),
        ((2, run(3)), (2, run(None, tensor=2))),
        ((2, run(None)), (2, run(2))),
        slow((2, run(1)), (3, run(2))),
        slow((3, run(3)), (1, run(1))),
        slow((2, run(1, tensor=2)), (4, run(3, tensor=2, sequence=True, context=2))),
        slow((4, run(3, tensor=2)), (2, run(2, context=2))),
        slow((4, run(2, context=2)), (4, run(None, pipeline=2, context=2))),
        slow((2, run(None, pipeline=2)), (2, run(3, tensor=2))),
        slow((2, run(2, bf16=True)), (2, run(None, bf16=True, context=2))),
        slow((2, run(None, bf16=True)), (2, run(3, bf16=True))),
    ],
    ids=lambda case: described_run(*case),
)
def test_another_stage_layout_or_engine_continues_the_run(ranks: RankPool, tmp_path: Path, saved: Any, loaded: Any) -> None:
    (world, sections), (new_world, new_sections) = saved, loaded
    # Rows of a batch: a multiple of both data-parallel sizes.
    for changed in (sections, new_sections):
        changed["training"] |= {"global_batch_size": 12 if 3 in (world, new_world) else 4}
    expected, *_ = ranks.run(world, train_and_save, timeout=300, sections=sections, folder=str(tmp_path))
    # As in the parity tests; without the moments the losses would differ by 1e-2.
    loose = 20 if sections["training"].get("precision") == "bf16" else 1
    for numbers in ranks.run(new_world, load_and_train, timeout=300, sections=new_sections, folder=str(tmp_path)):
        for (loss, grad_norm), (expected_loss, expected_norm) in zip(numbers, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=5e-5 * loose)
            assert grad_norm == pytest.approx(expected_norm, rel=5e-4 * loose)


@pytest.mark.slow
def test_both_engines_write_the_same_tensors(ranks: RankPool, tmp_path: Path) -> None:
    """Names, shapes and types, and after the first updates the weights to rounding: what exporters and `init_from` read."""
    for name, stage in (("megatron", None), ("zero3", 3)):
        (tmp_path / name).mkdir()
        ranks.run(2, train_and_save, sections=run(stage), folder=str(tmp_path / name))
    ours, theirs = CheckpointWeights(tmp_path / "zero3"), CheckpointWeights(tmp_path / "megatron")
    assert set(ours) == set(theirs)
    for name, weight in theirs.items():
        # Two updates of 1e-2 at most; where a gradient is rounding alone, their direction is free.
        assert ours[name].dtype == weight.dtype and ours[name].shape == weight.shape
        assert (ours[name] - weight).norm() <= 1e-4 * weight.norm(), name
    assert described(tmp_path / "zero3") == described(tmp_path / "megatron")


def described(folder: Path) -> dict[str, Any]:
    """Size and type of every tensor in a checkpoint, the optimizer's too."""
    entries = {
        name: (entry.size, entry.properties.dtype)
        for name, entry in read_metadata(folder).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in entries)
    return entries
