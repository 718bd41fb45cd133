"""A run in stages is its stages one after the other, stops and resumes anywhere, and trains alike in every layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nha_megatron.checkpoint import load_checkpoint, read_manifest
from nha_megatron.config import parse_config
from nha_megatron.data import BatchReader, open_samples
from nha_megatron.engine.device import choose_device
from nha_megatron.engine.layout import create_layout
from nha_megatron.engine.megatron import MegatronEngine
from nha_megatron.training.schedule import learning_rate
from tests.distributed import RankPool
from tests.training import small_run

STEPS = {"steps": 6, "micro_batch_size": 1, "global_batch_size": 4}
# Steps 1 to 3 take 4 x 32 tokens, steps 4 to 6 2 x 64 tokens of a blend, documents apart.
SECOND_STAGE = {"from_tokens": 300, "sequence_length": 64, "global_batch_size": 2, "packing": "concat"}


def settings(folder: Path, name: str, stages: list[dict[str, Any]] | None = None, **sections: Any) -> dict[str, Any]:
    blend = [{"path": str(folder / "train"), "weight": 0.5}, {"path": str(folder / "validation"), "weight": 0.5}]
    if stages is None:
        stages = [{**SECOND_STAGE, "path": blend}]
    training = {**STEPS, "validate_every": 1, "validate_batches": 1, "stages": stages or None, **sections.pop("training", {})}
    checkpoint = {"every": 1, "keep": 10}
    return small_run.settings(
        folder, training=training, checkpoint=checkpoint, logging={"directory": str(folder / name)}, guards={"window_steps": 8}, **sections
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    small_run.write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def whole(ranks: RankPool, folder: Path) -> Path:
    """The two stages on one rank, without interruption."""
    assert ranks.run(1, small_run.pretrain_on_rank, plain=settings(folder, "whole")) == [None]
    return folder / "whole"


def continue_by_hand(plain: dict[str, Any], checkpoint: str) -> list[float]:
    """Program: steps 4 to 6 from a checkpoint of step 3, with nothing of stages but the seed of the second stage's order."""
    second = {"sequence_length": 64, "packing": "concat", "path": plain["training"]["stages"][0]["path"]}
    training = {**plain["training"], "stages": None, "global_batch_size": 2}
    config = parse_config({**plain, "data": {**plain["data"], **second}, "training": training})
    device = choose_device("cpu")
    engine = MegatronEngine(config, device, create_layout(config, device))
    load_checkpoint(Path(checkpoint), engine, read_manifest(Path(checkpoint)).config)
    reader = BatchReader(open_samples(config.data, "train", stage=2), config, 0, 1)
    losses = [engine.train_step(reader.micro_batches(i), learning_rate(4 + i, config.optimizer, 6)).loss for i in range(3)]
    reader.close()
    return losses


def test_two_stages_are_two_runs_chained(ranks: RankPool, folder: Path, whole: Path) -> None:
    # The first stage: a run without stages, stopped after step 3. Its schedule is that of six steps.
    plain = settings(folder, "first", stages=[], training={"steps": 6})
    assert ranks.run(1, small_run.pretrain_on_rank, plain=plain) == [None]
    records = small_run.metrics(folder, "whole")
    assert [record["loss"] for record in records[:3]] == small_run.losses(folder, "first")[:3]
    checkpoint = str(folder / "first" / "checkpoints" / "step_3")
    (by_hand,) = ranks.run(1, continue_by_hand, plain=settings(folder, "whole"), checkpoint=checkpoint)
    assert [record["loss"] for record in records[3:]] == by_hand
    assert [record["tokens"] for record in records] == [128, 256, 384, 512, 640, 768]
    # Another sample length and another order: not the losses of the run that has no second stage.
    assert by_hand != small_run.losses(folder, "first")[3:]


@pytest.mark.parametrize(
    "step", [pytest.param(1, marks=pytest.mark.slow), 3, 5], ids=["inside_the_first", "at_the_boundary", "inside_the_second"]
)
def test_resumed_bit_for_bit(ranks: RankPool, folder: Path, whole: Path, step: int) -> None:
    name = f"resumed_{step}"
    shutil.copytree(whole, folder / name)
    for later in range(step + 1, 7):
        shutil.rmtree(folder / name / "checkpoints" / f"step_{later}")
    assert ranks.run(1, small_run.pretrain_on_rank, plain=settings(folder, name)) == [None]
    ours, theirs = small_run.metrics(folder, name), small_run.metrics(folder, "whole")
    for key in ("step", "tokens", "loss", "grad_norm", "lr", "validation_loss"):
        assert [record[key] for record in ours] == [record[key] for record in theirs], key
    weights, expected = small_run.weights(folder, name), small_run.weights(folder, "whole")
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


# Two layouts sum the same fp32 products in another order, six Adam steps long: as in test_resume.py.
LOSS_TOLERANCE = 1e-4


