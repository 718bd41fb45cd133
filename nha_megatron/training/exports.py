"""Exports to Hugging Face format while a run goes on: a process of its own reads a checkpoint that has been published."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from nha_megatron.config import RunConfig

_POLL_S = 0.2
# What a launcher tells a rank: the process that exports is none.
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


class BackgroundExport:
    """On one rank of a run: writes `exported/step_N` of logging.directory, one at a time. A failure is said, and never ends the run.

        exports.saved(path, step)   after a checkpoint has been published
        exports.poll()              after every step
        exports.finish()            at the end of training: waits, for as long as one phase of a step may take
        exports.close()             whatever happened: ends what is still running

    Args:
        say: takes a line for the user.
    """

    def __init__(self, config: RunConfig, say: Callable[[str], None]) -> None:
        self._every, self._total = config.checkpoint.export_every, config.training.steps
        self._folder = Path(config.logging.directory) / "exported"
        self._options = [] if config.data.tokenizer is None else ["--tokenizer", config.data.tokenizer]
        self._options = self._options or ["--no-tokenizer"]
        self._patience, self._say = config.training.stall_seconds, say
        self._running: tuple[subprocess.Popen[bytes], Path] | None = None
        self._waiting: Path | None = None

    def command(self, checkpoint: Path, out: Path) -> list[str]:
        """The program that exports one checkpoint."""
        return [sys.executable, "-m", "nha_megatron", "export", str(checkpoint), str(out), "--overwrite", *self._options]

    def saved(self, checkpoint: Path, step: int) -> None:
        """Exports the checkpoint when it is due; while another is being written, after that one."""
        if self._every is None or (step % self._every and step != self._total):
            return
        if self._waiting is not None:
            self._say(f"warning: {self._waiting} is not exported: exports take longer than checkpoint.export_every")
        self._waiting = checkpoint
        self.poll()

    def poll(self) -> None:
        """Says what has ended, and starts what waits."""
        if self._running is not None and self._running[0].poll() is not None:
            self._report()
        if self._running is None and self._waiting is not None:
            checkpoint, self._waiting = self._waiting, None
            self._start(checkpoint)

    def finish(self) -> None:
        deadline = time.monotonic() + self._patience
        while (self._running or self._waiting) and time.monotonic() < deadline:
            self.poll()
            time.sleep(_POLL_S)

    def close(self) -> None:
        if self._running is not None:
            (process, out), self._running = self._running, None
            process.terminate()
            process.wait()
            self._say(f"warning: the run ends before {out} is written; make it with `nha-megatron export`")

    def _start(self, checkpoint: Path) -> None:
        out = self._folder / checkpoint.name
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_RANK)}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._log(out).open("wb") as log:
                process = subprocess.Popen(
                    self.command(checkpoint, out),
                    env={**environment, "CUDA_VISIBLE_DEVICES": ""},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        except OSError as error:
            self._say(f"warning: {out} cannot be exported ({error})")
        else:
            self._running = process, out

    def _report(self) -> None:
        assert self._running is not None
        (process, out), self._running = self._running, None
        if process.returncode == 0:
            self._log(out).unlink(missing_ok=True)
            self._say(f"exported {out}")
        else:
            self._say(f"warning: {out} could not be exported, status {process.returncode}: see {self._log(out)}")

    @staticmethod
    def _log(out: Path) -> Path:
        return out.with_name(f"{out.name}.log")
