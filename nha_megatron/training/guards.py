"""Judges the numbers of each step: skipped updates, loss spikes, and when to give up.

    loss |                x   <- spike: above median + max(deviations * spread, minimum) of the window
         | . .  . .          .
         |  . .. . . . . . ..
         +--[--- window ---]----

Everything follows from numbers that all ranks have, so all ranks judge alike without a message. The state is a few plain numbers; it
is saved with the run, because with `loss_spike: skip` the next update depends on it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from nha_megatron.config import GuardsConfig

# Standard deviation of a normal distribution over its median absolute deviation.
_DEVIATION_OF_MAD = 1.4826


class TrainingError(RuntimeError):
    """The run cannot go on. The message says what happened and what to do; no traceback is needed."""


class LossGuard:
    """Follows the losses of a run, step by step.

        result = engine.train_step(batches, lr, max_loss=guard.max_loss)
        message = guard.observe(step, result.loss, result.grad_norm, result.skipped)

    Args:
        state: what `state()` gave when the run was saved; empty at its beginning.
    """

    def __init__(self, settings: GuardsConfig, state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        self._settings = settings
        self._losses: deque[float] = deque(state.get("losses", ()), maxlen=settings.window_steps)
        self._recent_skips: deque[int] = deque(state.get("recent_skips", ()))
        self._spiking: bool = state.get("spiking", False)
        self.skipped: int = state.get("skipped", 0)
        """Steps skipped in the whole run."""

    def state(self) -> dict[str, Any]:
        """Plain data from which a resumed run judges the next step as this one would."""
        return {
            "losses": list(self._losses),
            "recent_skips": list(self._recent_skips),
            "spiking": self._spiking,
            "skipped": self.skipped,
        }

    def begin_stage(self) -> None:
        """Another length or blend has another loss: the window fills anew. Skipped steps stay counted."""
        self._losses.clear()
        self._spiking = False

    @property
    def spike_limit(self) -> float:
        """Loss in nats above which the next step is a spike; infinite while half a window is not known."""
        if self._settings.loss_spike == "ignore" or 2 * len(self._losses) < self._settings.window_steps:
            return math.inf
        centre = median(self._losses)
        spread = _DEVIATION_OF_MAD * median(abs(loss - centre) for loss in self._losses)
        return centre + max(self._settings.spike_deviations * spread, self._settings.spike_minimum)

    @property
    def max_loss(self) -> float:
        """What the engine is given: the largest loss whose update is applied."""
        return self.spike_limit if self._settings.loss_spike in ("skip", "stop") else math.inf

    def observe(self, step: int, loss: float, grad_norm: float, skipped: bool) -> str | None:
        """Takes the numbers of update `step`; returns a line for the user when something is wrong.

        Raises `TrainingError` when the run has to stop: the same on every rank.
        """
        finite, limit = math.isfinite(loss) and math.isfinite(grad_norm), self.spike_limit
        spike = math.isfinite(loss) and loss > limit
        new_spike, self._spiking = spike and not self._spiking, spike
        if math.isfinite(loss):
            # Spikes too: after a change of level the median follows within half a window, and the alarm ends.
            self._losses.append(loss)
        what = (
            f"the loss of step {step} is {loss:.4f}, a spike above {limit:.4f}"
            if spike and finite
            else f"the loss of step {step} is {loss:.4f}, its gradient norm {grad_norm:.4g}"
        )
        if spike and self._settings.loss_spike == "stop":
            raise TrainingError(f"{what}: its update was not applied and training stopped, as guards.loss_spike asks. {_WHAT_HELPS}")
        if skipped:
            self._count_skip(step, what)
            recent = f"{len(self._recent_skips)} of the last {self._settings.window_steps} steps"
            return f"{what}: update skipped, {self.skipped} in the run, {recent}"
        return what if new_spike else None

    def _count_skip(self, step: int, what: str) -> None:
        settings = self._settings
        self.skipped += 1
        self._recent_skips.append(step)
        while self._recent_skips[0] <= step - settings.window_steps:
            self._recent_skips.popleft()
        if len(self._recent_skips) > settings.skip_limit:
            raise TrainingError(
                f"{what}: training stopped, because {len(self._recent_skips)} of the last {settings.window_steps} updates could not be "
                f"applied and guards.skip_limit is {settings.skip_limit}. {_WHAT_HELPS}"
            )


_WHAT_HELPS = (
    "The checkpoints from before are untouched. Resume from one with a lower optimizer.lr, a longer optimizer.warmup_steps or a lower "
    "optimizer.clip_grad; when the data or a device is to blame, a higher guards.skip_limit passes over it"
)