@pytest.mark.parametrize("parallel", [{"context": 2}, pytest.param({"pipeline": 2}, marks=pytest.mark.slow)], ids=["cp2", "pp2"])
def test_another_layout_trains_alike_through_both_stages(ranks: RankPool, folder: Path, whole: Path, parallel: dict[str, Any]) -> None:
    name = "_".join(parallel)
    assert ranks.run(2, small_run.pretrain_on_rank, plain=settings(folder, name, parallel=parallel)) == [None, None]
    assert small_run.losses(folder, name) == pytest.approx(small_run.losses(folder, "whole"), abs=LOSS_TOLERANCE)
    ours, theirs = ([record["validation_loss"] for record in small_run.metrics(folder, run)] for run in (name, "whole"))
    assert ours == pytest.approx(theirs, abs=LOSS_TOLERANCE)


@pytest.mark.slow
def test_context_parallel_from_the_longer_stage_on(ranks: RankPool, folder: Path, whole: Path) -> None:
    """One rank for the short stage, stopped at its end; two context ranks from the same checkpoint for the long one."""
    shutil.copytree(whole, folder / "moved")
    for later in (4, 5, 6):
        shutil.rmtree(folder / "moved" / "checkpoints" / f"step_{later}")
    assert ranks.run(2, small_run.pretrain_on_rank, plain=settings(folder, "moved", parallel={"context": 2})) == [None, None]
    assert small_run.losses(folder, "moved") == pytest.approx(small_run.losses(folder, "whole"), abs=LOSS_TOLERANCE)
    assert read_manifest(folder / "moved" / "checkpoints" / "step_6").world_size == 2


@pytest.fixture(scope="module")
def widened(ranks: RankPool, folder: Path) -> Path:
    """Two ranks throughout: data parallel in the first stage, context parallel and with recomputation in the second."""
    assert ranks.run(2, small_run.pretrain_on_rank, plain=widening(folder, "widened")) == [None, None]
    return folder / "widened"


def widening(folder: Path, name: str) -> dict[str, Any]:
    plain = settings(folder, name)
    plain["training"]["stages"][0] |= {"context": 2, "recompute": "full"}
    return plain


def test_the_layout_changes_between_stages_in_one_run(folder: Path, whole: Path, widened: Path) -> None:
    ours, theirs = small_run.metrics(folder, "widened"), small_run.metrics(folder, "whole")
    for key in ("loss", "validation_loss"):
        assert [record[key] for record in ours] == pytest.approx([record[key] for record in theirs], abs=LOSS_TOLERANCE), key
    assert [record["tokens"] for record in ours] == [record["tokens"] for record in theirs]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_layout_changes_between_stages_on_gpus(ranks: RankPool, folder: Path) -> None:
    one, two = settings(folder, "one_gpu"), widening(folder, "two_gpus")
    for world, plain in ((1, one), (2, two)):
        plain["training"]["device"] = "cuda"
        assert ranks.run(world, small_run.pretrain_on_rank, backend="nccl", plain=plain) == [None] * world
    # Other kernels and reductions, possibly tf32: as in tests/engine/test_cuda.py.
    assert small_run.losses(folder, "two_gpus") == pytest.approx(small_run.losses(folder, "one_gpu"), rel=2e-3)


@pytest.mark.parametrize(
    "step",
    [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)],
    ids=["before_the_change", "at_the_change", "after_the_change"],
)
def test_resumed_bit_for_bit_around_a_change_of_layout(ranks: RankPool, folder: Path, widened: Path, step: int) -> None:
    name = f"widened_{step}"
    shutil.copytree(widened, folder / name)
    for later in range(step + 1, 7):
        shutil.rmtree(folder / name / "checkpoints" / f"step_{later}")
    assert ranks.run(2, small_run.pretrain_on_rank, plain=widening(folder, name)) == [None, None]
    assert small_run.losses(folder, name) == small_run.losses(folder, "widened")
    weights, expected = small_run.weights(folder, name), small_run.weights(folder, "widened")
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_stages_that_have_begun_cannot_change_and_later_ones_can(ranks: RankPool, folder: Path, whole: Path) -> None:
    shutil.copytree(whole, folder / "changed")
    plain = settings(folder, "changed", [{**SECOND_STAGE, "global_batch_size": 4}])
    plain["training"]["steps"] = 8
    (message,) = ranks.run(1, small_run.pretrain_on_rank, plain=plain)
    assert message is not None and "training.stages that have begun by step 6 were" in message and "'global_batch_size': 2" in message
    # The finished run gets a third stage with a schedule of its own.
    plain = settings(folder, "changed")
    third = {"from_tokens": 768, "global_batch_size": 1, "optimizer": {"lr": 1e-3, "schedule": "constant"}}
    plain["training"] |= {"steps": 8, "stages": [*plain["training"]["stages"], third]}
    assert ranks.run(1, small_run.pretrain_on_rank, plain=plain) == [None]
    records = small_run.metrics(folder, "changed")
    assert [record["tokens"] for record in records[-3:]] == [768, 832, 896] and [record["lr"] for record in records[-2:]] == [1e-3, 1e-3]


def test_token_files_of_a_late_stage_are_looked_for_at_the_start(ranks: RankPool, folder: Path) -> None:
    plain = settings(folder, "absent", [{"from_tokens": 300, "path": str(folder / "nothing")}])
    (message,) = ranks.run(1, small_run.pretrain_on_rank, plain=plain)
    assert message is not None and "nothing" in message
    assert not (folder / "absent").exists()
