"""What a range costs: the expected squared error of a value that is rounded inside of it and clipped outside, from its
histogram.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.affine import QuantParameters, grid
from onnxcomp.calibration.statistics import TensorStatistics

__all__ = ["CLIPPED", "Function", "RangeErrors", "clipping_errors", "squared_error"]

Array = npt.NDArray[Any]
Function = Callable[[Array], Array]  # elementwise
CLIPPED = 4.0  # times that errors of clipped values count when a range is chosen


def squared_error(statistics: TensorStatistics, chosen: QuantParameters) -> float:
    """Expected squared error of a value, by the histogram."""
    errors = RangeErrors(statistics, signed=chosen.signed, bits=chosen.bits, clipped=1.0)
    return float(errors(np.array([chosen.low]), np.array([chosen.high]))[0])


class RangeErrors:
    """Expected squared error of a value for each of several ranges; errors of clipping count `clipped` times.

    With `through`, of through(value); with `negative_only`, what negative values contribute.
    """

    def __init__(
        self,
        statistics: TensorStatistics,
        *,
        signed: bool = False,
        bits: int = 8,
        through: Function | None = None,
        negative_only: bool = False,
        clipped: float = CLIPPED,
    ) -> None:
        self._edges, counts = _edges(statistics, bits)
        self._counts = np.where(self._edges[1] <= 0, counts, 0).astype(np.float32) if negative_only else counts
        self._total = max(float(statistics.histogram.bins()[1].sum()), 1.0)
        self._signed, self._bits = signed, bits
        self._through = through
        self._clipped = clipped

    def __call__(self, lows: Array, highs: Array) -> Array:
        """float64 [ranges]; values are spread evenly inside of their bins.

        In units of the scale, with k the code of u, the integral of (u - k)^2 from 0 to u is k / 12 + (u - k)^3 / 3,
        also where k is clipped. A bin at the end of the range is wider than a code, so its center alone would tell
        nothing.
        """
        scale, zero_point = grid(lows, highs, self._signed, self._bits)
        first = -float(1 << self._bits - 1) if self._signed else 0.0
        last = float((1 << self._bits - 1) - 1 if self._signed else (1 << self._bits) - 1)
        # In place: [2, ranges, bins] is as much as a cache holds.
        rest = self._edges[:, None, :] / scale.astype(np.float32)[:, None]
        width = rest[1] - rest[0]
        code = np.rint(rest)
        np.clip(code, (first - zero_point)[:, None], (last - zero_point)[:, None], out=code)
        rest -= code
        square = rest * rest
        rest *= square
        rest *= np.float32(1 / 3)
        code *= np.float32(1 / 12)
        rest += code
        wide = width > 0
        mean = np.where(wide, (rest[1] - rest[0]) / np.where(wide, width, 1), square[0])
        centers = self._edges.mean(axis=0, dtype=np.float64)
        if self._clipped != 1:
            units = centers / scale[:, None]
            outside = (units < (first - zero_point - 0.5)[:, None]) | (units > (last - zero_point + 0.5)[:, None])
            mean = np.where(outside, self._clipped * mean, mean)
        if self._through is not None:
            mean = mean * _slopes(self._through, centers, scale, zero_point, first, last)
        return np.asarray((mean @ self._counts).astype(np.float64) * np.square(scale) / self._total)


def clipping_errors(statistics: TensorStatistics, lows: Array, highs: Array) -> Array:
    """The part of `RangeErrors` that comes from values outside of each of several ranges (float64)."""
    centers, counts = statistics.histogram.bins()
    outside = np.maximum(lows[:, None] - centers, 0) + np.maximum(centers - highs[:, None], 0)
    return np.asarray(CLIPPED * (np.square(outside) @ counts) / max(float(counts.sum()), 1.0))


def _edges(statistics: TensorStatistics, bits: int) -> tuple[Array, Array]:
    """Where each bin begins and ends, inside of what was seen: float32 [2, bins]; and counts: float32 [bins].

    Neighbours inside a quarter of the widest step become one bin: near zero there are hundreds to a code. Zeros are
    left out, as they are exact.
    """
    centers, counts = statistics.histogram.bins()
    centers, counts = centers[centers != 0], counts[centers != 0]
    if not centers.size:
        return np.zeros((2, 1), np.float32), np.zeros(1, np.float32)
    half = np.ldexp(1.0, np.frexp(centers)[1] - 9)  # 7 bits of mantissa
    edges = np.clip(np.stack([centers - half, centers + half]), statistics.minimum, statistics.maximum)
    slot = np.floor(centers / (max(centers[-1] - centers[0], np.abs(centers).max()) / (4 << bits)))
    first = np.flatnonzero(np.diff(slot, prepend=slot[0] - 1))
    last = np.append(first[1:], len(slot)) - 1
    joined = np.stack([edges[0, first], edges[1, last]])
    return joined.astype(np.float32), np.add.reduceat(counts, first).astype(np.float32)


def _slopes(
    through: Function, centers: Array, scale: Array, zero_point: Array, first: float, last: float
) -> Array:
    """By what the function multiplies squared errors: [ranges, bins].

    Inside of the range its mean slope over one step around the value; where values are clipped that of the line from
    the value to the end of the range.
    """
    step = scale[:, None]
    ends = [((limit - zero_point) * scale)[:, None] for limit in (first, last)]
    clipped = np.clip(centers[None], *ends)
    inside = np.abs(clipped - centers) <= step / 2
    left = np.where(inside, centers - step / 2, centers)
    right = np.where(inside, centers + step / 2, clipped)
    return np.asarray(np.square((through(right) - through(left)) / (right - left)))
