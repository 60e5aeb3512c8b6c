"""Exact k-means on a line."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.passes.kmeans import kmeans, nearest_level


def cost(x: np.ndarray, w: np.ndarray, levels: np.ndarray) -> float:
    return float((w * np.square(x - levels[nearest_level(levels, x)])).sum())


def least(x: np.ndarray, w: np.ndarray, count: int) -> float:
    """The cost of the best partition into intervals, by trying all."""
    order = np.argsort(x)
    x, w = x[order], w[order]
    best = float("inf")
    for cuts in itertools.combinations(range(1, len(x)), min(count, len(x)) - 1):
        parts = [slice(a, b) for a, b in itertools.pairwise([0, *cuts, len(x)])]
        means = [np.average(x[p], weights=w[p]) for p in parts]
        best = min(best, sum(float((w[p] * np.square(x[p] - m)).sum()) for p, m in zip(parts, means, strict=True)))
    return best


POINTS = st.lists(st.tuples(st.integers(-50, 50), st.floats(0.01, 10.0)), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(POINTS, st.integers(1, 9))
def test_no_partition_of_the_points_is_better(points: list[tuple[int, float]], count: int) -> None:
    x, w = np.array([p[0] for p in points], np.float64), np.array([p[1] for p in points])

    levels = kmeans(x, w, count)

    assert len(levels) <= count
    assert np.all(np.diff(levels) > 0)
    assert cost(x, w, levels) <= least(x, w, count) + 1e-9


def test_many_points_cost_no_more_than_the_histogram_allows() -> None:
    x = np.random.default_rng(0).standard_normal(6000)
    w = np.ones(len(x))

    levels = kmeans(x, w, 8)
    known = 0.03455  # of 8 levels for the normal distribution (Lloyd 1957, Max 1960)

    assert abs(cost(x, w, levels) / len(x) - known) < 0.002


def test_heavy_points_get_levels_of_their_own() -> None:
    x = np.array([0.0, 1.0, 1.1, 1.2, 5.0])

    levels = kmeans(x, np.array([1.0, 1000.0, 1000.0, 1.0, 1.0]), 4)

    assert {1.0, 1.1} <= set(np.round(levels, 3))


def test_few_distinct_values_stay_as_they_are() -> None:
    assert kmeans(np.array([[3.0, 1.0], [1.0, 3.0]]), np.zeros((2, 2)), 4).tolist() == [1.0, 3.0]


def test_a_few_large_values_leave_the_others_their_levels() -> None:
    x = np.append(np.random.default_rng(1).standard_normal(4000) * 1e-3, [1e3, -1e3])

    levels = kmeans(x, np.ones(len(x)), 256)

    assert len(levels) == 256
    assert cost(x, np.ones(len(x)), levels) < 1e-4 * np.square(x[:-2]).sum()
