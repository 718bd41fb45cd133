"""What the guards say of a curve, step by step."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from nha_megatron.config import GuardsConfig
from nha_megatron.training.guards import LossGuard, TrainingError

WINDOW = 32


def guard(**settings: Any) -> LossGuard:
    return LossGuard(GuardsConfig(window_steps=WINDOW, **settings))


def feed(guard: LossGuard, losses: list[float], first: int = 1) -> list[int]:
    """Steps at which the guard speaks; the engine skips what the guard tells it to."""
    spoken = []
    for step, loss in enumerate(losses, first):
        skipped = not (math.isfinite(loss) and loss <= guard.max_loss)
        if guard.observe(step, loss, 1.0, skipped) is not None:
            spoken.append(step)
    return spoken


def falling(steps: int, seed: int = 0) -> list[float]:
    """A pretraining curve: 11 nats falling to about 3 by a power law, with noise of 0.05 nats."""
    noise = np.random.default_rng(seed).normal(0, 0.05, steps)
    return [3 + 8 * step**-0.5 + float(noise[step - 1]) for step in range(1, steps + 1)]


@pytest.mark.parametrize("seed", range(5))
def test_a_falling_loss_with_noise_raises_no_alarm(seed: int) -> None:
    assert feed(guard(), falling(2000, seed)) == []


@pytest.mark.parametrize("spike", [60, 500, 1500])
def test_a_spike_is_reported_at_its_step(spike: int) -> None:
    losses = falling(2000)
    losses[spike - 1] += 2.0
    assert feed(guard(), losses) == [spike]


def test_a_spike_over_several_steps_is_one_report() -> None:
    losses = falling(500)
    losses[300:306] = [loss + 2.0 for loss in losses[300:306]]
    assert feed(guard(), losses) == [301]


def test_a_lasting_change_of_level_is_reported_once_and_becomes_the_normal() -> None:
    losses = falling(300)
    assert feed(guard_after := guard(), losses + [loss + 2.0 for loss in falling(600)[300:]]) == [301]
    assert losses[-1] + 2.0 < guard_after.spike_limit < losses[-1] + 3.0


def test_a_small_bump_on_a_smooth_curve_is_no_spike() -> None:
    losses = [2.0] * 100
    losses[80] += 0.09  # infinitely many deviations, and below spike_minimum
    assert feed(guard(), losses) == []
    losses[80] = 2.11
    assert feed(guard(), losses) == [81]


def test_nothing_is_judged_before_half_a_window() -> None:
    assert guard().spike_limit == math.inf
    assert feed(guard(), [2.0] * (WINDOW // 2 - 1) + [50.0]) == []
    assert feed(guard(), [2.0] * (WINDOW // 2) + [50.0]) == [WINDOW // 2 + 1]


def test_ignored_spikes_are_not_spoken_of() -> None:
    assert feed(guard(loss_spike="ignore"), [2.0] * 50 + [50.0]) == []


def test_a_stage_begins_with_an_empty_window() -> None:
    watched = guard()
    feed(watched, [2.0] * 50)
    watched.begin_stage()
    assert feed(watched, [4.0] * 50, first=51) == []


def test_skipping_spikes_and_stopping_at_them() -> None:
    watched = guard(loss_spike="skip")
    assert feed(watched, [2.0] * 50 + [9.0] + [2.0] * 10) == [51] and watched.skipped == 1
    with pytest.raises(TrainingError, match=r"the loss of step 51 is 9.0000, a spike above 2.1000: its update was not applied"):
        feed(guard(loss_spike="stop"), [2.0] * 50 + [9.0])


def test_one_skip_more_than_allowed_stops_the_run() -> None:
    watched = guard(skip_limit=2)
    assert feed(watched, [2.0, math.nan, 2.0, math.inf, 2.0]) == [2, 4]
    with pytest.raises(TrainingError, match=r"of step 6 is nan.*3 of the last 32 updates could not be applied and guards.skip_limit is 2"):
        feed(watched, [math.nan], first=6)


def test_skips_outside_of_the_window_are_forgotten() -> None:
    watched = guard(skip_limit=1)
    # Steps 1 and 33: 32 steps apart, never in one window of 32.
    assert feed(watched, ([math.nan] + [2.0] * 31) * 10) == list(range(1, 320, 32))
    assert watched.skipped == 10


def test_a_gradient_that_is_not_finite_is_told_from_the_loss() -> None:
    with pytest.raises(TrainingError, match=r"the loss of step 1 is 2\.5000, its gradient norm nan: training stopped"):
        guard(skip_limit=0).observe(1, 2.5, math.nan, True)


def test_the_state_survives_being_written_as_json() -> None:
    losses = falling(200)
    losses[150], losses[190] = 9.0, math.nan
    whole, first = guard(loss_spike="skip"), guard(loss_spike="skip")
    spoken = feed(whole, losses)
    feed(first, losses[:155])
    resumed = LossGuard(GuardsConfig(window_steps=WINDOW, loss_spike="skip"), json.loads(json.dumps(first.state())))
    assert feed(resumed, losses[155:], first=156) == [step for step in spoken if step > 155] == [191]
    assert resumed.state() == whole.state()
