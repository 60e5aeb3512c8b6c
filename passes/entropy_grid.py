"""An even grid of which frequent values take few bits: rows w_ok ~ c[i_ok], with codes of variable length.

With codes of one width a few values have to do; with codes about as long as -log2 of a value's share (codec.py), a
fine grid costs little, and at the same number of bits its error is the smallest that rounding number by number can
have (entropy-constrained scalar quantization: Wood 1969, Gish and Pierce 1968; 0.25 bits from what is possible at all).
On trained weights that is 1 dB at 1 bit and 3 to 5 dB at 2 to 4 bits beside zeros and k-means codebooks.

Numbers go to the value with the least (x - c)^2 + lambda length(c), with lambda = 2 ln(2) step^2 / 12, the slope of an
even grid (Chou, Lookabaugh and Gray 1989): mostly that widens the zero. Errors are made good in other columns, as for
codebooks (codebook.py). To solve for the values again gains 0.1 dB at most, and takes most of the time.

One step for all weights of a tensor is best where errors count alike. A step for each input channel, wider where
inputs have little power (reverse water-filling), gains nothing on trained weights: those of weak inputs are small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.passes.codebook import Problem, Shared, compensated, shared_as
from onnxcomp.passes.codec import MAX_CODES
from onnxcomp.passes.kmeans import midpoints
from onnxcomp.passes.rounding import Snap

__all__ = ["SLOPE", "Rate", "cheapest", "estimated_grid", "fit_grid", "rate", "stored_bits"]

Array = npt.NDArray[Any]
SLOPE = 2 * math.log(2) / 12  # of the error over bits, in squared steps
_PLACES = 1.04  # of their entropy is what Rice-coded places take; more than half of the places take a bitmap
_SAMPLED = 1 << 13


@dataclass(frozen=True)
class Rate:
    """How often each value of an ascending grid is used, whose value at `zero` is 0."""

    counts: Array
    zero: int

    @cached_property
    def lengths(self) -> Array:
        """Bits of the code of each value, in the form (codec.py) that takes the least in all."""
        total = max(float(self.counts.sum()), 1.0)
        used = min(max(1 - self.counts[self.zero] / total, 1e-6), 1 - 1e-6)
        apart = self.counts.copy()
        apart[self.zero] = 0
        there, absent = (1.0, 1.0) if used > 0.5 else (-_PLACES * math.log2(p) for p in (used, 1 - used))
        sparse = _rank_lengths(apart) + there
        sparse[self.zero] = absent
        return min(_rank_lengths(self.counts), sparse, key=lambda bits: float(bits @ self.counts))

    def bits(self, size: int) -> float:
        """Bits of each of `size` numbers of which these are some, the values themselves (float32) included."""
        code = float(self.lengths @ self.counts) / max(float(self.counts.sum()), 1.0)
        return code + 32 * np.count_nonzero(self.counts) / size


def rate(levels: Array, codes: Array) -> Rate:
    """Of numbers that are all on the ascending `levels`, 0 among them."""
    places = np.searchsorted(levels, codes.reshape(-1))
    return Rate(np.bincount(places, minlength=len(levels)).astype(np.float64), int(np.searchsorted(levels, 0.0)))


def stored_bits(found: Shared) -> float:
    """Bits of each number on a grid."""
    return rate(found.levels, found.codes).bits(found.codes.size)


def _rank_lengths(counts: Array) -> Array:
    """Bits of Rice-coded ranks by frequency, with the best number of low bits."""
    ranks = np.empty(len(counts), np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    found = [(ranks >> low) + 1.0 + low for low in range(8)]
    return min(found, key=lambda bits: float(bits @ counts))


def estimated_grid(problem: Problem, step: float) -> tuple[float, float]:
    """About the error if inputs did not correlate, and the bits of a number, from a sample."""
    targets, weights = problem.rows.reshape(-1), problem.importance.reshape(-1)
    size = targets.size
    if size > _SAMPLED:
        chosen = np.random.default_rng(0).integers(0, size, _SAMPLED)
        targets, weights = targets[chosen], weights[chosen]
    levels = _levels(problem.rows, step)
    codes = cheapest(levels, targets, step)(targets)
    return float((weights * np.square(codes - targets)).mean()) * size, rate(levels, codes).bits(size)


def fit_grid(problem: Problem, step: float) -> Shared:
    """The values of a grid that keep the output close for the bits that they take."""
    levels = _levels(problem.rows, step)
    scales = np.ones((*problem.rows.shape[:2], 1))
    return shared_as(problem, scales, levels, compensated(problem, scales, cheapest(levels, problem.rows, step)))


def _levels(rows: Array, step: float) -> Array:
    most = min(math.ceil(float(np.abs(rows).max()) / step), (MAX_CODES - 1) // 2)
    return step * np.arange(-most, most + 1, dtype=np.float64)


def cheapest(levels: Array, numbers: Array, step: float) -> Snap:
    """The cheapest value for each number, given the codes that the nearest values for all `numbers` would have.

    (x - c)^2 + lambda l is x^2 plus a line in x for each value c. The lines that are lowest somewhere belong to the
    points (c, c^2 + lambda l) on the lower convex hull; two neighbours of them meet at the slope between them, halved.
    """
    nearest = levels[np.searchsorted(midpoints(levels), numbers)]
    heights = np.square(levels) + SLOPE * step**2 * rate(levels, nearest).lengths
    hull: list[int] = []
    for place in range(len(levels)):
        while len(hull) > 1 and _rises_less(levels, heights, hull[-2], hull[-1], place):
            hull.pop()
        hull.append(place)
    used = levels[hull]
    borders = np.diff(heights[hull]) / (2 * np.diff(used))
    return lambda values: used[np.searchsorted(borders, values)]


def _rises_less(x: Array, y: Array, first: int, middle: int, last: int) -> bool:
    """Whether a point is on or above the line between the one before and a later one."""
    return bool((y[last] - y[middle]) * (x[middle] - x[first]) <= (y[middle] - y[first]) * (x[last] - x[middle]))
