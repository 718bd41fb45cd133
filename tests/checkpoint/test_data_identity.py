"""A run goes on with the data that it began with, wherever that lies now; other data must be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nha_megatron.checkpoint import read_manifest
from nha_megatron.data import TokenFileWriter
from tests.distributed import RankPool
from tests.training import small_run


def write_other_corpus(prefix: Path) -> None:
    with TokenFileWriter(
        prefix, vocab_size=small_run.VOCABULARY, end_of_text=0, tokenizer="none", tokenizer_sha256="0" * 64, source="generated"
    ) as writer:
        for start in range(1, 41):
            writer.add_document(np.append(np.arange(start, start + 40), 0))


def start(ranks: RankPool, folder: Path, **sections: dict[str, Any]) -> str | None:
    """Starts the run of `folder` again, from step 4 to step 6; returns the message of a refusal."""
    sections["training"] = {"steps": 6, **sections.get("training", {})}
    return ranks.run(1, small_run.pretrain_on_rank, plain=small_run.settings(folder, **sections))[0]


def test_the_checkpoint_says_what_was_read(finished_run: Path) -> None:
    data = read_manifest(finished_run / "run" / "checkpoints" / "step_4").data
    assert data is not None
    ((corpus,),) = data["stages"]
    assert corpus["path"] == str(finished_run / "train") and corpus["share"] == 1.0 and len(corpus["bin"]) == len(corpus["idx"]) == 64


def test_moved_data_is_the_same_data(ranks: RankPool, folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    for suffix in (".bin", ".idx", ".json"):
        (folder / f"train{suffix}").rename(folder / "elsewhere" / f"renamed{suffix}")
    assert start(ranks, folder, data={"path": [{"path": str(folder / "elsewhere" / "renamed"), "weight": 3.0}]}) is None


def test_other_content_under_the_same_name_is_refused_and_can_be_accepted(ranks: RankPool, folder: Path) -> None:
    write_other_corpus(folder / "train")
    message = start(ranks, folder)
    assert message is not None and f"{folder / 'train'} (sha256 " in message and " became " in message and "\n" not in message
    assert "from_tokens 512" in message and "checkpoint.other_data=accept" in message
    assert len(small_run.losses(folder)) == 4
    assert start(ranks, folder, checkpoint={"other_data": "accept"}) is None
    assert len(small_run.losses(folder)) == 6


def test_other_shares_of_a_blend_are_refused(ranks: RankPool, folder: Path) -> None:
    write_other_corpus(folder / "other")
    blend = [{"path": str(folder / "train"), "weight": 3.0}, {"path": str(folder / "other"), "weight": 1.0}]
    message = start(ranks, folder, data={"path": blend})
    assert message is not None and "share 1) became" in message and "share 0.75); nothing became" in message


def test_a_stage_may_bring_other_data(ranks: RankPool, folder: Path) -> None:
    write_other_corpus(folder / "other")
    stage = {"from_tokens": 512, "path": str(folder / "other")}
    assert start(ranks, folder, training={"stages": [stage]}) is None
    assert len(small_run.losses(folder)) == 6
    # From now on that stage's data is fixed too.
    message = start(ranks, folder, training={"steps": 8, "stages": [{**stage, "path": str(folder / "train")}]})
    assert message is not None and "stage 2: " in message


@pytest.mark.parametrize("damage", ["", "{}"])
def test_without_a_readable_manifest_nothing_starts(ranks: RankPool, folder: Path, damage: str) -> None:
    (folder / "train.json").write_text(damage)
    message = start(ranks, folder)
    assert message is not None and "manifest" in message
