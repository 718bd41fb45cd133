"""A signal to any rank stops all of them after the same step."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from nha_megatron.training.signals import StopRequest
from tests.distributed import RankPool


def steps_until_stop(signalled_rank: int, at_step: int) -> tuple[int, str]:
    """On a rank: counts steps; one rank gets a real SIGTERM in the middle of one."""
    with StopRequest() as stop:
        for step in range(1, 10):
            if dist.get_rank() == signalled_rank and step == at_step:
                os.kill(os.getpid(), signal.SIGTERM)
            stopped_by = stop.agreed(torch.device("cpu"), dist.group.WORLD)
            if stopped_by:
                return step, stopped_by.name
    return 0, ""


def test_one_rank_hears_it_and_all_stop(ranks: RankPool) -> None:
    assert ranks.run(2, steps_until_stop, signalled_rank=1, at_step=3) == [(3, "SIGTERM"), (3, "SIGTERM")]


def test_the_second_signal_acts_as_ever() -> None:
    # What a program has in the foreground; a shell starts its background jobs with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest():
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest():
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) != before
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
