"""Ends a run that stands still, and names the rank that it waits for.

A rank that freezes leaves all others waiting inside a collective, for as long as the backend's timeout lets them, and the
backend can only name the ranks that wait. Here a thread of every rank says through the group's key-value store that its
process lives, and which phase of which step its main thread is in. When a main thread has been in one phase for too long,
its rank compares what the others said last:

    a process whose counter no longer moves            is dead, stopped, or cut off from the network
    a rank in an earlier phase than the most advanced  is the one the others wait for (its disk, its data, its kernel)
    all alive in the same phase                        a collective hangs in the network or on a device: no rank to name

The process then ends, so that the launcher sees a failure and starts the ranks again from the newest checkpoint.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch.distributed as dist

PHASES = ("data", "update", "validation", "checkpoint")
"""Parts of one step, in the order in which a rank passes them."""

LONGEST_INTERVAL_S = 10.0


@dataclass(frozen=True)
class Beat:
    """What one rank said last."""

    rank: int
    host: str
    pid: int
    count: int
    step: int
    phase: str

    @property
    def position(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase)

    def where(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"


def diagnose(before: Sequence[Beat], after: Sequence[Beat], seconds: float) -> str:
    """The message about a run in which nothing moved for `seconds`, from what every rank said at two moments some intervals apart."""
    silent = [late for early, late in zip(before, after, strict=True) if late.count == early.count]
    speaking = [beat for beat in after if beat not in silent]
    front = max(beat.position for beat in after)
    behind = [beat for beat in speaking if beat.position < front]
    step, phase = front[0], PHASES[front[1]]
    lines = [f"error: no progress for {seconds:.0f} s: ranks wait in phase '{phase}' of step {step}"]
    lines += [
        f"missing: {beat.where()}: its process says nothing any more, last heard in phase '{beat.phase}' of step {beat.step}"
        for beat in silent
    ]
    lines += [f"missing: {beat.where()}: alive, but still in phase '{beat.phase}' of step {beat.step}" for beat in behind]
    if not silent and not behind:
        hosts = ", ".join(sorted({beat.host for beat in after}))
        lines.append(f"all {len(after)} ranks are alive in that phase: a collective hangs in the network or on a device of hosts {hosts}")
    return "\n".join(lines)


class StallWatch:
    """Watches this rank's main thread and, together with the other ranks' watches, the run.

        with StallWatch(group, limit=600) as watch:
            for step in ...:
                watch.enter(step, "data")
                ...

    Making one is collective over `group`.

    Args:
        group: all ranks of the job, whose key-value store is used.
        limit: seconds that the main thread may stay in one phase.
        say: called on one rank, with the message.
        end: called in the watching thread of every rank that stood still, after the message was said.
    """

    def __init__(
        self, group: dist.ProcessGroup, limit: float, say: Callable[[str], None] | None = None, end: Callable[[], None] | None = None
    ) -> None:
        self._rank, self._world_size = group.rank(), group.size()
        self._limit = limit
        self._interval = min(limit / 10, LONGEST_INTERVAL_S)
        self._say = say or _print_error
        self._end = end or _end_process
        self._place = (0, PHASES[0])  # written by the main thread only, in one assignment
        self._count = 0  # of the watching thread
        self._since = time.monotonic()
        self._stopping = threading.Event()
        # A connection of its own: the group's is blocked while the main thread waits in it.
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._publish()
        dist.barrier(group=group)  # from here on every rank's key is there
        self._thread = threading.Thread(target=self._watch, name="stall watch", daemon=True)

    def __enter__(self) -> StallWatch:
        self._since = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(2 * self._interval)

    def enter(self, step: int, phase: str) -> None:
        """The main thread enters a phase of a step."""
        self._place = (step, phase)
        self._since = time.monotonic()

    def moved(self) -> None:
        """The main thread is in the same phase, and not standing still: a disk that it waits for has taken more bytes."""
        self._since = time.monotonic()

    def _watch(self) -> None:
        while not self._stopping.wait(self._interval):
            try:
                self._publish()
                stood = time.monotonic() - self._since
                if stood > self._limit:
                    # The store's process may be the one that froze: then asking it never returns.
                    silence = threading.Timer(10 * self._interval, self._end_without_store, ["TimeoutError"])
                    silence.daemon = True
                    silence.start()
                    self._report(stood)
                    silence.cancel()
                    self._end()
                    return
            except (RuntimeError, OSError) as error:  # the store's connection: DistStoreError is a RuntimeError
                if self._stopping.is_set():
                    return
                if time.monotonic() - self._since > self._limit:
                    self._end_without_store(type(error).__name__)
                    return

    def _end_without_store(self, reason: str) -> None:
        """Under launch/*.sh rank 0 holds the store; a bare torchrun's agent on rank 0's host does."""
        address = os.environ.get("MASTER_ADDR", "its host")
        self._say(
            f"error: rank {self._rank} stood still for {self._limit:.0f} s and the store does not answer ({reason})\n"
            f"missing: rank 0 (host {address}): dead, stopped, or cut off from the network"
        )
        self._end()

    def _publish(self) -> None:
        self._count += 1
        beat = Beat(self._rank, socket.gethostname(), os.getpid(), self._count, *self._place)
        self._store.set(_key(self._rank), json.dumps(asdict(beat)))

    def _hear(self) -> list[Beat]:
        values = self._store.multi_get([_key(rank) for rank in range(self._world_size)])
        return [Beat(**json.loads(value)) for value in values]

    def _report(self, seconds: float) -> None:
        before = self._hear()
        deadline = time.monotonic() + 3 * self._interval
        while time.monotonic() < deadline:  # still saying that this process lives
            time.sleep(self._interval)
            self._publish()
        # One message for all ranks, from the first that gets here.
        if self._store.add("stall_watch/reports", 1) == 1:
            self._say(diagnose(before, self._hear(), seconds))
            self._store.set("stall_watch/said", "1")
        elif not self._store.check(["stall_watch/said"]):
            time.sleep(self._interval)


def _key(rank: int) -> str:
    return f"stall_watch/{rank}"


def _print_error(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _end_process() -> None:
    # Not sys.exit: the main thread is inside a collective and will not return to Python.
    os._exit(1)
