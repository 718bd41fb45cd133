"""Stops a run whose numbers have stopped meaning anything."""

from __future__ import annotations

import math


class TrainingError(RuntimeError):
    """The run cannot go on. The message says what happened and what to do; no traceback is needed."""


def require_finite(step: int, loss: float, grad_norm: float) -> None:
    """Raises `TrainingError` when the loss or the gradient norm of update `step` is not a finite number.

    Both are global values, so all ranks raise together. The last checkpoint was written before this step.
    """
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            raise TrainingError(
                f"the {name} of step {step} is {value}: training stopped, nothing was saved after it. "
                "Resume from the last checkpoint with a lower optimizer.lr, a longer optimizer.warmup_steps or a lower optimizer.clip_grad"
            )
