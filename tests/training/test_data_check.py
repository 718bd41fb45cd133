"""A run looks at its token files before it trains, and writes down what it found."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from nha_megatron.training import data_check
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


def pretrain_on_two_nodes(plain: dict[str, Any], second: str, unreadable: bool = False) -> str | None:
    """Program: the whole job, each rank on a node of its own; rank 1 has its copy of the training data at `second`."""
    verify_data = data_check.verify_data
    if dist.get_rank() == 1:
        plain["data"]["path"] = second
        if unreadable:
            verify_data = mock.Mock(side_effect=PermissionError(13, "Permission denied", f"{second}.json"))
    with mock.patch.dict(os.environ, LOCAL_RANK="0"), mock.patch.object(data_check, "verify_data", verify_data):
        return small_run.pretrain_on_rank(plain)


def test_what_is_wrong_on_one_node_alone_is_heard_of_on_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    small_run.write_corpus(tmp_path)
    (tmp_path / "copy").mkdir()
    small_run.write_corpus(tmp_path / "copy")
    second = str(tmp_path / "copy" / "train")
    plain = small_run.settings(tmp_path, training={"steps": 2})

    messages = ranks.run(2, pretrain_on_two_nodes, plain=plain, second=second, unreadable=True)
    assert messages[0] == messages[1] and "token files cannot be read: [Errno 13] Permission denied" in messages[0]

    tokens = tmp_path / "copy" / "train.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    messages = ranks.run(2, pretrain_on_two_nodes, plain=plain, second=second)
    assert messages[0] == messages[1] and f"{tokens} has" in messages[0] and "bytes instead of" in messages[0]
    assert not (tmp_path / "run").exists()
