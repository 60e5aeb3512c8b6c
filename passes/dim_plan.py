"""How many units each group loses: widths on a grid, and an allocation of error to gain, greedy and by dynamic
programming.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnxcomp.passes.dim_costs import Costs
from onnxcomp.passes.dim_knapsack import knapsack
from onnxcomp.passes.dims import Group
from onnxcomp.passes.importance import Curve

__all__ = ["Budget", "allocate", "channels_per_unit", "convolves", "levels", "uniform"]


_LEVELS = 64


@dataclass(frozen=True)
class Budget:
    """The share of `kind` (macs, params, work, time) that may stay; steps are compared by what they save of `price`."""

    kind: str
    share: float
    price: str

    def cost(self, costs: Costs, removed: Sequence[int]) -> float:
        return costs.of(self.kind, removed)


def channels_per_unit(group: Group) -> int:
    """Slices of the narrowest axis that one unit lies in: 1 for a channel, the size of a head for a head."""
    return min(group.axes.values())


def convolves(group: Group) -> bool:
    """Whether a weight of the group belongs to a convolution."""
    return any("Conv" in str(node.op) for tensor, _ in group.axes for node in tensor.outputs)


def levels(group: Group, grid: int, least: int) -> list[int]:
    """Numbers of units that may go, ascending from 0: what stays is a multiple of `grid` channels, at least `least`.

    A residual branch goes or stays. Matrix products take any width equally well: groups without a convolution have a
    finer grid, at most 64 levels.
    """
    if not group.axes:
        return [0, 1]
    size = channels_per_unit(group)
    step = grid // math.gcd(grid, size) if convolves(group) else max(1, group.width // _LEVELS)
    lowest = max(1, -(-least // size))
    kept = [k for k in range(group.width - 1, lowest - 1, -1) if k % step == 0]
    return [0, *(group.width - k for k in kept)]


def uniform(curves: Sequence[Curve], ratio: float, grid: int, least: int) -> list[int]:
    """The same share of every group, as near as the grid allows without taking more."""
    return [
        max((n for n in levels(c.group, grid, least) if n <= ratio * c.group.width + 1e-9), default=0) for c in curves
    ]


def allocate(
    curves: Sequence[Curve],
    costs: Costs,
    budget: Budget,
    *,
    grid: int,
    least: int,
) -> list[int]:
    """Units to remove per curve so that at most `budget.share` of the cost stays, or as near as the grid allows.

    Greedy: the step with the least added error per saved cost, over all wider steps of each group at once (which
    follows the lower convex hull of its curve); at last steps that are not needed are taken back, costliest first.
    """
    removed = [0] * len(curves)
    ladder = [levels(c.group, grid, least) for c in curves]
    whole = budget.cost(costs, removed)
    target = budget.share * whole
    now = whole
    history: list[tuple[int, int]] = []
    while now > target:
        best: tuple[float, int, int] | None = None
        for g, curve in enumerate(curves):
            for n in ladder[g]:
                if n <= removed[g]:
                    continue
                gain = costs.gain(budget.price, removed, g, n - removed[g])
                price = float(curve.errors[n] - curve.errors[removed[g]]) / max(gain, 1e-9)
                if gain > 0 and (best is None or price < best[0]):
                    best = (price, g, n)
        if best is None:
            break
        _, g, n = best
        history.append((g, removed[g]))
        removed[g] = n
        now = budget.cost(costs, removed)
    removed = _taken_back(curves, costs, budget, ladder, removed, target)
    if budget.kind != budget.price or now > target:
        return removed
    # One resource only: dynamic programming sees combinations that no sequence of steps reaches.
    errors = [[float(c.errors[n]) for n in steps] for c, steps in zip(curves, ladder, strict=True)]
    other = knapsack(ladder, errors, lambda plan: budget.cost(costs, plan), target, removed)
    return removed if other is None else min(removed, other, key=lambda plan: _error(curves, plan))


def _error(curves: Sequence[Curve], removed: Sequence[int]) -> float:
    return sum(float(curve.errors[n]) for curve, n in zip(curves, removed, strict=True))


def _taken_back(
    curves: Sequence[Curve], costs: Costs, budget: Budget, ladder: list[list[int]], removed: list[int], target: float
) -> list[int]:
    while True:
        best: tuple[float, int, int] | None = None
        for g, curve in enumerate(curves):
            for n in (n for n in ladder[g] if n < removed[g]):
                trial = [*removed[:g], n, *removed[g + 1 :]]
                saved = float(curve.errors[removed[g]] - curve.errors[n])
                if budget.cost(costs, trial) <= target and (best is None or saved > best[0]):
                    best = (saved, g, n)
        if best is None:
            return removed
        removed[best[1]] = best[2]
