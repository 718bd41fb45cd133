"""A rank that makes the others wait is named, wherever its delay is. The delays are so large that no clock matters."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.mlp import MLP
from torch.utils._python_dispatch import TorchDispatchMode

from nha_megatron.training.hardware import memory_high_water
from nha_megatron.training.slow_ranks import RankReports, WorkClock, modules_without_collectives, slowest_rank
from nha_megatron.training.stage_data import StageData
from tests.distributed import RankPool
from tests.engine import programs
from tests.training import small_run


def test_ranks_are_compared_with_the_others_of_their_pipeline_stage() -> None:
    # The last pipeline stage has the loss: three times the work, and nobody slow. Rank 1 works a third longer than its peers.
    assert slowest_rank([3.0, 4.0, 3.0, 9.0, 9.0, 9.0], [0, 0, 0, 1, 1, 1]) == (1, pytest.approx(4 / 3), pytest.approx(1.0))
    assert slowest_rank([2.0, 1.0], [0, 0]) == (0, 2.0, 1.0)


def test_a_rank_without_peers_is_compared_with_nobody() -> None:
    assert slowest_rank([1.0], [0]) is None
    assert slowest_rank([1.0, 50.0], [0, 1]) is None
    assert slowest_rank([0.0, 0.0], [0, 0]) == (0, 0.0, pytest.approx(0.0, abs=1e-6))


class Collectives(TorchDispatchMode):
    """Counts collectives, and those that run inside of some modules."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = self.inside = self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.total += 1
            self.inside += self.depth > 0
        return func(*args, **(kwargs or {}))

    def enter(self, *_: Any) -> None:
        self.depth += 1

    def leave(self, *_: Any) -> None:
        self.depth -= 1


def collectives_inside(**sections: Any) -> tuple[int, int, int]:
    """Program: (measured modules, collectives inside of their forward, collectives of the step)."""
    config = programs.tiny_config(**sections)
    engine = programs.make_engine(config)
    modules = list(modules_without_collectives(engine))
    with Collectives() as seen:
        for module in modules:
            module.register_forward_pre_hook(seen.enter)
            module.register_forward_hook(seen.leave)
        engine.train_step(programs.micro_batches(config, engine.layout, 0), 1e-3)
    return len(modules), seen.inside, seen.total


# Measured modules in each of the four layers of the tiny model; a pipeline stage has two layers.
LAYOUTS = {
    "dp2": ({}, 2 * 4),
    "tp2": ({"tensor": 2}, 3 * 4),
    "tp2_sp": ({"tensor": 2, "sequence": True}, 2 * 4),
    "cp2": ({"context": 2}, 4 * 4),
    "pp2": ({"pipeline": 2}, 2 * 2),
}


