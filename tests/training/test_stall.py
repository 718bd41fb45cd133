"""A run that stands still ends, and the message names the rank that the others wait for."""

import threading
import time
from dataclasses import replace

import torch.distributed as dist

from nha_megatron.training.stall import Beat, StallWatch, diagnose
from tests.distributed import RankPool


def beats(**changes: dict[str, object]) -> list[Beat]:
    """Three ranks on three hosts in the update of step 5, with changes such as rank1={"phase": "data"}."""
    return [replace(Beat(rank, f"n{rank}", 100 + rank, 7, 5, "update"), **changes.get(f"rank{rank}", {})) for rank in range(3)]


def later(before: list[Beat], *silent: int) -> list[Beat]:
    return [beat if beat.rank in silent else replace(beat, count=beat.count + 2) for beat in before]


def test_a_dead_process_is_named() -> None:
    message = diagnose(beats(), later(beats(), 2), 600)
    assert "no progress for 600 s: ranks wait in phase 'update' of step 5" in message
    assert "missing: rank 2 (host n2, process 102): its process says nothing" in message
    assert message.count("missing:") == 1


def test_a_rank_that_is_alive_but_behind_is_named() -> None:
    before = beats(rank1={"phase": "data"})
    message = diagnose(before, later(before), 600)
    assert "missing: rank 1 (host n1, process 101): alive, but still in phase 'data' of step 5" in message
    assert message.count("missing:") == 1


def test_the_step_counts_before_the_phase() -> None:
    before = beats(rank0={"step": 4, "phase": "checkpoint"})
    message = diagnose(before, later(before), 600)
    assert message.count("missing:") == 1 and "rank 0 (host n0, process 100): alive, but still in phase 'checkpoint' of step 4" in message


def test_no_rank_is_blamed_when_all_are_alive_in_the_same_phase() -> None:
    message = diagnose(beats(), later(beats()), 600)
    assert "missing" not in message and "all 3 ranks are alive" in message and "hosts n0, n1, n2" in message


def stand_still(limit: float, late_rank: int) -> tuple[list[str], float]:
    """On a rank: everybody reaches the update of step 1 but `late_rank`, and nobody goes on."""
    ended, messages, started = threading.Event(), list[str](), time.monotonic()
    with StallWatch(dist.group.WORLD, limit, messages.append, ended.set) as watch:
        watch.enter(1, "data")
        if dist.get_rank() != late_rank:
            watch.enter(1, "update")
        assert ended.wait(60)
    return messages, time.monotonic() - started


def test_one_message_for_all_ranks_and_every_rank_ends(ranks: RankPool) -> None:
    results = ranks.run(3, stand_still, limit=1.0, late_rank=1)
    messages = [message for said, _ in results for message in said]
    assert len(messages) == 1
    assert "missing: rank 1 " in messages[0] and "alive, but still in phase 'data' of step 1" in messages[0]
    assert messages[0].count("missing:") == 1


def moving(limit: float) -> list[str]:
    """On a rank: five phases that together take longer than the limit, each alone does not."""
    messages: list[str] = []
    with StallWatch(dist.group.WORLD, limit, messages.append, lambda: messages.append("ended")) as watch:
        for step in range(5):
            watch.enter(step, "update")
            time.sleep(0.3 * limit)
    return messages


def test_a_run_that_moves_is_left_alone(ranks: RankPool) -> None:
    assert ranks.run(2, moving, limit=3.0) == [[], []]
