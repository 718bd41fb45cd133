"""Weighted blends: exact counts, bounded error, no state."""

import math
from fractions import Fraction

import pytest

from nha_megatron.config import ConfigError
from nha_megatron.data.blend import Blend


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 1.0], [0.7, 0.3], [1e-3, 1.0, 5.0], [3.0, 1.0, 1.0, 2.0, 0.1], [1.0] * 7, [0.123456789, 0.987654321, 1 / 3]]
)
def test_counts_follow_the_weights_at_every_index(weights: list[float]) -> None:
    blend = Blend(weights)
    assert blend.depth == math.ceil(math.log2(len(weights)))
    shares = [Fraction(str(weight)) / sum(Fraction(str(w)) for w in weights) for weight in weights]
    counts = [0] * len(weights)
    for index in range(2000):
        corpus, position = blend.locate(index)
        assert position == counts[corpus], "a corpus's samples are numbered without gaps"
        counts[corpus] += 1
        # The bound that the module's docstring derives: less than one sample for each level of the tree.
        assert all(abs(count - (index + 1) * share) < max(blend.depth, 1) for count, share in zip(counts, shares, strict=True))


def test_bounded_error_at_billions() -> None:
    weights = [0.5, 0.25, 0.15, 0.1]
    blend = Blend(weights)
    for start in (2**31 - 3, 10**12, 2**63):
        for index in range(start, start + 20):
            corpus, position = blend.locate(index)
            assert abs(position - index * Fraction(str(weights[corpus]))) <= blend.depth


def test_small_periods_are_even() -> None:
    assert [Blend([1.0, 1.0]).locate(i)[0] for i in range(6)] == [1, 0, 1, 0, 1, 0]
    assert [Blend([3.0, 1.0]).locate(i)[0] for i in range(8)].count(1) == 2


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_that_mean_nothing_are_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="weights are positive"):
        Blend([1.0, weight])
