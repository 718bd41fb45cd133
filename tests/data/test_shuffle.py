"""The keyed permutation: a bijection for every size, and the same numbers on every machine."""

import numpy as np
import pytest

from nha_megatron.data.shuffle import derive_key, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 255, 1000, 4097])
def test_is_a_permutation(size: int) -> None:
    for key in (0, 1, derive_key(3, "train")):
        assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_one_index_at_a_time_equals_all_at_once() -> None:
    together = permute(np.arange(1000), 1000, 5)
    assert [int(permute(np.array([i]), 1000, 5)[0]) for i in range(0, 1000, 37)] == together[::37].tolist()


def test_large_sizes_need_no_table() -> None:
    size = 3_000_000_000_000
    index = np.array([0, 1, size // 2, size - 1])
    out = permute(index, size, 1)
    assert len(set(out.tolist())) == 4 and out.min() >= 0 and out.max() < size


def test_keys_give_unrelated_permutations() -> None:
    size = 2000
    first, second = permute(np.arange(size), size, 1), permute(np.arange(size), size, 2)
    # A random permutation has one fixed point on average; Poisson: more than 8 has probability 1e-6.
    assert (first == second).sum() <= 8 and (first == np.arange(size)).sum() <= 8
    # Rank correlation of independent permutations has standard deviation 1 / sqrt(size) = 0.022; 5 of them.
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.11 and abs(np.corrcoef(first, np.arange(size))[0, 1]) < 0.11


def test_neighbours_are_spread() -> None:
    """The mean distance of neighbours in a random permutation is size / 3, standard error about 0.24 size / sqrt(size)."""
    size = 5000
    distance = np.abs(np.diff(permute(np.arange(size), size, 9))).mean()
    assert abs(distance - size / 3) < 5 * 0.24 * size**0.5


def test_numbers_never_change() -> None:
    """A resumed run must see the same order after any update of this program or its libraries."""
    assert permute(np.arange(10), 10, derive_key(0, "train", 0)).tolist() == EXPECTED_PERMUTATION
    assert derive_key(1234, "train", 0) == EXPECTED_KEY


def test_key_depends_on_every_part_and_its_place() -> None:
    keys = [derive_key(*parts) for parts in [(0,), (0, 0), (1,), (256,), (-1,), (2**70,), ("a",), ("a", "b"), ("ab",), ("b", "a"), (97,)]]
    assert len(set(keys)) == len(keys)


EXPECTED_PERMUTATION = [4, 9, 0, 7, 8, 2, 5, 3, 1, 6]
EXPECTED_KEY = 7484892671475893516
