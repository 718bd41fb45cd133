"""The rank pool itself: results in order, failures and silence reported, usable afterwards."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankError, RankPool


def sum_of_ranks(offset: int) -> tuple[int, float]:
    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    return os.getpid(), value.item()


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("this rank is unhappy")
    dist.barrier()


def silent_on_rank_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def read_uninitialised() -> bool:
    return bool(torch.empty(100).isnan().all())


def test_results_come_back_in_rank_order_and_processes_are_reused(ranks: RankPool) -> None:
    first = ranks.run(3, sum_of_ranks, offset=1)
    second = ranks.run(2, "tests.test_distributed:sum_of_ranks", offset=0)
    assert [value for _, value in first] == [6.0, 6.0, 6.0]
    assert [value for _, value in second] == [1.0, 1.0]
    assert [pid for pid, _ in first[:2]] == [pid for pid, _ in second]


def test_traceback_of_the_failing_rank_is_raised_and_the_pool_recovers(ranks: RankPool) -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2(.|\n)*this rank is unhappy"):
        ranks.run(2, fail_on_rank_one)
    assert ranks.run(2, sum_of_ranks, offset=0)[0][1] == 1.0


def test_silent_ranks_are_named() -> None:
    pool = RankPool()
    with pytest.raises(RankError, match=r"ranks \[1\] of 2"):
        pool.run(2, silent_on_rank_one, timeout=4.0)


def test_uninitialised_memory_is_nan(ranks: RankPool) -> None:
    assert torch.empty(100).isnan().all()
    assert ranks.run(1, read_uninitialised) == [True]
