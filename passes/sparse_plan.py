"""How sparse each weight becomes: curves of error over sparsity, and the allocation of zeros to weights.

A curve gives, for one weight alone, what sparsity costs; the allocation minimizes the sum over all weights for a share
of zeros in all, by the multiplier that a zero has to be worth,

    min over s_l of  sum_l e_l(s_l) - lambda sum_l n_l s_l,      n_l elements of weight l, s_l its sparsity

with lambda by bisection (greedy on the lower convex hulls of the curves).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["LEVELS", "Curve", "allocate", "uniform"]

Array = npt.NDArray[Any]
LEVELS = (0.3, 0.5, 0.65, 0.8, 0.9, 0.96, 0.99)  # sparsities at which curves are computed


@dataclass(frozen=True)
class Curve:
    """`errors[i]` is what sparsity `levels[i]` of a weight with `size` elements costs; levels start with 0."""

    key: str
    size: int
    levels: Array
    errors: Array

    @classmethod
    def through(cls, key: str, size: int, levels: Sequence[float], errors: Sequence[float]) -> Curve:
        """The curve through some levels: single ones of an N:M pattern stay alone, else logarithms are interpolated.

        Below the first level the error is taken to grow with the square of the sparsity.
        """
        found = np.maximum.accumulate(np.maximum(errors, 1e-12))
        if len(levels) == 1:
            return cls(key, size, np.array([0.0, levels[0]]), np.array([0.0, found[0]]))
        grid = np.arange(100) / 100
        grid = grid[grid <= levels[-1]]
        wide = np.exp(np.interp(grid, levels, np.log(found)))
        low = grid < levels[0]
        wide[low] = found[0] * np.square(grid[low] / levels[0])
        return cls(key, size, grid, wide)

    def scaled(self, levels: Sequence[float], factors: Sequence[float]) -> Curve:
        """Multiplied by factors known at some levels, interpolated in between."""
        errors = self.errors * np.exp(np.interp(self.levels, levels, np.log(np.maximum(factors, 1e-12))))
        return Curve(self.key, self.size, self.levels, np.maximum.accumulate(errors))

    def at(self, sparsity: float) -> float:
        return float(np.interp(sparsity, self.levels, self.errors))

    def nearest(self, sparsity: float) -> float:
        """The largest level up to a sparsity."""
        return float(self.levels[self.levels <= sparsity + 1e-9][-1])


def uniform(curves: Sequence[Curve], ratio: float) -> dict[str, float]:
    """The same sparsity for all, or that of their pattern where it is no larger; by key."""
    return {c.key: c.nearest(ratio) if len(c.levels) == 2 else ratio for c in curves}


def allocate(curves: Sequence[Curve], ratio: float) -> dict[str, float]:
    """Sparsities by key with at least `ratio` zeros in all (as many as the levels allow), of least summed error."""
    wanted = min(ratio * sum(c.size for c in curves), sum(c.size * c.levels[-1] for c in curves))
    low, high = -30.0, 30.0  # logarithms of the multiplier
    for _ in range(60):
        middle = (low + high) / 2
        if _zeros(curves, _cheapest(curves, middle)) >= wanted - 1e-6:
            high = middle
        else:
            low = middle
    plan, more = _cheapest(curves, low), _cheapest(curves, high)
    for curve in sorted(curves, key=lambda c: (c.at(more[c.key]) - c.at(plan[c.key])) / c.size):
        missing = wanted - _zeros(curves, plan)
        if missing <= 1e-6:
            break
        exact = plan[curve.key] + missing / curve.size
        plan[curve.key] = min(more[curve.key], exact) if len(curve.levels) > 2 else more[curve.key]
    return plan


def _cheapest(curves: Sequence[Curve], logarithm: float) -> dict[str, float]:
    worth = float(np.exp(logarithm))
    total = sum(c.size for c in curves)
    return {c.key: float(c.levels[np.argmin(c.errors - worth * c.size / total * c.levels)]) for c in curves}


def _zeros(curves: Sequence[Curve], plan: Mapping[str, float]) -> float:
    return sum(c.size * plan[c.key] for c in curves)
