"""When a run's checkpoints are written: at once or while training goes on, and what happens when that fails or takes long."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nha_megatron.checkpoint.files import CheckpointError, SaveError
from nha_megatron.checkpoint.host_memory import HostMemory
from nha_megatron.checkpoint.state import Progress
from nha_megatron.checkpoint.write import PendingSave
from nha_megatron.config import CheckpointConfig
from nha_megatron.engine.base import Engine

_POLL_S = 0.05
_REPORT_S = 60.0


class CheckpointSaver:
    """Saves a run's checkpoints, one at a time. All methods are collective over all ranks.

        saver.save(progress)             after a step that ends with a checkpoint
        saver.poll()                     after every step: publishes what has been written meanwhile, says what failed
        saver.save(progress, last=True)  before the run ends: returns when it is published

    A save that fails is reported and training goes on, because the next one may find the disk repaired; the run ends with
    `SaveError` after `settings.attempts` failures in a row, and when its last save fails.

    Args:
        say: called on every rank with one line for the user.
        published: called on every rank with a checkpoint that is complete and its step.
        alive: called while a slow disk is waited for, each time that bytes have moved.
    """

    def __init__(
        self,
        root: Path,
        engine: Engine,
        config: dict[str, Any],
        settings: CheckpointConfig,
        say: Callable[[str], None],
        alive: Callable[[], None] = lambda: None,
        data: dict[str, Any] | None = None,
        published: Callable[[Path, int], None] = lambda path, step: None,
    ) -> None:
        self._root, self._engine, self._config, self._data = root, engine, config, data
        self._settings = settings
        self._say, self._alive, self._published = say, alive, published
        self._pending: PendingSave | None = None
        self._failures = 0
        self._warned: set[str] = set()
        self._memory = HostMemory() if settings.asynchronous else None
        self._waited = 0.0  # seconds that training stood still for the pending save, after it had begun

    def save(self, progress: Progress, last: bool = False) -> None:
        """Starts a checkpoint of this moment, after the one before; waits for it unless checkpoints are asynchronous.

        `last`: it is tried also when the one before was the failure that would have ended the run.
        """
        if last:
            self.settle()
        else:
            self.wait()
        copy = self._settings.asynchronous and not last
        try:
            self._pending = PendingSave(self._root, self._engine, progress, self._config, copy, self._data, self._memory)
        except CheckpointError as error:
            self._failed(error, last)
            return
        self._waited = 0.0
        if not copy:
            self.wait(last)

    def poll(self) -> None:
        """Publishes the pending checkpoint if all ranks have written it."""
        if self._pending is not None and self._pending.advance()[0]:
            self._finish(last=False)

    def wait(self, last: bool = False) -> None:
        """Returns when no checkpoint is pending. `last`: a failure ends the run."""
        if self._pending is None:
            return
        started = reported = time.perf_counter()
        before = -1
        while True:
            done, written, total = self._pending.advance()
            if done:
                break
            if written > before:
                before = written
                self._alive()
            now = time.perf_counter()
            if now - reported >= _REPORT_S:
                reported = now
                seconds = now - self._pending.started
                self._say(
                    f"step {self._pending.progress.step}: waiting for the checkpoint, {written / 2**30:.2f} of {total / 2**30:.2f} GiB "
                    f"written in {seconds:.0f} s. Choose faster storage, or a larger checkpoint.every"
                )
            time.sleep(_POLL_S)
        self._waited += time.perf_counter() - started
        self._finish(last)

    def settle(self) -> None:
        """`wait` before the run's end, which something else decides: a failure is only said."""
        try:
            self.wait()
        except CheckpointError as error:
            self._say(f"warning: {error}")

    def _finish(self, last: bool) -> None:
        assert self._pending is not None
        pending, self._pending = self._pending, None
        started = time.perf_counter()
        try:
            path = pending.finish(self._settings.keep)
        except CheckpointError as error:
            self._failed(error, last)
            return
        now = time.perf_counter()
        self._failures = 0
        said = f"step {pending.progress.step}: saved {path} in {now - pending.started:.1f} s"
        if self._settings.asynchronous:
            waited = self._waited + now - started
            said += f"; training stood still {pending.began_in:.1f} s to copy the state and {waited:.1f} s for the disk"
        for warning in pending.warnings:  # each once: what cannot be removed is met again at every save
            if warning not in self._warned:
                self._say(f"warning: {warning}")
        self._warned.update(pending.warnings)
        self._say(said)
        self._published(path, pending.progress.step)

    def _failed(self, error: CheckpointError, last: bool) -> None:
        self._failures += 1
        if last or self._failures >= self._settings.attempts:
            raise SaveError(str(error)) from error
        self._say(f"warning: {error}. Training goes on; failure {self._failures} of {self._settings.attempts} in a row ends it")
