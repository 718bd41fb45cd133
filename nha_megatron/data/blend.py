"""Weighted blends: which corpus global sample `index` comes from, and which of that corpus's samples it is.

A blend is a balanced binary tree over the corpora. A node that sends the fraction p of its samples to its left child sends
floor(i p) of its first i samples there, so sample i goes left exactly when floor((i + 1) p) > floor(i p), and
floor(i p) is its number among the left ones. In exact rational arithmetic this is a pure function of the index for any index,
costs one multiplication per level, and needs no table and no state.

Among the first i samples, a corpus of normalised weight w has between i w - d and i w + d samples, d the depth of the tree
(ceil(log2(number of corpora))): a level adds less than 1 to the error, and passes on less than what it received.
"""

from collections.abc import Sequence
from fractions import Fraction

from nha_megatron.config import ConfigError


class Blend:
    """Deterministic interleaving of corpora by weight.

    weights: positive numbers, of any sum. Decimal fractions are taken as written (0.1 is one tenth).
    Raises ConfigError if a weight is not positive and finite.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        assert len(weights) > 0
        for weight in weights:
            if not 0 < weight < float("inf"):
                raise ConfigError(f"data.path: the weight {weight} of a corpus is not allowed; weights are positive. Leave the corpus out.")
        self._weights = [Fraction(str(weight)) for weight in weights]
        # prefix sums, so that a subtree's share is one subtraction
        self._sums = [sum(self._weights[:i], Fraction(0)) for i in range(len(weights) + 1)]

    @property
    def shares(self) -> list[float]:
        """The weights, of sum 1."""
        return [float(weight / self._sums[-1]) for weight in self._weights]

    @property
    def depth(self) -> int:
        return (len(self._weights) - 1).bit_length()

    def locate(self, index: int) -> tuple[int, int]:
        """(corpus, number of that corpus's samples among global samples 0 .. index - 1)."""
        assert index >= 0
        low, high = 0, len(self._weights)
        while high - low > 1:
            middle = (low + high) // 2
            share = (self._sums[middle] - self._sums[low]) / (self._sums[high] - self._sums[low])
            before = index * share.numerator // share.denominator
            after = (index + 1) * share.numerator // share.denominator
            if after > before:
                index, high = before, middle
            else:
                index, low = index - before, middle
        return low, index
