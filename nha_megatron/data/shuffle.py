"""A keyed permutation of 0..n-1, computed one index at a time.

The order of the data must be the same on every machine and in every year of a run, so it depends on integer arithmetic
written here and not on a random number library, whose streams may change between versions. And it must not need a table
of all samples. Both hold for a Feistel network over the smallest domain 4^b >= n, with cycle walking: an index that leaves
[0, n) is permuted again until it comes back (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

import hashlib

import numpy as np

_ROUNDS = 6


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014) on uint64: a bijection that spreads every input bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from integers and words; another tuple of parts gives an unrelated key."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where the permutation `key` of 0..size-1 sends each entry of `index`.

    index: int64 array with entries in [0, size). Returns int64 of the same shape.
    """
    assert size > 0 and (index.size == 0 or (index.min() >= 0 and index.max() < size))
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half_mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    round_keys = [np.uint64(derive_key(key, r)) for r in range(_ROUNDS)]
    value = index.astype(np.uint64).reshape(-1)
    walking = np.arange(value.size)
    while walking.size:
        left, right = value[walking] >> shift, value[walking] & half_mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key) & half_mask)
        value[walking] = (left << shift) | right
        walking = walking[value[walking] >= np.uint64(size)]
    return value.astype(np.int64).reshape(index.shape)
