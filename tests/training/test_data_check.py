"""A run looks at its token files before it trains, and writes down what it found."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.distributed import RankPool
from tests.training import small_run


def test_what_was_checked_is_recorded(ranks: RankPool, tmp_path: Path) -> None:
    small_run.write_corpus(tmp_path)
    plain = small_run.settings(tmp_path, training={"steps": 2}, data={"verify": "full"})
    assert ranks.run(2, small_run.pretrain_on_rank, plain=plain) == [None, None]
    record = json.loads((tmp_path / "run" / "data.json").read_text())
    assert record["verify"] == "full" and len(record["files"]) == 4
    for file in record["files"]:
        assert file["checked"] == "full" and file["sha256"] == hashlib.sha256(Path(file["path"]).read_bytes()).hexdigest()


@pytest.mark.parametrize("verify", ["sampled", "sizes"])
def test_a_damaged_file_is_refused_on_all_ranks_before_training(ranks: RankPool, tmp_path: Path, verify: str) -> None:
    small_run.write_corpus(tmp_path)
    tokens = tmp_path / "train.bin"
    content = bytearray(tokens.read_bytes())
    content[100:102] = b"\x05\x00"
    tokens.write_bytes(content)
    messages = ranks.run(2, small_run.pretrain_on_rank, plain=small_run.settings(tmp_path, training={"steps": 2}, data={"verify": verify}))
    if verify == "sizes":  # does not look
        assert messages == [None, None]
        return
    assert messages[0] == messages[1] and "train.bin has other bytes than were written" in messages[0]
    assert not (tmp_path / "run").exists()
