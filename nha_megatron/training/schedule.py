"""Learning rate as a pure function of the update number.

          cosine                     wsd (warm-up, stable, decay)
    lr      /--\\                      /----------\\
           /    `\\_                   /            \\
    min   /        `--               /              \\
         1  w       total           1 w   total-d  total

Nothing is remembered between calls, so a resumed run needs no schedule state and gets the same numbers.
"""

from __future__ import annotations

import math

from nha_megatron.config import OptimizerConfig


def learning_rate(step: int, optimizer: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of update `step`, counted from 1; all bounds below are inclusive.

    - updates 1 .. warmup_steps rise linearly: update w has lr * w / warmup_steps, so no update has rate 0 and update
      `warmup_steps` is the first with the full rate;
    - `constant` stays at lr;
    - `cosine` (Loshchilov and Hutter 2017, without restarts) falls to min_lr, which update `total_steps` has;
    - `wsd` (Hu et al. 2024, MiniCPM) stays at lr up to update total_steps - decay_steps, then falls linearly to min_lr,
      which update `total_steps` has.

    Updates after `total_steps` keep the last rate.
    """
    assert step >= 1, f"updates are counted from 1, got {step}"
    lr, min_lr = optimizer.lr, optimizer.min_lr
    if step <= optimizer.warmup_steps:
        return lr * step / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return lr
    if optimizer.schedule == "cosine":
        return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * _progress(step, optimizer.warmup_steps, total_steps)))
    if optimizer.schedule == "wsd":
        assert optimizer.decay_steps is not None, "the configuration requires it with wsd"
        start = total_steps - optimizer.decay_steps
        return lr + (min_lr - lr) * _progress(step, start, total_steps)
    raise AssertionError(f"no schedule {optimizer.schedule!r}")


def _progress(step: int, start: int, end: int) -> float:
    """0 at update `start` and before, 1 at update `end` and after."""
    if step >= end:
        return 1.0
    return max(0.0, (step - start) / (end - start))
