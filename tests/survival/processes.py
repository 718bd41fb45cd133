"""Ranks of a run as processes of their own, one of which is killed with SIGKILL at a chosen moment.

A moment is counted inside the victim, or in seconds from outside:

    tensor n   when the n-th tensor or object is about to be written into a checkpoint
    file n     when the n-th file or folder below the checkpoints is about to be created, renamed or removed
    second t   t seconds after the first step of this start
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

from tests.distributed import _run_task, poison_uninitialised_memory

PATIENCE_S = 600.0
_CREATES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Kill:
    rank: int
    unit: str
    moment: float
    grace: float
    """Seconds that the other ranks get to fail by themselves, before they are killed too."""


def choose_kills(seed: int, count: int, world: int) -> list[Kill]:
    """Two thirds of them during a save."""
    chance = random.Random(seed)
    kills = []
    for _ in range(count):
        rank, unit = chance.randrange(world), chance.choice(("tensor", "file", "second"))
        # Within the first saves: rank 0 writes most tensors and all shared files. Other ranks may write one file of one tensor a save.
        counts = {"tensor": 100, "file": 24} if rank == 0 else {"tensor": 4, "file": 3}
        moment = chance.uniform(0, 1.5) if unit == "second" else chance.randint(1, counts[unit])
        kills.append(Kill(rank, unit, moment, chance.choice((0.0, 0.3))))
    return kills


def run(plain: dict[str, Any], world: int, kill: Kill | None = None) -> bool:
    """Runs `plain` to its end, or until one rank has been killed and the others are gone too; returns whether it was killed.

    Raises AssertionError when a rank ends in another way, or nothing ends in time.
    """
    # A CUDA context does not survive a fork.
    context: Any = multiprocessing.get_context("spawn" if _on_cuda(plain) else "forkserver")
    with tempfile.TemporaryDirectory(prefix="survival_") as folder:
        store = os.path.join(folder, "store")
        processes = [context.Process(target=_rank, args=(plain, rank, world, store, kill)) for rank in range(world)]
        for process in processes:
            process.start()
        try:
            if kill is not None and kill.unit == "second":
                _wait_for_steps(Path(plain["logging"]["directory"]) / "metrics.jsonl", processes)
                time.sleep(kill.moment)
                processes[kill.rank].kill()
            connection.wait([process.sentinel for process in processes], PATIENCE_S)
            if kill is not None:
                processes[kill.rank].join(PATIENCE_S)
                assert processes[kill.rank].exitcode == -signal.SIGKILL, (
                    f"{kill}: rank {kill.rank} ended with {processes[kill.rank].exitcode}"
                )
                connection.wait([process.sentinel for process in processes if process.is_alive()] or [processes[0].sentinel], kill.grace)
                return True
            for process in processes:
                process.join(PATIENCE_S)
            assert [process.exitcode for process in processes] == [0] * world
            return False
        finally:
            for process in processes:
                process.kill()
                process.join()


def _wait_for_steps(metrics: Path, processes: list[Any]) -> None:
    """Until the run has added a step to its metrics."""
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    deadline = time.monotonic() + PATIENCE_S
    while not metrics.exists() or metrics.stat().st_mtime_ns == before:
        assert time.monotonic() < deadline and all(process.is_alive() for process in processes)
        time.sleep(0.01)


def _rank(plain: dict[str, Any], rank: int, world: int, store: str, kill: Kill | None) -> None:
    if kill is not None and kill.rank == rank and kill.unit != "second":
        root = plain["logging"]["directory"] + "/checkpoints"
        strike = _countdown(int(kill.moment))
        if kill.unit == "file":
            sys.addaudithook(lambda event, arguments: strike() if _changes_files(event, arguments, root) else None)
        else:
            _before_every_tensor(strike)
    if _on_cuda(plain):
        poison_uninitialised_memory()  # its deterministic mode is what is wanted: two runs are compared bit for bit
    backend = "nccl" if _on_cuda(plain) else "gloo"
    message = _run_task("tests.training.small_run:pretrain_on_rank", {"plain": plain}, rank, world, store, backend, PATIENCE_S)
    assert message is None, message


def _on_cuda(plain: dict[str, Any]) -> bool:
    return bool(plain["training"]["device"] == "cuda")


def _countdown(count: int) -> Callable[[], None]:
    left = count

    def strike() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return strike


def _changes_files(event: str, arguments: tuple[Any, ...], root: str) -> bool:
    if event == "open":
        path, _, flags = arguments
        return str(path).startswith(root) and bool(flags & _CREATES)
    return event in ("os.mkdir", "os.rename", "os.remove", "shutil.rmtree") and any(root in str(argument) for argument in arguments[:2])


def _before_every_tensor(strike: Callable[[], None]) -> None:
    from nha_megatron.checkpoint import shards

    original = shards._write_item

    def write_item(*arguments: Any) -> Any:
        strike()
        return original(*arguments)

    shards._write_item = write_item
