"""A pool of gloo ranks: spawned once, reused by every parallel test.

Starting a Python process that imports torch and Megatron takes seconds; a parallel test takes less. So the ranks
are started on first use from a fork server that has those modules loaded, and wait for tasks on a pipe:

    results = ranks.run(4, "tests.engine.programs:train", layout="tp2_pp2")     # one result per rank

Each task gets a process group of its own through a fresh file store, so tasks do not see each other. A rank that
raises makes the test fail with that rank's traceback; a rank that does not answer in time gets the pool killed, the
test failed with the names of the silent ranks, and the next test a new pool.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import psutil

PRELOAD = ["torch", "torch.distributed", "megatron.core", "megatron.core.models.gpt", "tests.distributed"]

# After one rank has failed, the others are usually stuck in a collective with it. They get this long to answer too,
# so that errors of several ranks are shown together.
GRACE_AFTER_FAILURE_S = 3.0

# A rank that takes so long writes its stack to stderr: if the test fails, or is ended from outside, that says where it hung.
SHOW_STACK_AFTER_S = 45.0


class RankError(RuntimeError):
    """One or more ranks raised, died, or did not answer."""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection


class RankPool:
    """Runs functions on N ranks of one `torch.distributed` process group."""

    def __init__(self) -> None:
        import torch

        # A CUDA context does not survive a fork, and importing Megatron may make one.
        self._context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
        if not torch.cuda.is_available():
            self._context.set_forkserver_preload(PRELOAD)
        self._workers: list[_Worker] = []

    def run(
        self, world_size: int, function: str | Callable[..., Any], *, timeout: float = 120.0, backend: str = "gloo", **kwargs: Any
    ) -> list[Any]:
        """Calls `function(**kwargs)` on every rank of a new process group; returns the results, one per rank.

        `function` is "package.module:name" or a function at the top level of a module. Arguments and results are
        pickled; tensors are copied. Raises `RankError` when a rank raises, dies, or is silent for `timeout` seconds.
        """
        if not isinstance(function, str):
            function = f"{function.__module__}:{function.__qualname__}"
        while len(self._workers) < world_size:
            self._workers.append(self._start_worker(len(self._workers)))
        with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
            for rank in range(world_size):
                task = (function, kwargs, rank, world_size, os.path.join(folder, "store"), backend, timeout)
                try:
                    self._workers[rank].pipe.send_bytes(pickle.dumps(task))
                except (BrokenPipeError, OSError) as error:
                    self.close()
                    raise RankError(f"{function}: rank {rank} of the pool had died before the task") from error
            return self._collect(world_size, function, timeout)

    def _collect(self, world_size: int, function: str, timeout: float) -> list[Any]:
        results: list[Any] = [None] * world_size
        errors: dict[int, str] = {}
        waiting = {self._workers[rank].pipe: rank for rank in range(world_size)}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                try:
                    succeeded, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    self._workers[rank].process.join(5)
                    succeeded, value = False, f"the process died with exit code {self._workers[rank].process.exitcode}"
                if succeeded:
                    results[rank] = value
                else:
                    errors[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE_AFTER_FAILURE_S)
        if not errors and not waiting:
            return results
        silent = sorted(waiting.values())
        self.close()
        message = [f"--- rank {rank} of {world_size} in {function}:\n{text}" for rank, text in sorted(errors.items())]
        if silent and not errors:
            message.append(f"{function}: no answer within {timeout:.0f} s from ranks {silent} of {world_size}; the pool was restarted")
        raise RankError("\n".join(message))

    def _start_worker(self, index: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        # Not a daemon: a rank may start processes itself (Megatron's checkpoint writer does).
        process = self._context.Process(target=_serve, args=(theirs,), name=f"rank{index}", daemon=False)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def close(self) -> None:
        """Kills all ranks and what they have started. The next `run` starts new ones."""
        for worker in self._workers:
            worker.pipe.close()
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(worker.process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()  # Megatron's checkpoint writer has a server that would outlive its rank
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
        self._workers = []


def _serve(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    poison_uninitialised_memory()
    while True:
        try:
            task = pipe.recv_bytes()
        except EOFError:
            return
        try:
            *arguments, timeout = pickle.loads(task)
            faulthandler.dump_traceback_later(min(0.9 * timeout, SHOW_STACK_AFTER_S))
            answer = pickle.dumps((True, _run_task(*arguments, timeout)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
        try:
            pipe.send_bytes(answer)
        except BrokenPipeError:
            return


def _run_task(function: str, kwargs: dict[str, Any], rank: int, world_size: int, store: str, backend: str, timeout: float) -> Any:
    import torch
    import torch.distributed as dist

    module_name, _, name = function.partition(":")
    torch.manual_seed(0)
    with _environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)):
        dist.init_process_group(
            backend,
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            # Longer than the pool's own limit, so that the pool names the silent ranks instead of gloo the waiting ones.
            timeout=timedelta(seconds=timeout + 30),
        )
        dist.barrier()  # a rank that is done at once must not close its sockets while others still connect
        try:
            target = importlib.import_module(module_name)
            for part in name.split("."):
                target = getattr(target, part)
            return target(**kwargs)  # type: ignore[operator]
        finally:
            _forget_process_groups()


def _forget_process_groups() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # engines are cycles; while one lives, so do its groups, each with threads that wake at every message


@contextlib.contextmanager
def _environment(**values: str) -> Any:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def poison_uninitialised_memory() -> None:
    """Makes torch fill what `torch.empty` and its kin return with NaN (integers: their maximum), so that a read of it shows."""
    import torch

    # The fill is part of the deterministic mode; warn_only keeps operators without a deterministic form usable.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
