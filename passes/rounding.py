"""Rounding weights so that the outputs, not the weights, stay close.

Nearest rounding minimizes |W' - W|. The output error is d (H - m m^T) d^T with d = W' - W (see gram.py), so
an error made in one column can be made good in the columns that correlate with it. With a grid of values that the
scale s of a row multiplies (whole numbers, or the entries of a codebook), column by column from the last
(GPTQ, Frantar et al., arXiv:2210.17323, in the form of Babai's nearest plane, which needs no inverse), with L the
Cholesky factor of the damped covariance, so that the error is |L^T (w - s q)|^2:

    q_j = snap((w_j + sum_{k > j} L_kj e_k / L_jj) / s),   e_j = w_j - s q_j

and then coordinate descent: for the gradient g = d C, q_j moves to snap(q_j - g_j / (s C_jj)), which is best for it
while the others stay. The mean goes into the bias exactly: b' = b - (W' - W) m. In a weight that was made sparse on
purpose a zero keeps code 0, so that no compensation brings back what was pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.gram import Gram
from onnxcomp.linear import Linear
from onnxcomp.passes.qdq import QuantizedWeight
from onnxcomp.passes.sparse_patterns import held_zeros

__all__ = ["Snap", "as_rows", "from_rows", "round_groups", "round_shared", "round_to_grid", "round_with"]

Array = npt.NDArray[Any]
Snap = Callable[[Array], Array]  # the value of the grid that is nearest to each number
_DAMPING = 0.01  # of the mean diagonal: keeps columns that were hardly seen from running away
_SWEEPS = 2
_LONG = 64  # entries of a row from which only its own scale is tried
_FACTORS = np.append(1.0, np.linspace(0.8, 1.2, 24))  # of the scales that are tried


def as_rows(view: Linear, weight: Array) -> Array:
    """The weight as [groups, outputs per group, K], in the order of `gram.py.patches`."""
    if view.op == "Conv":
        return np.asarray(weight.reshape(view.groups, weight.shape[0] // view.groups, -1))
    return np.asarray((weight if view.transposed else weight.T)[None])


def from_rows(view: Linear, rows: Array) -> Array:
    """The inverse of `as_rows`."""
    if view.op == "Conv":
        return rows.reshape(view.weight.shape)
    return np.asarray(rows[0] if view.transposed else rows[0].T)


def round_with(
    view: Linear,
    nearest: QuantizedWeight,
    gram: Gram,
    *,
    centered: bool = True,
    limit: int = 127,
    noise: float = 0.0,
) -> tuple[QuantizedWeight, Array]:
    """Codes that keep the output of the operator close, and the change of the bias (float64 [outputs]) that goes with
    them. `nearest` gives the scales. Without a bias to put the mean into (`centered` false) the full second moment
    counts, and the change is of no use. `noise` is the variance that rounding adds to each input: the weight to come
    close to is then the one that is best behind it, W C (C + noise I)^-1 (ridge regression).
    """
    rounded, shifts = round_shared(view, nearest, [gram], centered=centered, limit=limit, noise=noise)
    return rounded, shifts[0]


def round_shared(
    view: Linear,
    nearest: QuantizedWeight,
    grams: Sequence[Gram],
    *,
    centered: bool = True,
    limit: int = 127,
    noise: float = 0.0,
) -> tuple[QuantizedWeight, list[Array]]:
    """`round_with` for operators that share a weight, with the second moments of each: one weight, and a change of the
    bias for each of them.
    """
    w = as_rows(view, view.weight.values.astype(np.float64) * view.alpha)
    groups, outputs, _ = w.shape
    scales = nearest.scales.astype(np.float64).reshape(groups, outputs, 1)
    rows = sum(gram.rows for gram in grams)
    moments = [gram.covariance if centered else gram.products / max(gram.rows, 1) for gram in grams]
    covariance = np.sum([gram.rows / max(rows, 1) * c for gram, c in zip(grams, moments, strict=True)], axis=0)
    free = np.ones(w.shape, bool) if held_zeros(w) is None else w != 0
    noisy = covariance + noise * np.eye(w.shape[2])
    target = np.linalg.solve(noisy, covariance @ w.swapaxes(1, 2)).swapaxes(1, 2) if noise > 0 else w
    codes, scales = _with_best_scales(target, scales, noisy, limit, free)
    shifts = [-np.einsum("gok,gk->go", codes * scales - w, gram.mean).reshape(-1) for gram in grams]
    stored = np.ascontiguousarray(from_rows(view, codes).astype(np.int8))
    return QuantizedWeight(stored, scales.astype(np.float32).reshape(-1), nearest.axis), shifts


def _with_best_scales(w: Array, scale: Array, covariance: Array, limit: int, free: Array) -> tuple[Array, Array]:
    """Codes [groups, outputs, K] and scales [groups, outputs, 1]: of several near `scale` those with the least error.

    Short rows have scales, smaller and larger ones, at which by chance most weights lie near a code (0.9 dB on the
    outputs of EfficientNet-Lite0 with int8 weights only). In long rows such chances even out.
    """
    groups, outputs, length = w.shape
    factors = _FACTORS if length < _LONG else np.ones(1)
    tried = len(factors)
    rows, kept = (np.tile(x, (1, tried, 1)) for x in (w, free))
    steps = (factors[:, None, None] * scale[:, None]).astype(np.float32).astype(np.float64).reshape(groups, -1, 1)
    codes = _rounded(rows, steps, covariance, lambda v: np.clip(np.rint(v), -limit, limit), kept)
    off = codes * steps - rows
    errors = np.einsum("gok,gok->go", off @ _damped(covariance), off).reshape(groups, tried, outputs)
    best = (errors.argmin(axis=1) * outputs + np.arange(outputs))[:, :, None]
    return np.take_along_axis(codes, best, 1), np.take_along_axis(steps, best, 1)


def _rounded(w: Array, scale: Array, covariance: Array, snap: Snap, free: Array) -> Array:
    """`round_to_grid` for each group."""
    if len(w) == 1:
        return round_to_grid(w[0], scale[0], covariance[0], snap, free[0])[None]
    return round_groups(w, scale, covariance, snap, free, coarse=False)


def round_to_grid(
    w: Array, scale: Array, covariance: Array, snap: Snap, free: Array | None = None, *, coarse: bool = False
) -> Array:
    """Values of the grid, [outputs, K], that keep (scale * values - w) C (scale * values - w)^T small.

    `w` is [outputs, K], `scale` [outputs, 1] or [outputs, K], `covariance` [K, K]. Entries where `free` is false become
    0. Column-wise compensation (nearest rounding where the covariance has no inverse), then coordinate descent.

    What is rounded first has all others left to make its error good: on a `coarse` grid the columns that count most
    come first. On 8 bits that gains nothing, and where samples are few it loses (measured: 2 dB on SqueezeNet).
    """
    scale = np.broadcast_to(scale, w.shape)
    damped = _damped(covariance)
    order = np.argsort(np.diag(damped), kind="stable") if coarse else np.arange(len(damped))
    w, scale, damped = w[:, order], scale[:, order], damped[np.ix_(order, order)]
    kept = np.ones(w.shape, bool) if free is None else free[:, order]
    codes = _compensate(w, scale, damped, snap, kept)
    if codes is None:
        codes = np.where(kept, snap(w / scale), 0.0)
    found = np.empty(w.shape)
    found[:, order] = _descend(w, scale, damped, codes, snap, kept)
    return found


def _damped(covariance: Array) -> Array:
    """Second moments [..., K, K] with something on the diagonal."""
    length = covariance.shape[-1]
    more = _DAMPING * np.trace(covariance, axis1=-2, axis2=-1) / length + 1e-12
    return np.asarray(covariance + np.eye(length) * more[..., None, None])


def round_groups(
    w: Array, scale: Array, covariance: Array, snap: Snap, free: Array | None = None, *, coarse: bool = True
) -> Array:
    """`round_to_grid`, all groups at once: `w` [groups, outputs, K], `covariance` [groups, K, K]."""
    scale = np.broadcast_to(scale, w.shape)
    length = w.shape[2]
    damped = _damped(covariance)
    order = np.broadcast_to(np.arange(length), damped.shape[:2])
    if coarse:
        order = np.argsort(np.einsum("gkk->gk", damped), axis=1, kind="stable")
    rows = order[:, None, :]
    w, scale = np.take_along_axis(w, rows, 2), np.take_along_axis(scale, rows, 2)
    kept = np.ones(w.shape, bool) if free is None else np.take_along_axis(free, rows, 2)
    damped = np.take_along_axis(np.take_along_axis(damped, order[:, :, None], 1), rows, 2)
    try:
        factor = np.linalg.cholesky(damped)
    except np.linalg.LinAlgError:
        factor = np.zeros_like(damped) + np.eye(length)  # no column makes good what another one lost
    codes, pull = np.empty_like(w), np.zeros_like(w)
    for j in range(length - 1, -1, -1):
        target = w[:, :, j] + pull[:, :, j] / factor[:, None, j, j]
        codes[:, :, j] = np.where(kept[:, :, j], snap(target / scale[:, :, j]), 0.0)
        error = w[:, :, j] - codes[:, :, j] * scale[:, :, j]
        pull[:, :, :j] += error[:, :, None] * factor[:, None, j, :j]
    gradient = np.matmul(codes * scale - w, damped)
    for _ in range(_SWEEPS):
        for j in range(length):
            best = snap(codes[:, :, j] - gradient[:, :, j] / (scale[:, :, j] * damped[:, None, j, j]))
            best = np.where(kept[:, :, j], best, codes[:, :, j])
            gradient += ((best - codes[:, :, j]) * scale[:, :, j])[:, :, None] * damped[:, None, j]
            codes[:, :, j] = best
    found = np.empty_like(codes)
    np.put_along_axis(found, rows, codes, 2)
    return found


def _compensate(w: Array, scale: Array, covariance: Array, snap: Snap, free: Array) -> Array | None:
    """Codes column by column, from the last to the first; None if the covariance is not positive definite."""
    try:
        factor = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        return None
    codes, pull = np.empty_like(w), np.zeros_like(w)
    block = 64  # columns whose errors reach what lies before them in one product
    for end in range(w.shape[1], 0, -block):
        begin = max(end - block, 0)
        errors = np.empty((w.shape[0], end - begin))
        for j in range(end - 1, begin - 1, -1):
            target = w[:, j] + pull[:, j] / factor[j, j]
            codes[:, j] = np.where(free[:, j], snap(target / scale[:, j]), 0.0)
            errors[:, j - begin] = w[:, j] - codes[:, j] * scale[:, j]
            pull[:, begin:j] += np.outer(errors[:, j - begin], factor[j, begin:j])
        pull[:, :begin] += errors @ factor[begin:end, :begin]
    return codes


def _descend(w: Array, scale: Array, covariance: Array, codes: Array, snap: Snap, free: Array) -> Array:
    """Move single codes to what is best for them while that lowers the error; all rows at once, column by column."""
    codes = codes.copy()
    gradient = (codes * scale - w) @ covariance
    for _ in range(_SWEEPS):
        moved = False
        for j in range(w.shape[1]):
            best = snap(codes[:, j] - gradient[:, j] / (scale[:, j] * covariance[j, j]))
            rows = np.flatnonzero((best != codes[:, j]) & free[:, j])
            if len(rows):  # few rows move, so only theirs are touched: that is most of the time saved
                moved = True
                step = (best[rows] - codes[rows, j]) * scale[rows, j]
                codes[rows, j] = best[rows]
                gradient[rows] += step[:, None] * covariance[j]
        if not moved:
            break
    return codes
