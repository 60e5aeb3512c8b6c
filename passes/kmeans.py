"""Exact k-means on a line: the codebook that is nearest to a set of weighted numbers.

On sorted points the clusters of an optimal solution are intervals, so that dynamic programming finds it. With D_m[j]
the least cost of the first j points in m clusters and c(i, j) the cost of points i .. j-1 around their mean,

    D_m[j] = min over i of  D_{m-1}[i] + c(i, j),      c(i, j) = sum w x^2 - (sum w x)^2 / sum w

c comes from prefix sums in O(1), and the best i grows with j, so that divide and conquer needs O(n log n) for each m
(Wu 1991, Wang and Song 2011, Groenlund et al., arXiv:1701.07204). All subproblems of one depth are solved in one sweep.
Many points are first summed up in the bins of a histogram, and the result is polished on all of them (Lloyd).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["kmeans", "midpoints", "nearest_level"]

Array = npt.NDArray[Any]
_BINS = 2048
_BINS_PER_LEVEL = 64
_LLOYD = 8


def kmeans(values: Array, weights: Array, count: int) -> Array:
    """At most `count` ascending centroids (float64) that minimize sum of w (x - nearest centroid)^2.

    `values` and `weights` are of one shape, weights not negative; where all are zero, they count alike. Exact up to
    the width of a bin for more than 2048 distinct points.
    """
    x, w = _merged(values, weights)
    if len(x) <= count:
        return x
    points, mass = (x, w) if len(x) <= _BINS else _binned(x, w, min(_BINS, _BINS_PER_LEVEL * count))
    edges = _partition(points, mass, count)
    centroids = _means(points, mass, edges)
    return centroids if len(points) == len(x) else _polished(x, w, centroids)


def midpoints(levels: Array) -> Array:
    """Where the nearest of ascending levels changes."""
    return np.asarray((levels[1:] + levels[:-1]) / 2)


def nearest_level(levels: Array, values: Array) -> Array:
    """Index of the level (ascending) that is nearest to each value, int64."""
    return np.asarray(np.searchsorted(midpoints(levels), values))


def _merged(values: Array, weights: Array) -> tuple[Array, Array]:
    """Distinct points in ascending order, float64, with the sums of their weights, all positive."""
    flat, mass = values.reshape(-1).astype(np.float64), weights.reshape(-1).astype(np.float64)
    if not mass.any():
        mass = np.ones_like(mass)
    x, index = np.unique(flat, return_inverse=True)
    w = np.bincount(index, weights=mass, minlength=len(x))
    floor = float(w.max()) * 1e-12  # a point that hardly counts still belongs to some cluster
    return x, np.maximum(w, floor)


def _binned(x: Array, w: Array, bins: int) -> tuple[Array, Array]:
    """Weighted means of the points in each bin that has any, and their weights.

    With n `bins` each is at most 2 / n of the range wide and holds at most 2 / n of the points: where a few large ones
    make the range, the others still get as many bins.
    """
    half = bins // 2
    by_value = ((x - x[0]) / (x[-1] - x[0]) * half).astype(np.int64)
    by_rank = np.arange(len(x)) * half // len(x)
    _, index = np.unique(by_value + by_rank, return_inverse=True)  # both grow with x: equal sums are equal bins
    mass = np.bincount(index, weights=w)
    return np.asarray(np.bincount(index, weights=w * x) / mass), mass


def _partition(x: Array, w: Array, count: int) -> Array:
    """Starts of the `count` intervals of an optimal partition, and its end, int64 [count + 1]."""
    n = len(x)
    shifted = x - np.average(x, weights=w)  # differences of prefix sums lose fewer digits around zero
    sums = [np.concatenate([[0.0], np.cumsum(w * shifted**p)]) for p in range(3)]
    cost = _cost(sums, np.zeros(n + 1, np.int64), np.arange(n + 1))
    starts = np.zeros((count, n + 1), np.int64)
    for m in range(1, count):
        cost, starts[m] = _next_row(cost, sums, m)
    edges = np.empty(count + 1, np.int64)
    edges[count] = n
    for m in range(count - 1, -1, -1):
        edges[m] = starts[m, edges[m + 1]] if m else 0
    return edges


def _cost(sums: list[Array], i: Array, j: Array) -> Array:
    mass = sums[0][j] - sums[0][i]
    first = sums[1][j] - sums[1][i]
    return np.asarray(np.maximum(sums[2][j] - sums[2][i] - first * first / np.where(mass > 0, mass, 1.0), 0.0))


def _next_row(before: Array, sums: list[Array], m: int) -> tuple[Array, Array]:
    """D_m and where its last cluster starts, from D_{m-1}: the middle of each open range, breadth first."""
    n = len(before) - 1
    row, start = np.full(n + 1, np.inf), np.zeros(n + 1, np.int64)
    low, high = np.array([m + 1]), np.array([n])  # ends j still open; m + 1 points have to fill m + 1 clusters
    first, last = np.array([m]), np.array([n - 1])  # starts i that can be best for them
    while len(low):
        middle = (low + high) // 2
        stop = np.minimum(last, middle - 1)
        lengths = stop - first + 1
        begins = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        i = np.arange(lengths.sum()) - np.repeat(begins - first, lengths)
        costs = before[i] + _cost(sums, i, np.repeat(middle, lengths))
        best = np.minimum.reduceat(costs, begins)
        hits = np.flatnonzero(costs == np.repeat(best, lengths))
        pick = i[hits[np.searchsorted(hits, begins)]]
        row[middle], start[middle] = best, pick
        left, right = low < middle, middle < high
        low, high, first, last = (
            np.concatenate([a[left], b[right]])
            for a, b in ((low, middle + 1), (middle - 1, high), (first, pick), (pick, last))
        )
    return row, start


def _means(x: Array, w: Array, edges: Array) -> Array:
    """Weighted means of the points in each interval."""
    return np.asarray(np.add.reduceat(w * x, edges[:-1]) / np.add.reduceat(w, edges[:-1]))


def _polished(x: Array, w: Array, centroids: Array) -> Array:
    """Lloyd's iterations on all points; a centroid that loses its points goes."""
    for _ in range(_LLOYD):
        index = nearest_level(centroids, x)
        mass = np.bincount(index, weights=w, minlength=len(centroids))
        sums = np.bincount(index, weights=w * x, minlength=len(centroids))
        moved = sums[mass > 0] / mass[mass > 0]
        if len(moved) == len(centroids) and np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids
