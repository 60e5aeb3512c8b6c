"""Second moments of the inputs of weighted operators: what a change of the weights does to the output.

For an operator y = W x + b with x the vector that one output position multiplies (for a Conv the patch under the
kernel, K = C/g * kh * kw entries per group), the squared error of a changed weight is, with the bias re-centred,

    E |(W' - W)(x - m)|^2 = sum over rows d of  d (H - m m^T) d^T,     H = E[x x^T],  m = E[x]

so H and m are all that rounding, pruning and re-solving need. The sums are the same in whatever order batches and
shards come (sums.py). Of large maps a sample of positions is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.sums import ExactSum
from onnxcomp.linear import Linear

__all__ = ["Gram", "padding", "patches", "pick", "rows_of"]

Array = npt.NDArray[Any]
_FEW = 2048  # rows that are worth a product of their own, however short they are


class Gram:
    """Sum of x x^T and of x over the rows seen: float64 [groups, K, K] and [groups, K].

    `rows` is the number of rows of each group. Rows wait until there are enough for an efficient product, or until
    `flush`: those multiplied together are summed in floating point, products exactly.
    """

    __slots__ = ("_products", "_totals", "_waiting", "rows")

    def __init__(self, products: ExactSum, totals: ExactSum, rows: int = 0) -> None:
        self._products = products
        self._totals = totals
        self.rows = rows
        self._waiting: list[Array] = []

    @classmethod
    def empty(cls, groups: int, length: int) -> Gram:
        return cls(ExactSum((groups, length, length), kept=2), ExactSum((groups, length), kept=2))

    @property
    def length(self) -> int:
        """K"""
        return int(self._totals.digits.shape[-1])

    def add(self, x: Array) -> None:
        """Take rows in: [groups, rows, K]."""
        self.rows += x.shape[1]
        self._waiting.append(x)
        if sum(w.shape[1] for w in self._waiting) >= max(2 * x.shape[2], _FEW):
            self.flush()

    def flush(self) -> None:
        """Multiply the rows that wait."""
        if not self._waiting:
            return
        x = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting, axis=1)
        self._waiting = []
        if x.shape[0] == 1:  # one large product: the matrix library takes it in two dimensions only
            rows = x[0].astype(np.result_type(x, np.float32), copy=False)  # squares leave the range of float16
            self._products.add((rows.T @ rows)[None])
        else:
            wide = x.astype(np.float64)
            self._products.add(np.matmul(wide.transpose(0, 2, 1), wide))
        self._totals.add(x.sum(axis=1, dtype=np.float64))

    def merge(self, other: Gram) -> None:
        self.sum_products.merge(other.sum_products)
        self.sum.merge(other.sum)
        self.rows += other.rows

    @property
    def sum_products(self) -> ExactSum:
        self.flush()
        return self._products

    @property
    def sum(self) -> ExactSum:
        self.flush()
        return self._totals

    @property
    def products(self) -> Array:
        return self.sum_products.value

    @property
    def totals(self) -> Array:
        return self.sum.value

    @property
    def mean(self) -> Array:
        return np.asarray(self.totals / max(self.rows, 1))

    @property
    def covariance(self) -> Array:
        """E[x x^T] - m m^T, [groups, K, K]."""
        m = self.mean
        return np.asarray(self.products / max(self.rows, 1) - m[:, :, None] * m[:, None, :])


def patches(view: Linear, x: Array, rows: int, rng: np.random.Generator) -> Array:
    """The vectors that the operator multiplies, [groups, at most `rows`, K], for an input activation.

    K runs over (channel in group, kernel position) as in the weight: W.reshape(out, K) for Conv, W[:, o] for MatMul.
    """
    if view.op in ("Gemm", "MatMul"):
        flat = x.reshape(1, -1, x.shape[-1])
        return flat[:, pick(flat.shape[1], rows, rng)]
    if view.op != "Conv":
        raise ValueError(f"no patches for {view.op}")
    kernel = view.weight.shape[2:]
    spatial = len(kernel)
    attrs = view.node.attrs
    strides, dilations = attrs.get("strides", [1] * spatial), attrs.get("dilations", [1] * spatial)
    padded = np.pad(x, [(0, 0), (0, 0), *padding(view, x.shape[2:], kernel, strides, dilations)])
    counts = [
        (padded.shape[2 + i] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in range(spatial)
    ]
    total = x.shape[0] * int(np.prod(counts))
    picked = pick(total, rows, rng)
    sample, *corner = np.unravel_index(picked, (x.shape[0], *counts))
    index: list[Any] = [sample.reshape(-1, *(1,) * spatial)]
    for i in range(spatial):
        shape = [1] * (spatial + 1)
        shape[i + 1] = kernel[i]
        offsets = (np.arange(kernel[i]) * dilations[i]).reshape(shape)
        index.append(corner[i].reshape(-1, *(1,) * spatial) * strides[i] + offsets)
    found = padded[(index[0], slice(None), *index[1:])]  # [rows, kernel..., channels]: advanced axes come first
    found = np.moveaxis(found, -1, 1)
    groups = view.groups
    grouped = found.reshape(found.shape[0], groups, -1)
    return np.ascontiguousarray(grouped.transpose(1, 0, 2))


def rows_of(wanted: int, count: int, samples: int | None) -> int:
    """Rows to take from `count` of `samples` samples so that all together give about `wanted`; at least 4 a sample."""
    return max(4 * count, -(-wanted * count // max(samples or 64, 1)))


def pick(total: int, rows: int, rng: np.random.Generator) -> Array:
    """Positions of at most `rows` of `total`, ascending; equal for generators in equal states."""
    return np.sort(rng.choice(total, rows, replace=False)) if total > rows else np.arange(total)


def padding(
    view: Linear, size: tuple[int, ...], kernel: tuple[int, ...], strides: list[int], dilations: list[int]
) -> list[tuple[int, int]]:
    """Zeros before and behind each spatial axis of a Conv's input of extents `size`."""
    auto = view.node.attrs.get("auto_pad", "NOTSET")
    spatial = len(kernel)
    if auto in ("NOTSET", ""):
        pads = view.node.attrs.get("pads", [0] * (2 * spatial))
        return [(pads[i], pads[i + spatial]) for i in range(spatial)]
    if auto == "VALID":
        return [(0, 0)] * spatial
    found = []
    for i in range(spatial):
        span = dilations[i] * (kernel[i] - 1) + 1
        need = max((-(-size[i] // strides[i]) - 1) * strides[i] + span - size[i], 0)
        begin = need // 2 if auto == "SAME_UPPER" else need - need // 2
        found.append((begin, need - begin))
    return found
