"""Sums that have the same bits in whatever order the terms come, and however they were grouped into shards.

Floating-point addition rounds, so its result depends on the order. Here a term is split into digits of 40 bits,

    x = sum over i of  d_i 2^(40 (t - i)),   d_i an integer with |d_i| < 2^40 and the sign of x,

and each digit is added as an integer, which is exact. Only the highest digits are kept, counted from the largest term:
what is dropped depends on that largest term alone, never on the order (the principle of reproducible summation,
Demmel and Nguyen, "Parallel Reproducible Summation", IEEE Transactions on Computers 64(7), 2015).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ExactSum"]

Array = npt.NDArray[Any]
_WIDTH = 40  # bits of a digit: 2^23 terms fit into 64 bits
_BLOCK = 1 << 16  # entries that are split at a time, so that their digits stay in the processor's cache
_LOWEST = -25  # digits below 2^-1000 are none: their scale would not be a float64 any more


class ExactSum:
    """The sum of float64 arrays of one shape, in int64 `digits` [kept, *shape], the highest first.

    With `kept` digits an error is below 2^(40 - 40 kept) of the largest entry of any term, per term. `top` is the
    position of the first digit. A term that is not finite makes the whole sum NaN.
    """

    __slots__ = ("digits", "finite", "top")

    def __init__(self, shape: tuple[int, ...], kept: int = 3) -> None:
        self.digits: Array = np.zeros((kept, *shape), np.int64)
        self.top = _LOWEST
        self.finite = True

    def add(self, term: Array) -> None:
        """Add an array of the sum's shape."""
        peak = max(float(term.max(initial=0.0)), -float(term.min(initial=0.0)))
        if not math.isfinite(peak):
            self.finite = False
            return
        self._raise(-(-math.frexp(peak)[1] // _WIDTH) - 1 if peak else _LOWEST)
        entries, digits = term.reshape(-1), self.digits.reshape(len(self.digits), -1)
        for start in range(0, entries.size, _BLOCK):
            part = slice(start, start + _BLOCK)
            self._add_block(entries[part], digits[:, part])

    def _add_block(self, term: Array, digits: Array) -> None:
        rest = term.astype(np.float64)
        rest *= math.ldexp(1.0, -_WIDTH * self.top)
        for position, digit in enumerate(digits):
            whole = np.trunc(rest)
            digit += whole.astype(np.int64)
            if position + 1 < len(digits):
                rest -= whole
                rest *= float(1 << _WIDTH)

    def merge(self, other: ExactSum) -> None:
        """Add what another sum of the same shape and number of digits holds, which stays as it is."""
        self._raise(other.top)
        shift = self.top - other.top
        if shift < len(self.digits):
            self.digits[shift:] += other.digits[: len(other.digits) - shift]
        self.finite = self.finite and other.finite

    @property
    def value(self) -> Array:
        """The sum in float64."""
        if not self.finite:
            return np.full(self.digits.shape[1:], np.nan)
        total = np.zeros(self.digits.shape[1:])
        for position in reversed(range(len(self.digits))):
            total += np.ldexp(self.digits[position].astype(np.float64), _WIDTH * (self.top - position))
        return total

    def _raise(self, top: int) -> None:
        """Make room for digits up to a position; the lowest ones fall out."""
        shift = min(top - self.top, len(self.digits))
        if shift <= 0:
            return
        self.digits[shift:] = self.digits[: len(self.digits) - shift].copy()
        self.digits[:shift] = 0
        self.top = top
