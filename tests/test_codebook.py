"""Codebooks: second-order assignment, closed-form centroids, zeros that stay."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcomp.passes.codebook import Problem, channel_scales, estimated, fit, nearest, shrunk, support, thinned
from onnxcomp.passes.rounding import round_to_grid


@pytest.fixture(autouse=True)
def same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has the same random numbers, whichever ran before it."""
    monkeypatch.setitem(globals(), "RNG", np.random.default_rng(0))


RNG = np.random.default_rng(0)


def correlated(groups: int, length: int) -> np.ndarray:
    mixing = RNG.standard_normal((groups, length, length // 2)) + 0.5
    return np.matmul(mixing, mixing.transpose(0, 2, 1)) + 0.05 * np.eye(length)


def problem(groups: int = 1, outputs: int = 24, length: int = 32, **rest: object) -> Problem:
    rows = RNG.standard_normal((groups, outputs, length)) * RNG.uniform(0.3, 3.0, (groups, outputs, 1))
    return Problem(rows, correlated(groups, length), **rest)  # type: ignore[arg-type]


def ones(p: Problem) -> np.ndarray:
    return np.ones((*p.rows.shape[:2], 1))


def test_second_order_assignment_beats_nearest_k_means_by_far() -> None:
    p = problem()

    assert fit(p, ones(p), 8).error < 0.3 * nearest(p, ones(p), 8).error


def test_the_error_of_the_result_is_that_of_its_values() -> None:
    p = problem(groups=3, length=9)

    found = fit(p, channel_scales(p), 4)

    change = found.values - p.rows
    assert p.moment is not None
    assert np.isclose(found.error, np.einsum("gok,gkl,gol->", change, p.moment, change))
    assert np.all(np.isin(found.codes, found.levels))
    assert len(found.levels) <= 4


def test_scales_per_channel_help_where_channels_differ() -> None:
    p = problem()

    assert fit(p, channel_scales(p), 4).error < 0.9 * fit(p, ones(p), 4).error


def test_centroids_are_the_minimum_for_their_indices() -> None:
    p = problem()
    found = fit(p, ones(p), 4)
    error = found.error

    for move in (-1e-3, 1e-3):
        for level in found.levels:
            moved = np.where(found.codes == level, level + move, found.codes)
            assert p.error(moved) > error * (1 - 1e-9)


def test_zeros_stay_and_count_as_an_entry() -> None:
    p = problem()
    free = RNG.random(p.rows.shape) > 0.5
    p = Problem(np.where(free, p.rows, 0.0), p.moment, free)

    found = fit(p, ones(p), 4)

    assert not found.values[~free].any()
    assert len(np.unique(found.values)) <= 4
    assert found.error < nearest(p, ones(p), 4).error


def test_a_codebook_of_whole_numbers_holds_such_in_range() -> None:
    p = problem(whole=127)

    found = fit(p, channel_scales(p), 16)

    assert np.array_equal(found.levels, np.rint(found.levels))
    assert np.abs(found.levels).max() <= 127
    assert len(found.levels) <= 16


def test_no_single_code_can_be_moved_to_a_better_entry() -> None:
    rows, moment = RNG.standard_normal((6, 8)), correlated(1, 8)[0]
    levels = np.array([-1.5, -0.4, 0.5, 1.6])
    damped = moment + np.eye(8) * (0.01 * np.trace(moment) / 8)

    def error(values: np.ndarray) -> float:
        return float(np.einsum("ok,kl,ol->", values - rows, damped, values - rows))

    def snap(values: np.ndarray) -> np.ndarray:
        return levels[np.abs(np.asarray(values)[..., None] - levels).argmin(axis=-1)]

    found = rows
    for _ in range(8):
        found = round_to_grid(rows, np.ones((6, 1)), moment, snap)

    nearest = error(snap(rows))
    assert error(found) < nearest
    assert np.all(np.isin(found, levels))


def test_few_rows_are_shrunk_to_the_diagonal() -> None:
    moment = correlated(1, 8)

    assert np.array_equal(shrunk(moment, 1)[0], np.diag(np.diag(moment[0])))
    assert np.allclose(shrunk(moment, 10**9), moment)


def test_what_stays_of_a_thinned_weight_is_what_the_others_cannot_replace() -> None:
    rows = np.ones((1, 1, 3))
    twins = np.array([[[1.0, 0.999, 0.0], [0.999, 1.0, 0.0], [0.0, 0.0, 1.0]]])  # inputs 0 and 1 are nearly the same

    problem = Problem(rows, twins)
    found = thinned(problem, support(problem, 1 / 3))

    assert found.free is not None
    assert found.free[0, 0, 2]
    assert found.free.sum() == 2
    assert found.rows[0, 0].max() == pytest.approx(2.0, rel=0.01)  # one of the twins does the work of both
    assert found.lost < 0.01


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0.0, 0.99), st.integers(0, 5))
def test_a_share_of_zeros_is_kept_and_old_zeros_stay(zeros: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((2, 5, 8))
    free = rng.random(rows.shape) > 0.3

    rows[~free] = 0.0

    problem = Problem(rows, None, free)
    found = thinned(problem, support(problem, zeros))

    assert found.free is not None
    assert not found.free[~free].any()
    assert abs(int(found.free.sum()) - min(free.sum(), round((1 - zeros) * rows.size))) <= 1
    assert found.lost == pytest.approx(np.square(rows[~found.free]).sum())


def test_an_estimate_is_close_to_the_error_of_the_nearest_level() -> None:
    rng = np.random.default_rng(2)
    p = Problem(rng.standard_normal((1, 200, 100)), np.eye(100)[None] * rng.random(100))
    scales = ones(p)

    assert estimated(p, scales, 8) == pytest.approx(nearest(p, scales, 8).error, rel=0.1)
    sparse = thinned(p, support(p, 0.5))
    assert sparse.lost + estimated(sparse, scales, 5) == pytest.approx(nearest(sparse, scales, 5).error, rel=0.1)


@pytest.mark.parametrize("whole", [None, 127])
def test_rows_next_to_zero_have_scales_to_divide_by(whole: int | None) -> None:
    p = problem(groups=2, length=9, whole=whole)
    p.rows[0, 0], p.rows[1, 1] = 1e-60, 0.0

    scales = channel_scales(p)

    assert scales.min() >= np.finfo(np.float32).tiny
    assert np.isfinite(fit(p, scales, 8).error)


def test_moments_that_rounding_left_negative_do_no_harm() -> None:
    rng = np.random.default_rng(3)
    moment = correlated(3, 9)
    moment[1] = -1e-7 * np.eye(9)  # a group whose inputs are constant
    moment[2, 4, 4] = -1e-3
    p = Problem(rng.standard_normal((3, 4, 9)), shrunk(moment, 10_000))

    sparse = thinned(p, support(p, 0.5))
    found = fit(sparse, channel_scales(sparse), 5)

    assert np.isfinite(sparse.rows).all()
    assert np.isfinite(found.error)


def test_the_moment_that_is_shrunk_stays_as_it_is() -> None:
    moment = correlated(1, 5)
    moment[0, 0, 0] = 0.0
    before = moment.copy()

    shrunk(moment, 3)

    assert np.array_equal(moment, before)


def test_a_weight_that_is_too_large_to_be_solved_loses_its_smallest_products(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(length=12)
    monkeypatch.setattr("onnxcomp.passes.codebook._MOST_WORK", 0)

    sparse = thinned(p, support(p, 0.5))

    assert sparse.free is not None
    assert sparse.free.mean() == pytest.approx(0.5, abs=0.01)
    assert np.array_equal(sparse.rows, p.rows * sparse.free)
    assert np.isfinite(fit(sparse, ones(sparse), 5).error)
