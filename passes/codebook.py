"""A weight as a few values: rows w_o ~ s_o c[i_o], with one codebook c for the tensor and a scale per output channel.

The codebook starts as the exact k-means of w / s (kmeans.py), each weight counting as much as its input does on average
(the diagonal of the second moments H). Then two steps take turns and the best result is kept:

* indices: rounding to the codebook with error compensation through H (rounding.py);
* centroids: for given indices the output error  sum over o of d_o H d_o^T,  d_o = s_o c[i_o] - w_o, is a quadratic
  form in c. Its minimum solves A c = b with A = sum s_o^2 Z_o^T H Z_o, b = sum s_o Z_o^T H w_o, Z_o the indicator of
  the indices. Conjugate gradients need products with A only, each of which is one product with H.

Zeros (sparse_update.py) come first, and what is left is solved for them. Pruned weights stay pruned: with `free` given,
zero is an entry of the codebook, and where `free` is false it is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.passes.kmeans import kmeans, midpoints, nearest_level
from onnxcomp.passes.rounding import Snap, round_groups, round_to_grid
from onnxcomp.passes.sparse_patterns import Pattern
from onnxcomp.passes.sparse_update import ROUGH, Form, Method, select, solve_on

__all__ = [
    "Problem", "Shared", "channel_scales", "compensated", "estimated", "fit", "nearest", "shared_as", "shrunk",
    "support", "thinned",
]  # fmt: skip

Array = npt.NDArray[Any]
_SHRINKAGE = 0.3
_LEAST = 1e-9
_MOST_WORK = 2e9  # multiplications of one of hundreds of steps, 100 ms
_SAMPLED = 1 << 12  # weights from which an error is estimated
_TOLERANCE = 1e-20  # of the squared right-hand side


@dataclass(frozen=True)
class Problem:
    """What is to be approximated: `rows` float64 [groups, outputs, K] and `moment` [groups, K, K].

    Without a moment all weights count alike. `free` (bool, shape of the rows) is false where zeros are to stay.
    `whole` is the largest entry of a codebook of whole numbers, None for one of any numbers. `lost` is noise power that
    the rows have already.
    """

    rows: Array
    moment: Array | None = None
    free: Array | None = None
    whole: int | None = None
    lost: float = 0.0

    @property
    def importance(self) -> Array:
        """How much the square of a change of each weight counts, shape of the rows."""
        if self.moment is None:
            return np.ones(self.rows.shape)
        diagonal = np.einsum("gkk->gk", self.moment)[:, None, :]
        return np.broadcast_to(np.maximum(diagonal, 1e-6 * diagonal.mean() + 1e-30), self.rows.shape)

    def error(self, values: Array) -> float:
        """Noise power at the output if the rows were `values`."""
        change = values - self.rows
        return self.lost + float(np.einsum("gok,gok->", self.through(change), change))

    @property
    def power(self) -> float:
        """Power of the output itself."""
        return float(np.einsum("gok,gok->", self.through(self.rows), self.rows))

    @property
    def work(self) -> int:
        """Multiplications of a product of all rows with the moments."""
        return int(self.rows.size * self.rows.shape[2])

    def through(self, change: Array) -> Array:
        return change if self.moment is None else np.matmul(change, self.moment)


@dataclass(frozen=True)
class Shared:
    """Rows ~ `scales` * `codes`: `codes` [groups, outputs, K] are entries of the ascending codebook `levels`."""

    codes: Array
    levels: Array
    scales: Array
    error: float

    @property
    def values(self) -> Array:
        return np.asarray(self.codes * self.scales)


def shrunk(moment: Array, rows: int) -> Array:
    """Second moments (1 - a) H + a diag(H) with a = min(1, 0.3 K / rows), no entry of the diagonal below 1e-9 of the
    largest: about the mean, constant inputs leave what rounding leaves.

    Few rows show correlations that other samples do not have (shrinkage, Ledoit and Wolf 2004); the factor is measured.
    """
    length = moment.shape[-1]
    share = min(1.0, _SHRINKAGE * length / max(rows, 1))
    found = np.asarray(moment * (1 - share + share * np.eye(length)))
    diagonal = np.einsum("gkk->gk", found)
    diagonal += np.maximum(_LEAST * diagonal.max(initial=0.0) + 1e-30 - diagonal, 0.0)  # a view: in place
    return found


def channel_scales(problem: Problem) -> Array:
    """Scales [groups, outputs, 1] that give all rows the same power, 1 for rows of zeros or next to that.

    For a codebook of whole numbers the largest weight becomes the largest entry.
    """
    importance = problem.importance
    rows = problem.rows if problem.free is None else np.where(problem.free, problem.rows, 0.0)
    mass = (importance * (rows != 0)).sum(axis=2, keepdims=True)
    power = (np.square(rows) * importance).sum(axis=2, keepdims=True)
    scales = np.sqrt(np.where(power > 0, power / np.where(mass > 0, mass, 1.0), 1.0))
    if problem.whole is not None:
        peak = float(np.abs(problem.rows / scales).max())
        scales = scales * (peak / problem.whole if peak > 0 else 1.0)
    stored = np.asarray(scales.astype(np.float32), np.float64)
    return np.where(stored >= np.finfo(np.float32).tiny, stored, 1.0)


def support(problem: Problem, zeros: float) -> Array:
    """Which weights stay (bool, shape of the rows) where a share of `zeros` is wanted."""
    weight = problem.rows.transpose(0, 2, 1)
    method: Method = "magnitude"
    if problem.moment is None:
        form = Form.of_itself(np.eye(weight.shape[1])[None], weight)
    else:
        form = Form.of_itself(problem.moment, weight)
        method = "admm" if problem.work <= _MOST_WORK else "wanda"
    stays = select(form, method, Pattern(), 1, zeros).transpose(0, 2, 1)
    return stays if problem.free is None else stays & problem.free


def thinned(problem: Problem, stays: Array) -> Problem:
    """The problem where only some weights stay: `rows` are solved for them, on their support, unless that takes long.

    For solved rows r and any row q with these zeros the error is that of r and (q - r) H (q - r)^T, as r is the
    projection on what is left; the first part is `lost` before a codebook is chosen.
    """
    rows = problem.rows * stays
    if problem.moment is not None and problem.work <= _MOST_WORK:
        form = Form.of_itself(problem.moment, problem.rows.transpose(0, 2, 1))
        solved = solve_on(form, stays.transpose(0, 2, 1), rounds=ROUGH).transpose(0, 2, 1)
        rows = np.ascontiguousarray(solved) if np.isfinite(solved).all() else rows
    return replace(problem, rows=rows, free=stays, lost=problem.error(rows))


def estimated(problem: Problem, scales: Array, count: int) -> float:
    """About the error of `nearest`, without what is lost before, if inputs did not correlate: from a sample."""
    targets, weights = problem.rows / scales, problem.importance * np.square(scales)
    if problem.free is not None:
        targets, weights, count = targets[problem.free], weights[problem.free], count - 1
    targets, weights = targets.reshape(-1), weights.reshape(-1)
    size = targets.size
    if size > _SAMPLED:
        chosen = np.random.default_rng(0).integers(0, size, _SAMPLED)
        targets, weights = targets[chosen], weights[chosen]
    if not targets.size:
        return 0.0
    levels = np.unique(_rounded(problem, kmeans(targets, weights, count)))
    return float((weights * np.square(targets - _snap(levels)(targets))).mean()) * size


def nearest(problem: Problem, scales: Array, count: int) -> Shared:
    """Weighted k-means, and each weight to the nearest of at most `count` entries."""
    levels = _codebook(problem, scales, count)
    return shared_as(problem, scales, levels, _nearest(problem, scales, levels))


def fit(problem: Problem, scales: Array, count: int, *, rounds: int = 3) -> Shared:
    """The best found in `rounds` turns of indices and centroids, one for a very large weight."""
    best = nearest(problem, scales, count)
    if problem.moment is None:
        return best
    levels = best.levels
    for _ in range(rounds if problem.work <= _MOST_WORK else 1):
        found = shared_as(problem, scales, levels, compensated(problem, scales, _snap(levels)))
        solved = _recentred(problem, found)
        best = min(best, found, solved, key=lambda s: s.error)
        if np.array_equal(levels, solved.levels):
            break
        levels = solved.levels
    return best


def _codebook(problem: Problem, scales: Array, count: int) -> Array:
    targets, weights = problem.rows / scales, problem.importance * np.square(scales)
    if problem.free is None:
        return np.unique(_rounded(problem, kmeans(targets, weights, count)))
    free = problem.free
    found = kmeans(targets[free], weights[free], max(count - 1, 1)) if free.any() else np.zeros(1)
    return np.unique(_rounded(problem, np.append(found, 0.0)))


def _rounded(problem: Problem, levels: Array) -> Array:
    """Whole numbers where these are asked for; no negative zero."""
    if problem.whole is not None:
        levels = np.clip(np.rint(levels), -problem.whole, problem.whole)
    return levels + 0.0


def _snap(levels: Array) -> Snap:
    borders = midpoints(levels)
    return lambda values: levels[np.searchsorted(borders, values)]


def _nearest(problem: Problem, scales: Array, levels: Array) -> Array:
    codes = _snap(levels)(problem.rows / scales)
    return codes if problem.free is None else np.where(problem.free, codes, 0.0)


def compensated(problem: Problem, scales: Array, snap: Snap) -> Array:
    """Codes that `snap` gives, with the error of each column made good in others (rounding.py)."""
    if problem.moment is None:
        codes = snap(problem.rows / scales)
        return codes if problem.free is None else np.where(problem.free, codes, 0.0)
    if len(problem.rows) > 1:
        return round_groups(problem.rows, scales, problem.moment, snap, problem.free)
    free = None if problem.free is None else problem.free[0]
    return round_to_grid(problem.rows[0], scales[0], problem.moment[0], snap, free, coarse=True)[None]


def shared_as(problem: Problem, scales: Array, levels: Array, codes: Array) -> Shared:
    return Shared(codes, levels, scales, problem.error(codes * scales))


def _recentred(problem: Problem, found: Shared) -> Shared:
    """The same indices with the codebook that is best for them, by conjugate gradients from the one that there is."""
    levels, scales = found.levels, found.scales
    index = nearest_level(levels, found.codes)
    movable = np.ones(len(levels)) if problem.free is None else (levels != 0).astype(np.float64)

    def gather(change: Array) -> Array:
        sums = np.bincount(index.reshape(-1), (scales * problem.through(change)).reshape(-1), len(levels))
        return np.asarray(sums * movable)

    start = gather(problem.rows - scales * levels[index])
    moved = _rounded(problem, levels + _conjugate_gradients(lambda c: gather(scales * c[index]), start))
    return shared_as(problem, scales, np.unique(moved), moved[index])


def _conjugate_gradients(product: Callable[[Array], Array], right: Array) -> Array:
    """x with A x = right, A symmetric and not negative, given its product with a vector."""
    x, residual = np.zeros_like(right), right.copy()
    direction, power = residual.copy(), float(residual @ residual)
    enough = _TOLERANCE * power
    for _ in range(min(len(right), 48)):
        image = product(direction)
        curvature = float(direction @ image)
        if power <= enough or curvature <= 0:
            break
        x += power / curvature * direction
        residual -= power / curvature * image
        power, before = float(residual @ residual), power
        direction = residual + power / before * direction
    return x
