"""A run that stops and goes on is the run that never stopped: on the same layout bit for bit, on another to rounding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nha_megatron.hf.export import export_to_hf
from tests.distributed import RankPool
from tests.training import small_run

PRETRAIN = "tests.training.small_run:pretrain_on_rank"

# Changes to the small run, by name. Two ranks each.
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "dp2": {},
    "dp2_bf16": {"training": {"precision": "bf16"}},
    "tp2_sp": {"parallel": {"tensor": 2, "sequence": True}},
    "pp2": {"parallel": {"pipeline": 2}},
    "pp2_interleaved": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, "model": {"num_layers": 4}},
    "pp2_tied": {"parallel": {"pipeline": 2}, "model": {"tie_embeddings": True}},
    "cp2": {"parallel": {"context": 2}},
}
SLOW = ("pp2", "pp2_interleaved")  # the default tier has pp2_tied
VALIDATION = {"validate_every": 2, "validate_batches": 2}

# Two layouts sum the same products in another order. fp32 rounds at 6e-8; a few hundred terms, two layers and six Adam
# steps (which turn a relative error of a small gradient into one of the update) leave well below 1e-4 of a loss of 4.5.
LOSS_TOLERANCE = 1e-4


def run(ranks: RankPool, world: int, folder: Path, name: str, **sections: dict[str, Any]) -> None:
    training = {**VALIDATION, **sections.get("training", {})}
    sections = {**sections, "training": training, "logging": {"directory": str(folder / name)}}
    assert ranks.run(world, PRETRAIN, plain=small_run.settings(folder, **sections)) == [None] * world


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    small_run.write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def straight(ranks: RankPool, folder: Path) -> Callable[[str], str]:
    """Makes one of RUNS, six steps without interruption and with checkpoints after steps 3 and 6; returns its name."""
    done: set[str] = set()

    def run_once(name: str) -> str:
        if name not in done:
            run(ranks, 2, folder, name, **RUNS[name])
            done.add(name)
        return name

    return run_once


def cut_after_step_3(folder: Path, name: str, copy: str) -> None:
    """What a run leaves behind that was killed after step 5: the checkpoint of step 3 and metrics beyond it."""
    shutil.copytree(folder / name, folder / copy)
    shutil.rmtree(folder / copy / "checkpoints" / "step_6")
    metrics = folder / copy / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:5]))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RUNS])
def test_same_layout_bit_for_bit(ranks: RankPool, folder: Path, straight: Callable[[str], str], name: str) -> None:
    whole, cut = straight(name), f"{name}_resumed"
    cut_after_step_3(folder, whole, cut)
    run(ranks, 2, folder, cut, **RUNS[name])

    records = [small_run.metrics(folder, name) for name in (cut, whole)]
    assert [record["step"] for record in records[0]] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "lr", "tokens", "validation_loss"):
        assert [record.get(key) for record in records[0]] == [record.get(key) for record in records[1]], key
    ours, theirs = small_run.weights(folder, cut), small_run.weights(folder, whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


TP2_SP = {"tensor": 2, "sequence": True}


@pytest.mark.parametrize(
    ("before", "world", "after"),
    [
        ("dp2", 2, TP2_SP),
        ("cp2", 1, {}),
        ("tp2_sp", 2, {"pipeline": 2}),
        pytest.param("pp2_interleaved", 2, TP2_SP, marks=pytest.mark.slow),
        ("pp2_tied", 2, TP2_SP),
    ],
    ids=["dp2_to_tp2", "cp2_to_one", "tp2_to_pp2", "pp2_interleaved_to_tp2", "pp2_tied_to_tp2"],
)
def test_another_layout_to_rounding(
    ranks: RankPool, folder: Path, straight: Callable[[str], str], before: str, world: int, after: dict[str, Any]
) -> None:
    whole, moved = straight(before), f"{before}_moved"
    cut_after_step_3(folder, whole, moved)
    run(ranks, world, folder, moved, **{**RUNS[before], "parallel": after})
    assert small_run.losses(folder, moved) == pytest.approx(small_run.losses(folder, whole), abs=LOSS_TOLERANCE)


def test_weights_alone_give_another_curve(ranks: RankPool, folder: Path, straight: Callable[[str], str]) -> None:
    """`init_from` takes the weights and nothing else: the first loss is that of step 4's data order position 1, and Adam starts anew."""
    start = folder / straight("dp2") / "checkpoints" / "step_3"
    run(ranks, 1, folder, "fresh", model={"init_from": str(start)}, training={"steps": 3})
    fresh, whole = small_run.metrics(folder, "fresh"), small_run.metrics(folder, "dp2")
    assert [record["step"] for record in fresh] == [1, 2, 3] and fresh[0]["lr"] == whole[0]["lr"]
    assert fresh[0]["loss"] < whole[0]["loss"] - 0.05  # the same batch, seen by a model that has learned for three steps

    # The same weights, exported to Hugging Face format and taken from there: the same run to the last bit.
    export_to_hf(start, folder / "exported", with_tokenizer=False)
    run(ranks, 1, folder, "from_export", model={"init_from": str(folder / "exported")}, training={"steps": 3})
    assert small_run.losses(folder, "from_export") == small_run.losses(folder, "fresh")