@pytest.mark.parametrize(("parallel", "modules"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_no_collective_runs_in_what_is_measured(ranks: RankPool, parallel: dict[str, Any], modules: int) -> None:
    for measured, inside, total in ranks.run(2, collectives_inside, parallel=parallel):
        assert (measured, inside) == (modules, 0) and total > 0


def measured_modules(gathers: bool) -> int:
    """Program: how many modules of the tiny model are measured, whether or not they gather their weights."""
    engine = programs.make_engine(programs.tiny_config())
    engine.modules_gather_weights = gathers
    return len(list(modules_without_collectives(engine)))


def test_modules_that_gather_their_weights_are_not_measured(ranks: RankPool) -> None:
    assert [ranks.run(1, measured_modules, gathers=gathers) for gathers in (False, True)] == [[2 * 4], [0]]


def pretrain_with_a_slow_rank(plain: dict[str, Any], rank: int, place: str) -> str | None:
    """Program: the whole job, one rank of which sleeps while it reads its batches, or in every MLP."""

    def sleep() -> None:
        if dist.get_rank() == rank:
            time.sleep(0.5)

    def slow_mlp(module: torch.nn.Module, *_: Any) -> None:
        if isinstance(module, MLP):
            sleep()

    def slow_batches(*arguments: Any) -> Any:
        sleep()
        return training_batches(*arguments)

    training_batches = StageData.training_batches
    if place == "data":
        with mock.patch.object(StageData, "training_batches", slow_batches):
            return small_run.pretrain_on_rank(plain)
    # Hooks of all modules run before those of one, with which the work is measured.
    handle = torch.nn.modules.module.register_module_forward_hook(slow_mlp)
    try:
        return small_run.pretrain_on_rank(plain)
    finally:
        handle.remove()


@pytest.mark.parametrize(("place", "parallel"), [("data", {}), ("data", {"tensor": 2}), ("mlp", {"context": 2})], ids=str)
def test_a_rank_that_sleeps_is_named(ranks: RankPool, tmp_path: Path, place: str, parallel: dict[str, Any]) -> None:
    small_run.write_corpus(tmp_path)
    training = {"steps": 2, "global_batch_size": 2}
    plain = small_run.settings(tmp_path, parallel=parallel, training=training, logging={"every": 2}, optimizer={"warmup_steps": 0})
    assert ranks.run(2, pretrain_with_a_slow_rank, plain=plain, rank=1, place=place) == [None, None]
    first, second = small_run.metrics(tmp_path)
    assert "slowest_rank" not in first  # the interval has two steps
    assert second["slowest_rank"] == 1 and second["slowest_host"] and second["slowest_ratio"] > 1


@pytest.mark.gpu
def test_work_on_a_gpu_is_measured_by_its_clock() -> None:
    device = torch.device("cuda")
    module, x = torch.nn.Linear(4096, 4096, device=device), torch.ones(4096, 4096, device=device)
    seconds = []
    for times in (1, 50):
        clock = WorkClock([module], device)
        clock.start()
        clock.batches_are_read()
        for _ in range(times):
            module(x)
        torch.cuda.synchronize()
        seconds.append(clock.stop())
    # The host returns from all 50 calls long before the device is done with them.
    assert 0 < seconds[0] < seconds[1]
    assert not module._forward_hooks and not module._forward_pre_hooks


def reports(work: dict[int, list[float]], step_seconds: float = 10.0) -> list[str | None]:
    """Program: the lines of successive intervals in which the ranks worked so long, in steps of that many seconds."""
    layout: Any = SimpleNamespace(world_size=2, pp_rank=0, device=torch.device("cpu"), world=dist.group.WORLD)
    ranks = RankReports(layout, ratio=1.5)
    return [ranks.gather(step, seconds, step_seconds)[1] for step, seconds in enumerate(work[dist.get_rank()], 1)]


def test_a_line_says_when_a_rank_becomes_slow(ranks: RankPool) -> None:
    # Not slow, slow, still slow, well again, slow; at last twice as long, and too short to be waited for.
    first, second = ranks.run(2, reports, work={0: [4.0, 4.0, 4.0, 4.0, 4.0, 0.1], 1: [5.0, 8.0, 8.0, 4.0, 8.0, 0.2]})
    assert first == second and [line is not None for line in first] == [False, True, False, False, True, False]
    host = socket.gethostname()
    assert first[1] is not None and first[1].startswith(
        f"step 2: slow rank 1 on host {host}: its own work takes 2.0 times as long as that of the other"
    )
    assert "4 s more of a step of 10 s" in first[1]


def test_memory_is_that_of_the_fullest_rank(ranks: RankPool, tmp_path: Path) -> None:
    small_run.write_corpus(tmp_path)
    plain = small_run.settings(tmp_path, training={"steps": 2})
    own = ranks.run(2, pretrain_with_ballast, plain=plain)
    # Rank 0 writes it, and it is rank 1's, which has more than rank 0 has had at the end.
    assert own[0] < small_run.metrics(tmp_path)[-1]["memory"] <= own[1]


def pretrain_with_ballast(plain: dict[str, Any]) -> int:
    """Program: the whole job, on rank 1 after it has held 400 MB more than any; returns this rank's high-water mark."""
    peak = memory_high_water(torch.device("cpu"))
    all_peaks = torch.tensor([peak])
    dist.all_reduce(all_peaks, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 1:
        resident = peak - all_peaks.item()  # <= 0
        ballast = torch.ones(400_000_000 - int(resident), dtype=torch.uint8)
        ballast.fill_(2)
        del ballast
    assert small_run.pretrain_on_rank(plain) is None
    return memory_high_water(torch.device("cpu"))


def test_steps_of_milliseconds_are_judged_by_three_running(ranks: RankPool) -> None:
    # Half as long again for once, or turn by turn, is the operating system; three times running it is the rank.
    work = {0: [0.2, 0.2, 0.4, 0.2, 0.2, 0.2, 0.2], 1: [0.2, 0.4, 0.2, 0.4, 0.4, 0.4, 0.4]}
    first, _ = ranks.run(2, reports, work=work, step_seconds=0.5)
    assert [line is not None for line in first] == [False] * 5 + [True, False]
