"""From a histogram to the range that 8 bits shall cover.

Affine quantization (u8): x ~ s (q - z), q = clip(round(x / s) + z, 0, 255), s = (hi - lo) / 255, z = round(-lo / s),
with lo <= 0 <= hi so that zero is exact. Symmetric (s8): s = max(|lo|, |hi|) / 127, z = 0.

Methods: `minmax` takes the extremes; `percentile` cuts the outermost share of values; `mse` minimizes the expected
squared error sum_i n_i (Q(c_i) - c_i)^2 over lo and hi; `entropy` minimizes the Kullback-Leibler divergence between
the histogram and its quantized form (the formulation of TensorRT: 8-bit Inference, S. Migacz, 2017).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.statistics import TensorStatistics
from onnxcomp.errors import UsageError

__all__ = ["Method", "QuantParameters", "choose", "parameters", "squared_error"]

Array = npt.NDArray[Any]
Method = Literal["minmax", "percentile", "mse", "entropy"]
_ENTROPY_BINS = 2048


@dataclass(frozen=True)
class QuantParameters:
    """Scale (positive float32 value) and zero point of a tensor; `signed` is s8, else u8."""

    scale: float
    zero_point: int
    signed: bool = False

    @property
    def dtype(self) -> type[np.int8] | type[np.uint8]:
        return np.int8 if self.signed else np.uint8

    @property
    def low(self) -> float:
        return self.scale * ((-128 if self.signed else 0) - self.zero_point)

    @property
    def high(self) -> float:
        return self.scale * ((127 if self.signed else 255) - self.zero_point)

    def apply(self, values: Array) -> Array:
        """Quantize and dequantize (float64)."""
        first, last = (-128, 127) if self.signed else (0, 255)
        q = np.clip(np.rint(values / self.scale) + self.zero_point, first, last)
        return np.asarray(self.scale * (q - self.zero_point))


def parameters(low: float, high: float, *, signed: bool = False) -> QuantParameters:
    """Scale and zero point that cover low..high (extended to hold zero)."""
    low, high = min(low, 0.0), max(high, 0.0)
    tiny = float(np.finfo(np.float32).tiny)
    if signed:
        return QuantParameters(float(np.float32(max(-low, high, tiny) / 127)), 0, True)
    scale = float(np.float32(max(high - low, tiny) / 255))
    return QuantParameters(scale, int(np.clip(np.rint(-low / scale), 0, 255)))


def choose(statistics: TensorStatistics, method: Method, *, signed: bool = False, share: float = 0.9999) -> QuantParameters:
    """Scale and zero point for what was seen of a tensor. `share` is the part of values that `percentile` keeps."""
    if method not in get_args(Method):
        raise UsageError(f"unknown range method {method!r}; known: {', '.join(get_args(Method))}")
    low, high = min(statistics.minimum, 0.0), max(statistics.maximum, 0.0)
    if not statistics.count or low == high:
        return parameters(0.0, 1.0 if not statistics.count else max(high, 1e-6), signed=signed)
    centers, counts = statistics.histogram.bins()
    if method == "percentile":
        low, high = _percentile(centers, counts, low, high, share)
    elif method == "entropy":
        low, high = _entropy(centers, counts, low, high)
    elif method == "mse":
        low, high = _mse(np.clip(centers, low, high), counts, low, high, signed)
    return parameters(low, high, signed=signed)


def squared_error(statistics: TensorStatistics, chosen: QuantParameters) -> float:
    """Expected squared error of a value, by the histogram."""
    centers, counts = statistics.histogram.bins()
    centers = np.clip(centers, statistics.minimum, statistics.maximum)
    return _error(centers, counts, chosen) / max(float(counts.sum()), 1.0)


def _error(centers: Array, counts: Array, chosen: QuantParameters) -> float:
    return float((counts * np.square(chosen.apply(centers) - centers)).sum())


def _percentile(centers: Array, counts: Array, low: float, high: float, share: float) -> tuple[float, float]:
    mass = np.cumsum(counts) / counts.sum()
    tail = 1.0 - share
    lowest = float(centers[int(np.searchsorted(mass, tail / 2))])
    highest = float(centers[min(int(np.searchsorted(mass, 1 - tail / 2)), len(centers) - 1)])
    return max(low, min(lowest, 0.0)), min(high, max(highest, 0.0))


def _mse(centers: Array, counts: Array, low: float, high: float, signed: bool) -> tuple[float, float]:
    """Coordinate search: shrink one end, then the other, first in coarse and then in fine steps."""
    best = _error(centers, counts, parameters(low, high, signed=signed))
    start = (low, high)
    for steps in (np.linspace(1.0, 0.2, 41), np.linspace(1.06, 0.94, 25), np.linspace(1.02, 0.98, 21)):
        for end in (1, 0):
            anchor = (low, high)
            for factor in steps:
                trial = (low, min(anchor[1] * factor, start[1])) if end else (max(anchor[0] * factor, start[0]), high)
                if trial[0] == trial[1]:
                    continue
                error = _error(centers, counts, parameters(*trial, signed=signed))
                if error < best:
                    best, (low, high) = error, trial
    return low, high


def _entropy(centers: Array, counts: Array, low: float, high: float) -> tuple[float, float]:
    """One threshold on |x|, applied to both ends."""
    limit = max(-low, high)
    width = limit / _ENTROPY_BINS
    index = np.minimum((np.abs(centers) / width).astype(np.int64), _ENTROPY_BINS - 1)
    histogram = np.bincount(index, weights=counts, minlength=_ENTROPY_BINS)
    levels = 128
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
