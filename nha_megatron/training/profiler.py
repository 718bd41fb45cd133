"""Traces of chosen steps on chosen ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nha_megatron.config import RunConfig


class StepProfiler:
    """Follows a run step by step, and writes one trace. Does nothing on the ranks and steps that are not asked for.

        profiler.begin(step); ...; profiler.end(step)
        profiler.close()

    A trace that cannot be made or written is said, and never ends a run.

    Args:
        say: takes a line for the user.
    """

    def __init__(self, config: RunConfig, rank: int, device: torch.device, say: Callable[[str], None]) -> None:
        settings = config.profiler
        self._steps = range(0)
        if settings.start is not None and rank in settings.ranks:
            self._steps = range(settings.start, min(settings.start + settings.steps, config.training.steps + 1))
        self._rank, self._cuda, self._say = rank, device.type == "cuda", say
        self._folder = Path(config.logging.directory) / "profile"
        self._running: Any = None
        self._begun = self._last = 0

    def begin(self, step: int) -> None:
        self._last = step
        if step not in self._steps or self._running is not None:
            return
        activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * self._cuda]
        profile = torch.profiler.profile(activities=activities)
        try:
            profile.start()
        except RuntimeError as error:  # another profiler holds the device
            self._say(f"warning: the profiler of rank {self._rank} cannot start ({error})")
            self._steps = range(0)
            return
        self._running, self._begun = profile, step

    def end(self, step: int) -> None:
        if self._running is not None and step + 1 not in self._steps:
            self.close()

    def close(self) -> None:
        """Writes what has been traced."""
        if self._running is None:
            return
        profile, self._running = self._running, None
        path = self._folder / f"rank_{self._rank}_steps_{self._begun}_to_{self._last}.json.gz"
        try:
            profile.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            self._say(f"warning: the trace {path} cannot be written ({error})")
        else:
            self._say(f"steps {self._begun} to {self._last} of rank {self._rank} are traced in {path}")
