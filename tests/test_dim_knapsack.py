"""Widths by dynamic programming, against all combinations."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp.passes.dim_knapsack import knapsack

WIDTHS = [64, 48, 32]
LADDERS = [[0, 16, 32], [0, 16, 32], [0, 8, 16]]


def cost(removed: object) -> float:
    """A chain: each operator costs the product of the widths at its ends."""
    kept = [w - n for w, n in zip(WIDTHS, removed, strict=True)]  # type: ignore[call-overload]
    return float(3 * kept[0] + kept[0] * kept[1] + kept[1] * kept[2] + 10 * kept[2])


@given(st.integers(0, 10_000), st.floats(0.4, 0.95))
def test_a_plan_keeps_the_target_and_is_near_the_best(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    errors = [np.sort(rng.exponential(size=len(steps))).tolist() for steps in LADDERS]
    for row in errors:
        row[0] = 0.0
    target = share * cost([0, 0, 0])
    combinations = list(itertools.product(*(range(len(steps)) for steps in LADDERS)))
    plans = {c: [steps[k] for steps, k in zip(LADDERS, c, strict=True)] for c in combinations}
    fitting = [c for c in combinations if cost(plans[c]) <= target]
    found = knapsack(LADDERS, errors, cost, target, plans[max(combinations)])
    if found is not None:
        assert cost(found) <= target
        assert all(n in steps for n, steps in zip(found, LADDERS, strict=True))
    if not fitting:
        assert found is None


def test_independent_savings_are_solved_exactly() -> None:
    saved = {0: 0.0, 1: 3.0, 2: 5.0, 3: 6.0}
    errors = [[0.0, 1.0, 4.0, 9.0], [0.0, 2.0, 2.5, 3.0], [0.0, 0.5, 5.0, 6.0]]

    def left(plan: object) -> float:
        return 18.0 - sum(saved[n] for n in plan)  # type: ignore[attr-defined]

    found = knapsack([list(saved)] * 3, errors, left, 18.0 - 9.0, [3, 3, 3])
    assert found == [0, 3, 1]


def test_a_target_out_of_reach_has_no_plan() -> None:
    assert knapsack(LADDERS, [[0.0, 1.0, 2.0]] * 3, cost, 1.0, [32, 32, 16]) is None
