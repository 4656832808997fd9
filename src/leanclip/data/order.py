"""The order in which an epoch visits a data set, as a function of its key and position alone."""

from collections.abc import Iterator, Sequence

import numpy as np

SMALL = 1 << 20  # up to this size the whole permutation is drawn at once
_CHUNK = 1 << 14
_ROUNDS = 8


def shuffled(size: int, key: Sequence[int], start: int = 0) -> Iterator[int]:
    """The numbers below `size` in an order drawn by `key`, from position `start` of it.

    Memory is bounded whatever the size; no time is spent on positions before `start`.
    """
    if size <= SMALL:
        yield from np.random.default_rng(key).permutation(size)[start:].tolist()
        return
    for first in range(start, size, _CHUNK):
        positions = np.arange(first, min(first + _CHUNK, size), dtype=np.uint64)
        yield from permuted(positions, size, key).tolist()


def permuted(positions: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """The images of `positions` under a permutation of the numbers below `size`, drawn by `key`.

    A Feistel network permutes the numbers of an even count of bits; results not below `size` are
    permuted again until they are (Black and Rogaway 2002, "cycle walking").
    """
    half = np.uint64(((size - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << int(half)) - 1)
    round_keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    result = positions.astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        left, right = result[outside] >> half, result[outside] & low
        for round_key in round_keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & low)
        moved = (left << half) | right
        result[outside] = moved
        outside = outside[moved >= size]
    return result.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: each of the 64 bits depends on all of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
