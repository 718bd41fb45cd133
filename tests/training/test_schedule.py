"""Learning rates at the corners of each schedule, where off-by-one errors live."""

import math

import pytest

from nha_megatron.config import OptimizerConfig
from nha_megatron.training.schedule import learning_rate

# Rates are sums and products of a few numbers: equal up to a few roundings of float64.
APPROX = {"rel": 1e-12, "abs": 1e-18}


def rates(total: int, **settings: object) -> list[float]:
    optimizer = OptimizerConfig(**{"lr": 1e-3, **settings})
    return [learning_rate(step, optimizer, total) for step in range(1, total + 1)]


def test_warmup_reaches_the_full_rate_at_its_last_update_and_never_is_zero() -> None:
    assert rates(6, schedule="constant", warmup_steps=4) == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3], **APPROX)


def test_no_warmup_starts_at_the_full_rate() -> None:
    assert rates(3, schedule="constant") == [1e-3, 1e-3, 1e-3]


def test_cosine_passes_the_middle_and_ends_at_min_lr() -> None:
    curve = rates(10, schedule="cosine", warmup_steps=2, min_lr=1e-4)
    assert curve[1] == pytest.approx(1e-3, **APPROX)  # the last update of the warm-up
    assert curve[5] == pytest.approx((1e-3 + 1e-4) / 2, **APPROX)  # half way between updates 2 and 10
    assert curve[3] == pytest.approx(1e-4 + 9e-4 * (1 + math.cos(math.pi / 4)) / 2, **APPROX)
    assert curve[9] == pytest.approx(1e-4, **APPROX)
    assert curve[1:] == sorted(curve[1:], reverse=True)


def test_wsd_is_stable_then_falls_linearly_to_min_lr() -> None:
    curve = rates(10, schedule="wsd", warmup_steps=2, decay_steps=4, min_lr=2e-4)
    assert curve == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 8e-4, 6e-4, 4e-4, 2e-4], **APPROX)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_updates_after_the_end_keep_the_last_rate(schedule: str) -> None:
    optimizer = OptimizerConfig(lr=1.0, min_lr=0.1, schedule=schedule, decay_steps=3 if schedule == "wsd" else None)
    assert learning_rate(11, optimizer, 10) == pytest.approx(0.1, **APPROX)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_a_run_that_is_all_warmup_does_not_divide_by_zero(schedule: str) -> None:
    curve = rates(4, schedule=schedule, warmup_steps=4, decay_steps=1 if schedule == "wsd" else None)
    assert curve[-1] == pytest.approx(1e-3, **APPROX)
