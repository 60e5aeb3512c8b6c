"""Even grids with codes of variable length: their bits are real, and they beat codebooks of the same size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.passes.codebook import Problem, fit
from onnxcomp.passes.codec_plans import plans
from onnxcomp.passes.entropy_grid import SLOPE, cheapest, estimated_grid, fit_grid, rate

Array = npt.NDArray[Any]


def problem(*, mixed: bool = True, free: Array | None = None) -> Problem:
    """Weights as training leaves them, most small and few large, and inputs that correlate."""
    rng = np.random.default_rng(0)
    rows = rng.laplace(0, 0.05, (1, 48, 144))
    mixing = rng.standard_normal((144, 144)) * np.geomspace(1, 0.1, 144) if mixed else np.eye(144)
    moment = mixing @ mixing.T / 144
    return Problem(rows if free is None else rows * free, moment[None], free)


@pytest.mark.parametrize("step", [0.25, 0.15, 0.08, 0.04, 0.015])
def test_the_bits_are_those_of_the_smallest_encoding(step: float) -> None:
    found = fit_grid(problem(), step)

    values = found.values.astype(np.float32)
    smallest = min(plan.nbytes for plan in plans(values))
    assert rate(found.levels, found.codes).bits(values.size) == pytest.approx(8 * smallest / values.size, rel=0.03)


@pytest.mark.parametrize(("bits", "closer"), [(2, 1.25), (3, 1.35), (4, 1.7)])
def test_at_the_same_bits_a_grid_is_closer_than_a_codebook(bits: int, closer: float) -> None:
    asked = problem()
    codebook = fit(asked, np.ones((1, 48, 1)), 1 << bits)
    size = bits + 32 * (1 << bits) / codebook.codes.size

    grids = [fit_grid(asked, step) for step in 0.25 * 2.0 ** -np.arange(0, 6, 0.25)]
    best = min(g.error for g in grids if rate(g.levels, g.codes).bits(g.codes.size) <= size)

    assert best < codebook.error / closer


def test_errors_are_made_good_where_inputs_correlate() -> None:
    asked, step = problem(), 0.1

    estimate, _ = estimated_grid(asked, step)

    assert fit_grid(asked, step).error < 0.7 * estimate


def test_the_estimate_holds_where_they_do_not() -> None:
    asked = problem(mixed=False)

    estimate, bits = estimated_grid(asked, 0.1)
    found = fit_grid(asked, 0.1)

    assert found.error == pytest.approx(estimate, rel=0.1)
    assert rate(found.levels, found.codes).bits(found.codes.size) == pytest.approx(bits, rel=0.03)


def test_pruned_weights_stay_pruned_and_zero_stays_zero() -> None:
    free = np.random.default_rng(1).random((1, 48, 144)) > 0.7

    found = fit_grid(problem(free=free), 0.1)

    assert not found.values[~free].any()
    assert 0.0 in found.levels


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from((0.05, 0.3, 1.0)), st.floats(0.5, 30))
def test_every_number_goes_to_the_value_that_is_cheapest(seed: int, step: float, tail: float) -> None:
    rng = np.random.default_rng(seed)
    numbers = np.append(rng.laplace(0, 0.3, 300), rng.standard_normal(3) * tail * step)  # a few far from the others
    most = min(math.ceil(np.abs(numbers).max() / step), 127)
    levels = step * np.arange(-most, most + 1)

    found = cheapest(levels, numbers, step)(numbers)

    used = rate(levels, levels[np.abs(numbers[:, None] - levels).argmin(axis=1)])
    costs = np.square(numbers[:, None] - levels) + SLOPE * step**2 * used.lengths
    taken = costs[np.arange(len(numbers)), np.searchsorted(levels, found)]
    np.testing.assert_allclose(taken, costs.min(axis=1), rtol=1e-6, atol=1e-9)


def test_a_grid_has_no_more_values_than_a_table_holds() -> None:
    found = fit_grid(problem(), 1e-4)

    assert len(found.levels) <= 255
