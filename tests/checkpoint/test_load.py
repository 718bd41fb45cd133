"""What a run does with the checkpoints it finds: takes the newest sound one, and refuses what it cannot continue from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nha_megatron.checkpoint import load_weights_full, read_manifest
from nha_megatron.config import parse_config
from nha_megatron.estimate.counts import num_parameters
from tests.checkpoint.programs import find_where_one_rank_cannot_read, resume_where_a_rank_cannot_read
from tests.distributed import RankPool
from tests.training import small_run


def start(ranks: RankPool, folder: Path, **sections: dict[str, Any]) -> str | None:
    """Starts the run of `folder` again on one rank, to six steps; returns the message of a refusal."""
    sections["training"] = {"steps": 6, **sections.get("training", {})}
    sections["checkpoint"] = {"every": 2, **sections.get("checkpoint", {})}
    return ranks.run(1, small_run.pretrain_on_rank, plain=small_run.settings(folder, **sections))[0]


def checkpoints(folder: Path) -> list[str]:
    return sorted(entry.name for entry in (folder / "run" / "checkpoints").iterdir())


def test_a_checkpoint_holds_the_whole_model_and_says_where_it_stands(finished_run: Path) -> None:
    manifest = read_manifest(finished_run / "run" / "checkpoints" / "step_4")
    config = parse_config(manifest.config)
    assert (manifest.step, manifest.tokens, manifest.world_size) == (4, 4 * 4 * 32, 2)
    weights = load_weights_full(finished_run / "run")
    # Every parameter is there, in full though two tensor-parallel ranks wrote it, and nothing else.
    assert sum(weight.numel() for weight in weights.values()) == num_parameters(config.model)
    assert weights["decoder.layers.1.self_attention.linear_qkv.weight"].shape == (8 * 8, 32)
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_the_newest_sound_checkpoint_is_taken_and_the_broken_one_replaced(ranks: RankPool, folder: Path) -> None:
    broken = folder / "run" / "checkpoints" / "step_4"
    data = next(broken.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1] + b"\0")
    before = small_run.losses(folder)
    assert start(ranks, folder, training={"steps": 4}) is None
    # Steps 3 and 4 were done again from step 2, on one rank instead of two: equal to rounding (see test_resume).
    assert small_run.losses(folder) == pytest.approx(before, abs=1e-4)
    assert [record["step"] for record in small_run.metrics(folder)] == [1, 2, 3, 4]
    assert checkpoints(folder) == ["latest", "step_2", "step_4"]
    load_weights_full(broken)


def test_what_one_rank_cannot_read_no_rank_takes(ranks: RankPool, folder: Path) -> None:
    root = folder / "run" / "checkpoints"
    reports, newest = [f"skipped: checkpoint {root}/step_4: manifest.json cannot be read: Stale file handle"], str(root / "step_2")
    assert ranks.run(2, find_where_one_rank_cannot_read, root=str(root), name="step_4") == [(reports, newest)] * 2


def test_one_rank_reads_the_manifest_for_all(ranks: RankPool, folder: Path) -> None:
    plain = small_run.settings(folder)
    assert ranks.run(2, resume_where_a_rank_cannot_read, plain=plain, rank=1) == [([], 4)] * 2
    message = f"checkpoint {folder}/run/checkpoints/step_4 cannot be read: Stale file handle: manifest.json"
    assert ranks.run(2, resume_where_a_rank_cannot_read, plain=plain, rank=0) == [([], message)] * 2


def test_leftovers_go_and_old_checkpoints_too(ranks: RankPool, folder: Path) -> None:
    (folder / "run" / "checkpoints" / ".step_6.partial").mkdir()
    assert start(ranks, folder, checkpoint={"keep": 1}) is None
    assert checkpoints(folder) == ["latest", "step_6"]
    assert (folder / "run" / "checkpoints" / "latest").read_text() == "step_6\n"


def test_a_complete_run_is_left_alone(ranks: RankPool, folder: Path) -> None:
    before = (folder / "run" / "metrics.jsonl").read_text()
    assert start(ranks, folder, training={"steps": 4}) is None
    assert (folder / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"num_layers": 3}}, "model.num_layers was 2, is 3"),
        ({"model": {"window": 8, "num_slots": 8}}, "model.num_slots was 4, is 8; model.window was 4, is 8"),
        ({"data": {"sequence_length": 16}}, "data.sequence_length was 32, is 16"),
        ({"training": {"global_batch_size": 8}}, "training.global_batch_size was 4, is 8"),
        ({"optimizer": {"weight_decay": 0.0}}, "optimizer.weight_decay was 0.1, is 0.0"),
        ({"checkpoint": {"resume": False}}, "already holds checkpoints"),
    ],
)
def test_another_run_is_not_continued(ranks: RankPool, folder: Path, sections: dict[str, Any], message: str) -> None:
    refusal = start(ranks, folder, **sections)
    assert refusal is not None and message in refusal
    assert checkpoints(folder) == ["latest", "step_2", "step_4"]


def forget_fields(folder: Path) -> None:
    """The checkpoints of the folder, as if guards.window_steps had its old name and a field of `model` had not been there."""
    for manifest in (folder / "run" / "checkpoints").glob("step_*/manifest.json"):
        content = json.loads(manifest.read_text())
        guards = content["config"]["guards"]
        guards["window"] = guards.pop("window_steps", 64)
        content["config"]["model"].pop("empty_slots", None)
        manifest.write_text(json.dumps(content))


def test_what_an_older_version_did_not_know_or_called_otherwise_is_no_difference(ranks: RankPool, folder: Path) -> None:
    forget_fields(folder)
    assert start(ranks, folder) is None
    forget_fields(folder)
    refusal = start(ranks, folder, model={"empty_slots": "mask"}, training={"steps": 8})
    assert refusal is not None and "model.empty_slots was 'attend', is 'mask'" in refusal


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_layers": 3}, "the checkpoint lacks decoder.layers.2."),
        ({"num_layers": 1}, "the model has no place for decoder.layers.1."),
        ({"num_slots": 8}, "linear_gate.weight"),
    ],
)
def test_weights_of_another_architecture_are_refused(ranks: RankPool, folder: Path, model: dict[str, Any], message: str) -> None:
    new = {"logging": {"directory": str(folder / "new")}, "model": {**model, "init_from": str(folder / "run")}}
    refusal = start(ranks, folder, **new)
    assert refusal is not None and message in refusal


def test_a_wider_window_may_start_from_trained_weights(ranks: RankPool, folder: Path) -> None:
    new = {"logging": {"directory": str(folder / "new")}, "model": {"window": 16, "init_from": str(folder / "run")}}
    assert start(ranks, folder, training={"steps": 2}, **new) is None


def test_a_path_that_cannot_be_written_is_one_message(ranks: RankPool, folder: Path) -> None:
    shutil.rmtree(folder / "run" / "checkpoints")
    (folder / "run" / "checkpoints").write_text("a file in the way")
    refusal = start(ranks, folder)
    assert refusal is not None and "cannot be used" in refusal and "exists" in refusal
