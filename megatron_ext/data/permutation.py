"""A shuffle of 0..n-1 that is computed, not stored: a Feistel network over the next power of four.

A billion samples cost no memory and any position is reached at once, which is what makes resuming cheap. It is
arithmetic on Python integers, so a run resumed under another NumPy (whose random streams may change between versions)
keeps its order.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 8


class Permutation:
    """A bijection of 0..length-1; equal `key`s give equal permutations, on every machine and in every version."""

    def __init__(self, length: int, *key: int):
        assert length > 0
        self.length = length
        self._half = max(2, ((length - 1).bit_length() + 1) // 2)
        state = 0
        for part in key:
            state = _mix(state + _GOLDEN ^ part & _MASK)
        self._round_keys = [_mix(state + (number + 1) * _GOLDEN) for number in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.length:
            raise IndexError(f"{index} of a permutation of {self.length}")
        half, mask = self._half, (1 << self._half) - 1
        while True:  # the network permutes 4^half >= length numbers; follow the cycle until it is back in range
            left, right = index >> half, index & mask
            for key in self._round_keys:
                left, right = right, left ^ _mix(right + key) & mask
            index = left << half | right
            if index < self.length:
                return index


def _mix(x: int) -> int:
    """The finaliser of splitmix64."""
    x &= _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31
