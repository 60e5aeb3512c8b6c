"""Masks and weights from second moments."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp.passes.sparse_patterns import Pattern
from onnxcomp.passes.sparse_update import ROUGH, ROUNDS, Form, Method, select, solve_on

RNG = np.random.default_rng(0)


def correlated(groups: int = 2, length: int = 24, outputs: int = 6) -> tuple[np.ndarray, np.ndarray, Form]:
    """Inputs of which neighbours are alike, a weight, and its form."""
    x = RNG.normal(size=(groups, 400, length)) @ (np.eye(length) + 0.8 * np.eye(length, k=1))
    weight = RNG.normal(size=(groups, length, outputs))
    return x, weight, Form.of_itself(np.matmul(x.transpose(0, 2, 1), x) / 400, weight)


def test_the_error_is_that_of_the_outputs() -> None:
    x, weight, form = correlated()
    other = weight * (RNG.random(weight.shape) > 0.3)

    expected = np.square(x @ other - x @ weight).sum() / np.square(x @ weight).sum()

    assert form.error(other) == pytest.approx(expected)
    assert form.error(weight) == pytest.approx(0, abs=1e-12)


def test_weights_on_a_mask_are_the_least_squares_solution() -> None:
    x, weight, form = correlated()
    mask = RNG.random(weight.shape) > 0.5

    found = solve_on(form, mask, ridge=0.0)

    assert not found[~mask].any()
    for g in range(2):
        for o in range(6):
            kept = mask[g, :, o]
            exact = np.linalg.lstsq(x[g][:, kept], x[g] @ weight[g, :, o], rcond=None)[0]
            np.testing.assert_allclose(found[g, kept, o], exact, rtol=1e-3, atol=1e-3)


def test_nothing_changes_where_everything_stays() -> None:
    _, weight, form = correlated()
    np.testing.assert_allclose(solve_on(form, np.ones(weight.shape, bool)), weight)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "obs", "admm"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "2x1", "1x3"])
def test_every_method_makes_masks_of_every_pattern(method: Method, pattern: str) -> None:
    _, weight, form = correlated()

    mask = select(form, method, Pattern.parse(pattern), 1, 0.5)

    assert mask.mean() == pytest.approx(0.5, abs=0.01)
    assert form.error(solve_on(form, mask)) < form.error(weight * mask)


def test_second_order_masks_lose_less_than_those_by_magnitude() -> None:
    _, _, form = correlated(1, 64, 32)
    errors = {}
    methods: tuple[Method, ...] = ("magnitude", "wanda", "admm")
    for method in methods:
        errors[method] = form.error(solve_on(form, select(form, method, Pattern(), 1, 0.6)))

    assert errors["admm"] < 0.8 * min(errors["magnitude"], errors["wanda"])


def test_wanda_looks_at_the_inputs() -> None:
    weight = np.array([[[1.0], [2.0]]])
    form = Form.of_itself(np.diag([100.0, 1.0])[None], weight)

    assert select(form, "wanda", Pattern(), 1, 0.5).ravel().tolist() == [True, False]
    assert select(form, "magnitude", Pattern(), 1, 0.5).ravel().tolist() == [False, True]


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    moment = np.diag([1.0, 0.0, 2.0, 0.0])[None]
    form = Form.of_itself(moment, RNG.normal(size=(1, 4, 3)))
    methods: tuple[Method, ...] = ("obs", "admm")
    for method in methods:
        mask = select(form, method, Pattern(), 1, 0.5)
        found = solve_on(form, mask)
        assert np.isfinite(found).all()
        assert form.error(found) < 0.01


def stiff(length: int = 96, outputs: int = 8) -> Form:
    """A form whose moment has eigenvalues over six decades, as those of hidden layers have."""
    basis, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(length, length)))
    moment = (basis * np.logspace(0, -6, length)) @ basis.T
    return Form.of_itself(moment[None], np.random.default_rng(2).normal(size=(1, length, outputs)))


def test_few_rounds_tell_errors_well_enough_to_compare_them() -> None:
    form = stiff()
    for sparsity in (0.5, 0.8, 0.9):
        mask = select(form, "wanda", Pattern(), 1, sparsity)

        rough, exact = (form.error(solve_on(form, mask, rounds=r)) for r in (ROUGH, ROUNDS))

        assert exact <= rough < 1.3 * exact


def test_rounds_go_on_from_where_they_begin() -> None:
    form = stiff()
    mask = select(form, "wanda", Pattern(), 1, 0.5)
    before = solve_on(form, mask, 1e-2, rounds=10)

    after = solve_on(form, mask, 1e-4, rounds=10, begin=before)

    assert form.error(after) < form.error(before)
    assert form.error(after) < form.error(solve_on(form, mask, 1e-4, rounds=10))
