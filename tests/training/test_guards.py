"""A run stops at the first number that is none."""

import math

import pytest

from nha_megatron.training.guards import TrainingError, require_finite


def test_finite_numbers_pass() -> None:
    require_finite(1, 3.5, 0.0)


@pytest.mark.parametrize(
    ("loss", "grad_norm", "name"), [(math.nan, 1.0, "loss"), (math.inf, 1.0, "loss"), (2.0, math.inf, "gradient norm")]
)
def test_anything_else_stops_the_run_and_names_the_step(loss: float, grad_norm: float, name: str) -> None:
    with pytest.raises(TrainingError, match=f"the {name} of step 17 is"):
        require_finite(17, loss, grad_norm)
