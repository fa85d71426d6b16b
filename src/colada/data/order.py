"""In what order numbered things come, shuffled or by shares: each place a function of (seed, number)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

MIX_PERIOD = 4096
"""Numbers over which a mixture has exactly its shares."""

_Ids = npt.NDArray[np.int64]


class Permutation:
    """A random order of ``range(size)`` whose items are computed one by one, in no memory.

    Four Feistel rounds over the next power of 4, walked until the value is within range (Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """

    def __init__(self, size: int, *key: int) -> None:
        self._size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        self._keys = _round_keys(key)

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self._size:
            raise IndexError(f"item {index} of a permutation of {self._size}")
        while True:
            left, right = index >> self._half, index & self._mask
            for key in self._keys:
                left, right = right, left ^ (_mixed(right ^ key) & self._mask)
            index = left << self._half | right
            if index < self._size:
                return index


@lru_cache(maxsize=1024)
def _round_keys(key: tuple[int, ...]) -> list[int]:
    return [int(k) for k in np.random.SeedSequence(key).generate_state(4, np.uint64)]


def _mixed(x: int) -> int:
    """Return 64 well-mixed bits (the finaliser of SplitMix64: Steele, Lea and Flood, 2014)."""
    word = 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
    return x ^ (x >> 31)


def turn_of(weights: tuple[float, ...], seed: int, number: int) -> tuple[int, int]:
    """Return whose turn a number is among parts of these weights, and how many it had before."""
    shares = _shares(weights)
    period, index = divmod(number, MIX_PERIOD)
    order, turn = _turns(shares, seed, period)
    part = int(order[index])
    return part, period * shares[part] + int(turn[index])


@lru_cache(maxsize=16)
def _shares(weights: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(apportion(weights, MIX_PERIOD))


@lru_cache(maxsize=16)
def _turns(shares: tuple[int, ...], seed: int, period: int) -> tuple[_Ids, _Ids]:
    """Return the source of each row of a period, and how many of its rows came before in the period."""
    order = np.random.default_rng((seed, period)).permutation(np.repeat(np.arange(len(shares)), shares))
    turn = np.empty_like(order)
    for part, share in enumerate(shares):
        turn[order == part] = np.arange(share)
    return order, turn


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Return whole numbers in proportion to weights: at least 1 each, ``total`` together.

    Webster's method, after the first of each: exact where the proportions are whole.
    """
    whole = np.ones(len(weights), np.int64)
    for _ in range(total - len(weights)):
        whole[np.argmax(np.asarray(weights) / (whole + 0.5))] += 1
    return [int(n) for n in whole]
