"""From a histogram to the range that few bits shall cover.

Methods: `minmax` takes the extremes; `percentile` cuts the outermost share of values; `mse` minimizes the expected
squared error sum_i n_i (Q(c_i) - c_i)^2 over lo and hi, that of clipped values four times, as these errors have one
sign and fall on few samples (measured: YOLOv8n 33 -> 37 dB, text detection 12 -> 15 dB, ResNets unchanged); `entropy`
minimizes the Kullback-Leibler divergence between the histogram and its quantized form (the formulation of TensorRT:
8-bit Inference, S. Migacz, 2017).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.affine import QuantParameters, parameters
from onnxcomp.calibration.range_errors import Function, RangeErrors
from onnxcomp.calibration.statistics import TensorStatistics
from onnxcomp.errors import UsageError

__all__ = ["Method", "choose"]

Array = npt.NDArray[Any]
Method = Literal["minmax", "percentile", "mse", "entropy"]
_ENTROPY_BINS = 2048


def choose(
    statistics: TensorStatistics,
    method: Method,
    *,
    signed: bool = False,
    share: float = 0.9999,
    bits: int = 8,
    through: Function | None = None,
) -> QuantParameters:
    """Scale and zero point for what was seen of a tensor. `share` is the part of values that `percentile` keeps.

    `mse` minimizes the error of through(x) where all that reads the tensor is this elementwise function.

    Raises UsageError for an unknown method or a number of bits that is not from 2 to 8.
    """
    if method not in get_args(Method):
        raise UsageError(f"unknown range method {method!r}; known: {', '.join(get_args(Method))}")
    if not 2 <= bits <= 8:
        raise UsageError(f"a value cannot be quantized to {bits} bits; give 2 to 8")
    low, high = min(statistics.minimum, 0.0), max(statistics.maximum, 0.0)
    if not statistics.count or low == high:
        return parameters(0.0, 1.0 if not statistics.count else max(high, 1e-6), signed=signed, bits=bits)
    centers, counts = statistics.histogram.bins()
    if method == "percentile":
        low, high = _percentile(centers, counts, low, high, share)
    elif method == "entropy":
        low, high = _entropy(centers, counts, low, high, signed, bits)
    elif method == "mse":
        low, high = _mse(statistics, low, high, signed, bits, through)
    return parameters(low, high, signed=signed, bits=bits)


def _percentile(centers: Array, counts: Array, low: float, high: float, share: float) -> tuple[float, float]:
    mass = np.cumsum(counts) / counts.sum()
    tail = 1.0 - share
    lowest = float(centers[int(np.searchsorted(mass, tail / 2))])
    highest = float(centers[min(int(np.searchsorted(mass, 1 - tail / 2)), len(centers) - 1)])
    return max(low, min(lowest, 0.0)), min(high, max(highest, 0.0))


def _mse(
    statistics: TensorStatistics, low: float, high: float, signed: bool, bits: int, through: Function | None
) -> tuple[float, float]:
    """Coordinate search: shrink one end, then the other, first in coarse and then in fine steps."""
    errors_of = RangeErrors(statistics, signed=signed, bits=bits, through=through)
    if signed:  # one search: both ends depend on the larger one
        low, high = -max(-low, high), max(-low, high)
    full = (low, high)
    best = float(errors_of(np.array([low]), np.array([high]))[0])
    floor = 0.2 if bits == 8 else 0.05  # of the range: fewer codes clip more
    for steps in (np.linspace(1.0, floor, 25), np.linspace(1.04, 0.96, 11), np.linspace(1.008, 0.992, 7)):
        for end in (1,) if signed else (1, 0):
            if (high if end else low) == 0:
                continue
            highs = np.minimum(high * steps, full[1]) if end else np.full(steps.shape, high)
            lows = np.full(steps.shape, low) if end else np.maximum(low * steps, full[0])
            errors = errors_of(-highs if signed else lows, highs)
            found = int(errors.argmin())
            if errors[found] < best:
                best, high = float(errors[found]), float(highs[found])
                low = -high if signed else float(lows[found])
    return low, high


def _entropy(centers: Array, counts: Array, low: float, high: float, signed: bool, bits: int) -> tuple[float, float]:
    """One threshold on |x|, applied to both ends. Zeros do not count: they are exact, and behind a Relu they would
    outweigh all that is to be told apart.
    """
    counts = np.where(centers == 0, 0.0, counts)
    if not counts.any():
        return low, high
    limit = max(-low, high)
    width = limit / _ENTROPY_BINS
    index = np.minimum((np.abs(centers) / width).astype(np.int64), _ENTROPY_BINS - 1)
    histogram = np.bincount(index, weights=counts, minlength=_ENTROPY_BINS)
    one_sided = not signed and (low == 0 or high == 0)
    levels = 1 << (bits if one_sided else bits - 1)
    best, threshold = np.inf, limit
    for last in range(levels, _ENTROPY_BINS + 1, 16):
        inner = histogram[:last]
        reference = inner.copy()
        reference[-1] += histogram[last:].sum()
        group = np.minimum(np.arange(last) * levels // last, levels - 1)
        filled = inner > 0
        sums = np.bincount(group, weights=inner, minlength=levels)
        sizes = np.bincount(group, weights=filled, minlength=levels)
        merged = np.where(filled, sums[group] / np.maximum(sizes[group], 1), 0.0)
        p, q = reference / reference.sum(), merged / max(merged.sum(), 1e-30)
        used = p > 0
        divergence = float((p[used] * np.log(p[used] / np.maximum(q[used], 1e-12))).sum())
        if divergence < best:
            best, threshold = divergence, last * width
    return max(low, -threshold), min(high, threshold)
