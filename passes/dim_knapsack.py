"""Widths by dynamic programming: the least sum of errors for what has to be saved.

    D[g][s] = min over n of D[g-1][s - saved_g(n)] + error_g(n)

as in SPDY (Frantar and Alistarh, arXiv:2201.13096), over `_BUCKETS` steps of savings. What a group saves depends on the
widths of the groups that its operators are shared with, so it is counted with the others as they were in the round
before, scaled so that all together save what they truly save.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["knapsack"]

Array = npt.NDArray[Any]
_BUCKETS = 2000
_ROUNDS = 4


def knapsack(
    ladders: Sequence[Sequence[int]],
    errors: Sequence[Sequence[float]],
    cost: Callable[[Sequence[int]], float],
    target: float,
    start: Sequence[int],
) -> list[int] | None:
    """Units to remove per group, of those on its ladder, so that the cost is at most `target`; `errors` go with the
    ladders. None if no round found such a plan. `start` is a plan to begin from.
    """
    whole = cost([0] * len(ladders))
    now, aim = list(start), target
    best: tuple[float, list[int]] | None = None
    for _ in range(_ROUNDS):
        saved = _savings(ladders, cost, now, whole)
        chosen = _solve(saved, errors, whole - aim)
        if chosen is None:
            break
        now = [ladder[k] for ladder, k in zip(ladders, chosen, strict=True)]
        reached = cost(now)
        error = sum(e[k] for e, k in zip(errors, chosen, strict=True))
        if reached <= target and (best is None or error < best[0]):
            best = (error, now)
        if reached > target:
            aim *= target / reached
    return None if best is None else best[1]


def _savings(
    ladders: Sequence[Sequence[int]], cost: Callable[[Sequence[int]], float], now: Sequence[int], whole: float
) -> list[Array]:
    """What each step of each group saves with the others as in `now`; the steps of `now` add up to what it saves."""
    found, total = [], 0.0
    for g, ladder in enumerate(ladders):
        plans = [[*now[:g], n, *now[g + 1 :]] for n in ladder]
        full = cost([*now[:g], 0, *now[g + 1 :]])
        row = np.array([full - cost(plan) for plan in plans])
        found.append(row)
        total += float(row[list(ladder).index(now[g])])
    factor = (whole - cost(now)) / total if total > 0 else 1.0
    return [row * factor for row in found]


def _solve(saved: Sequence[Array], errors: Sequence[Sequence[float]], needed: float) -> list[int] | None:
    """For each group the place on its ladder."""
    unit = max(needed, 1e-12) / _BUCKETS
    least = np.full(_BUCKETS + 1, np.inf)
    least[0] = 0.0
    states = np.arange(_BUCKETS + 1)
    trail: list[tuple[Array, Array]] = []  # for each group and state: the step taken, and the state before it
    for row, error in zip(saved, errors, strict=True):
        better = np.full(_BUCKETS + 1, np.inf)
        step, before = np.zeros(_BUCKETS + 1, np.int64), np.zeros(_BUCKETS + 1, np.int64)
        for k, (saving, price) in enumerate(zip(row.tolist(), error, strict=True)):
            reached = np.minimum(states + max(round(saving / unit), 0), _BUCKETS)
            # Several states end in the last one: the cheapest comes first and stays.
            order = np.argsort(least, kind="stable")
            ends, first = np.unique(reached[order], return_index=True)
            sources = order[first]
            candidate = least[sources] + price
            wins = candidate < better[ends]
            better[ends[wins]] = candidate[wins]
            step[ends[wins]], before[ends[wins]] = k, sources[wins]
        trail.append((step, before))
        least = better
    if not np.isfinite(least[_BUCKETS]):
        return None
    chosen, state = [], _BUCKETS
    for step, before in reversed(trail):
        chosen.append(int(step[state]))
        state = int(before[state])
    return chosen[::-1]
