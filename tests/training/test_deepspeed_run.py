"""Whole runs with `engine: deepspeed`: the Megatron engine's curve, exact resume, export, and weights for other runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nha_megatron.checkpoint import verify
from nha_megatron.hf.export import export_to_hf
from nha_megatron.hf.import_ import load_hf_weights
from tests.distributed import RankPool
from tests.optional import needs_deepspeed
from tests.training import small_run

pytestmark = needs_deepspeed

PRETRAIN = "tests.engine.deepspeed.programs:pretrain"
VALIDATION = {"validate_every": 2, "validate_batches": 2}


def training(stage: int, **fields: Any) -> dict[str, Any]:
    return {"engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage}}, **VALIDATION, **fields}


# Changes to the small run, by name. Two ranks each.
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "megatron": {"training": VALIDATION},
    "zero1": {"training": training(1)},
    "zero2_cp2": {"training": training(2), "parallel": {"context": 2}},
    "zero2_bf16": {"training": training(2, precision="bf16")},
    "zero3_tp2": {"training": training(3), "parallel": {"tensor": 2, "sequence": True}},
}
SLOW = ("zero1", "zero2_bf16", "zero3_tp2")


def run(ranks: RankPool, folder: Path, name: str, sections: dict[str, Any], world: int = 2) -> None:
    sections = {**sections, "logging": {"directory": str(folder / name)}}
    assert ranks.run(world, PRETRAIN, plain=small_run.settings(folder, **sections)) == [None] * world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    small_run.write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def megatron(ranks: RankPool, folder: Path) -> str:
    run(ranks, folder, "megatron", RUNS["megatron"])
    return "megatron"


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RUNS if name != "megatron"])
def test_a_run_interrupted_and_whole(ranks: RankPool, folder: Path, megatron: str, name: str) -> None:
    run(ranks, folder, name, RUNS[name])
    whole = small_run.metrics(folder, name)
    expected = small_run.metrics(folder, megatron)
    # See test_resume.py; in bfloat16 weights have 8 bits, so a loss of 4.5 only two digits after the point.
    tolerance = 1e-2 if "bf16" in name else 1e-4
    for key in ("loss", "validation_loss"):
        assert [record.get(key) for record in whole] == [pytest.approx(record.get(key), abs=tolerance) for record in expected]
    assert [record["tokens"] for record in whole] == [record["tokens"] for record in expected]
    verify(folder / name / "checkpoints" / "step_6")

    # What a run leaves behind that was killed after step 5.
    cut = f"{name}_resumed"
    shutil.copytree(folder / name, folder / cut)
    shutil.rmtree(folder / cut / "checkpoints" / "step_6")
    run(ranks, folder, cut, RUNS[name])
    for key in ("step", "loss", "grad_norm", "lr", "tokens", "validation_loss"):
        assert [record.get(key) for record in small_run.metrics(folder, cut)] == [record.get(key) for record in whole], key
    ours, theirs = small_run.weights(folder, cut), small_run.weights(folder, name)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_the_other_engine_goes_on(ranks: RankPool, folder: Path, megatron: str) -> None:
    """A run of the Megatron engine, stopped after step 3, is finished by ZeRO 3."""
    shutil.copytree(folder / megatron, folder / "switched")
    shutil.rmtree(folder / "switched" / "checkpoints" / "step_6")
    run(ranks, folder, "switched", {"training": training(3)})
    assert small_run.losses(folder, "switched") == pytest.approx(small_run.losses(folder, megatron), abs=1e-4)


def test_export_and_weights_for_another_run(ranks: RankPool, folder: Path) -> None:
    run(ranks, folder, "origin", {"training": training(3, steps=3, validate_every=None)})
    checkpoint = folder / "origin" / "checkpoints" / "step_3"
    export_to_hf(checkpoint, folder / "exported", with_tokenizer=False)

    config = small_run.config(folder)
    exported, saved = load_hf_weights(folder / "exported", config.model), small_run.weights(folder, "origin")
    assert exported.keys() == saved.keys()
    for name, weight in saved.items():  # the export has no rows for the padding of the vocabulary, which stay zero
        assert torch.equal(exported[name], weight) or name.endswith(("word_embeddings.weight", "output_layer.weight")), name

    # New runs from these weights: from the checkpoint, and from the export; under ZeRO, and under Megatron.
    curves = []
    for name, source, sections in (
        ("from_checkpoint", checkpoint, {"training": training(3, steps=2)}),
        ("from_export", folder / "exported", {"training": training(3, steps=2)}),
        ("from_checkpoint_megatron", checkpoint, {"training": {"steps": 2}}),
    ):
        run(ranks, folder, name, {**sections, "model": {"init_from": str(source)}})
        curves.append(small_run.losses(folder, name))
    assert curves[0] == curves[1]
    assert curves[2] == pytest.approx(curves[0], abs=1e-4)
    assert curves[0][0] < small_run.losses(folder, "origin")[0] - 0.05  # a model that has learned for three steps
