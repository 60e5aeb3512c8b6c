"""Rounding weights so that the outputs, not the weights, stay close.

Nearest rounding minimizes |W' - W|. The output error is d (H - m m^T) d^T with d = W' - W (see gram.py), so
an error made in one column can be made good in the columns that correlate with it. Column by column (GPTQ, Frantar et
al., arXiv:2210.17323, after Optimal Brain Surgeon), with U the upper Cholesky factor of the inverse of the damped
covariance:

    q_j = round(w_j / s),   e = (w_j - s q_j) / U_jj,   w_k -= e U_jk  for k > j

and then coordinate descent: a code moves by one step of size s where 2 s g_j + s^2 C_jj < 0 for the gradient g = d C.
The mean goes into the bias exactly: b' = b - (W' - W) m.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.gram import Gram
from onnxcomp.linear import Linear
from onnxcomp.passes.qdq import QuantizedWeight

__all__ = ["as_rows", "from_rows", "round_with"]

Array = npt.NDArray[Any]
_DAMPING = 0.01  # of the mean diagonal: keeps columns that were hardly seen from running away
_SWEEPS = 3


def as_rows(view: Linear, weight: Array) -> Array:
    """The weight as [groups, outputs per group, K], in the order of `gram.py.patches`."""
    if view.op == "Conv":
        return weight.reshape(view.groups, weight.shape[0] // view.groups, -1)
    return (weight if view.transposed else weight.T)[None]


def from_rows(view: Linear, rows: Array) -> Array:
    """The inverse of `as_rows`."""
    if view.op == "Conv":
        return rows.reshape(view.weight.shape)
    return rows[0] if view.transposed else rows[0].T


def round_with(
    view: Linear, nearest: QuantizedWeight, gram: Gram, *, centered: bool = True, limit: int = 127
) -> tuple[QuantizedWeight, Array]:
    """Codes that keep the output of the operator close, and the change of the bias (float64 [outputs]) that goes with
    them. `nearest` gives the scales. Without a bias to put the mean into (`centered` false) the full second moment
    counts, and the change is of no use.
    """
    w = as_rows(view, view.weight.values.astype(np.float64) * view.alpha)
    groups, outputs, _ = w.shape
    scales = nearest.scales.astype(np.float64).reshape(groups, outputs, 1)
    covariance, mean = gram.covariance if centered else gram.products / max(gram.rows, 1), gram.mean
    codes = np.empty(w.shape)
    for g in range(groups):
        start = np.clip(np.rint(w[g] / scales[g]), -limit, limit)
        codes[g] = _best(w[g], scales[g], covariance[g], start, limit)
    shift = -np.einsum("gok,gk->go", codes * scales - w, mean).reshape(-1)
    stored = np.ascontiguousarray(from_rows(view, codes).astype(np.int8))
    return QuantizedWeight(stored, nearest.scales, nearest.axis), shift


def _best(w: Array, scale: Array, covariance: Array, nearest: Array, limit: int) -> Array:
    """The better of nearest rounding and column-wise compensation, both after coordinate descent."""
    damped = covariance + np.eye(len(covariance)) * (_DAMPING * np.trace(covariance) / len(covariance) + 1e-12)
    candidates = [nearest]
    compensated = _compensate(w, scale, damped, limit)
    if compensated is not None:
        candidates.append(compensated)
    candidates = [_descend(w, scale, damped, c, limit) for c in candidates]
    errors = [_row_errors(c * scale - w, damped) for c in candidates]
    choice = np.argmin(errors, axis=0)
    return np.asarray(np.take_along_axis(np.stack(candidates), choice[None, :, None], axis=0)[0])


def _compensate(w: Array, scale: Array, covariance: Array, limit: int) -> Array | None:
    try:
        factor = np.linalg.cholesky(np.linalg.inv(covariance)).T
    except np.linalg.LinAlgError:
        return None
    rest, codes = w.copy(), np.empty_like(w)
    block = 64  # columns whose updates to what lies behind them are applied together
    for begin in range(0, w.shape[1], block):
        end = min(begin + block, w.shape[1])
        errors = np.empty((w.shape[0], end - begin))
        for j in range(begin, end):
            codes[:, j] = np.clip(np.rint(rest[:, j] / scale[:, 0]), -limit, limit)
            errors[:, j - begin] = (rest[:, j] - codes[:, j] * scale[:, 0]) / factor[j, j]
            rest[:, j + 1 : end] -= np.outer(errors[:, j - begin], factor[j, j + 1 : end])
        rest[:, end:] -= errors @ factor[begin:end, end:]
    return codes


def _descend(w: Array, scale: Array, covariance: Array, codes: Array, limit: int) -> Array:
    """Move single codes by one step while that lowers the error; all rows at once, column by column."""
    codes = codes.copy()
    step = scale[:, 0]
    gradient = (codes * scale - w) @ covariance
    for _ in range(_SWEEPS):
        moved = False
        for j in range(w.shape[1]):
            direction = -np.sign(gradient[:, j])
            gain = 2 * direction * step * gradient[:, j] + np.square(step) * covariance[j, j]
            target = codes[:, j] + direction
            go = (gain < 0) & (np.abs(target) <= limit)
            if go.any():
                moved = True
                change = np.where(go, direction * step, 0.0)
                codes[:, j] = np.where(go, target, codes[:, j])
                gradient += np.outer(change, covariance[j])
        if not moved:
            break
    return codes


def _row_errors(difference: Array, covariance: Array) -> Array:
    return np.asarray(((difference @ covariance) * difference).sum(axis=1))
