"""Allocation of zeros."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp.passes.sparse_plan import LEVELS, Curve, allocate, uniform


def curve(key: str, size: int, price: float) -> Curve:
    return Curve.through(key, size, LEVELS, [price * s**3 for s in LEVELS])


def share(curves: list[Curve], plan: dict[str, float]) -> float:
    return sum(c.size * plan[c.key] for c in curves) / sum(c.size for c in curves)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.73, 0.99])
def test_the_share_of_zeros_is_met(ratio: float) -> None:
    curves = [curve("a", 1000, 1.0), curve("b", 5000, 0.1), curve("c", 300, 20.0)]
    assert share(curves, allocate(curves, ratio)) == pytest.approx(ratio, abs=1e-6)


def test_zeros_go_where_they_cost_least() -> None:
    curves = [curve("cheap", 1000, 0.01), curve("dear", 1000, 1.0)]
    plan = allocate(curves, 0.5)
    assert plan["cheap"] > 0.8
    assert plan["dear"] < 0.2


def test_no_other_split_is_better() -> None:
    curves = [curve("a", 1000, 0.3), curve("b", 3000, 1.0)]
    plan = allocate(curves, 0.6)
    best = sum(c.at(plan[c.key]) for c in curves)
    for a in np.linspace(0, 0.99, 50):
        b = (0.6 * 4000 - 1000 * a) / 3000
        if b <= 0.99:
            assert curves[0].at(a) + curves[1].at(b) >= best * 0.98


def test_a_pattern_is_given_to_whole_weights() -> None:
    curves = [Curve.through(k, 100, (0.5,), (e,)) for k, e in (("a", 0.1), ("b", 0.2), ("c", 0.3))]
    assert allocate(curves, 0.3) == {"a": 0.5, "b": 0.5, "c": 0.0}
    assert allocate(curves, 0.9) == {"a": 0.5, "b": 0.5, "c": 0.5}
    assert uniform(curves, 0.5) == {"a": 0.5, "b": 0.5, "c": 0.5}


def test_measured_factors_change_the_curve() -> None:
    scaled = curve("a", 100, 1.0).scaled([0.5, 0.8], [10.0, 2.0])
    assert scaled.at(0.5) == pytest.approx(10 * 0.5**3)
    assert (np.diff(scaled.errors) >= 0).all()
