"""A checkpoint that cannot be written is one message on every rank, and leaves the ones before as they were."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from nha_megatron.checkpoint import verify
from tests.distributed import RankPool
from tests.training import small_run


def pretrain_with_a_full_disk(plain: dict[str, Any], limit: int) -> str | None:
    """On a rank: no file may grow beyond `limit` bytes, which fails as a full disk does: an OSError in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        return small_run.pretrain_on_rank(plain)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk(ranks: RankPool, folder: Path) -> None:
    plain = small_run.settings(folder, training={"steps": 6}, checkpoint={"every": 2}, parallel={"tensor": 2})
    messages = ranks.run(2, pretrain_with_a_full_disk, plain=plain, limit=30_000)
    for message in messages:
        assert message is not None and "step_6 could not be written" in message and "rank 1: " in message, message
        # The system's words, torch's for a short write, or (megatron-core 0.19) the class alone.
        assert any(words in message for words in ("File too large", "inline_container", "OSError")), message
    assert verify(folder / "run" / "checkpoints" / "step_4").step == 4
    assert (folder / "run" / "checkpoints" / "latest").read_text() == "step_4\n"
    assert not (folder / "run" / "checkpoints" / "step_6").exists()
    # With room again, the same command goes on from there.
    assert ranks.run(2, small_run.pretrain_on_rank, plain=plain) == [None, None]
    assert verify(folder / "run" / "checkpoints" / "step_6").step == 6
