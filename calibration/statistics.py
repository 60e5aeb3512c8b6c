"""Statistics of activations that merge exactly: counts, extremes, histogram, and sums per channel.

The histogram needs no range in advance: a float32 value is counted under its upper 16 bits (sign, 8 bits of exponent,
7 of mantissa), so a bin is at most 0.8 % wide relative to the value, whatever comes. Counts add up, extremes combine,
and sums are kept in float64 in a fixed order; so shards merge, and every way to choose a range (extremes, percentile,
squared error, entropy) can be applied afterwards to the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Channels", "Histogram", "TensorStatistics"]

Array = npt.NDArray[Any]
_KEYS = 1 << 16
_SAMPLE = 1 << 16  # elements of one array that go into the histogram; extremes and sums see all


def _centers() -> Array:
    """The value in the middle of each bin; NaN for the keys of infinities and NaNs."""
    keys = (np.arange(_KEYS, dtype=np.uint32) << np.uint32(16)) | np.uint32(0x8000)
    infinite = (np.arange(_KEYS) & 0x7F80) == 0x7F80
    centers = np.where(infinite, np.uint32(0), keys).view(np.float32).astype(np.float64)
    centers[infinite] = np.nan
    return centers


@dataclass
class Histogram:
    """Counts of float32 values by their upper 16 bits: int64 [65536]."""

    counts: Array = field(default_factory=lambda: np.zeros(_KEYS, np.int64))

    def add(self, values: Array) -> None:
        """Count (a strided part of) an array; zero of either sign is one value."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        if flat.size > _SAMPLE:
            flat = flat[:: (flat.size // _SAMPLE) | 1]
        keys = np.ascontiguousarray(flat).view(np.uint32) >> np.uint32(16)
        self.counts += np.bincount(keys, minlength=_KEYS)
        self.counts[0] += self.counts[0x8000]
        self.counts[0x8000] = 0

    def merge(self, other: Histogram) -> None:
        self.counts += other.counts

    def bins(self) -> tuple[Array, Array]:
        """Bin centers (float64, ascending) and counts of the bins that are not empty."""
        used = np.flatnonzero(self.counts)
        centers, counts = _centers()[used], self.counts[used].astype(np.float64)
        centers[used == 0] = 0.0  # zeros and denormals: all but always exact zeros
        order = np.argsort(centers)
        order = order[np.isfinite(centers[order])]
        return centers[order], counts[order]


@dataclass
class Channels:
    """Per channel: sum, sum of squares, largest magnitude (float64 [channels]), and the elements of each channel."""

    total: Array
    squares: Array
    peak: Array
    count: int = 0

    @classmethod
    def of(cls, values: Array, axis: int) -> Channels:
        flat = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
        wide = flat.astype(np.float64)
        return cls(wide.sum(axis=1), np.square(wide).sum(axis=1), np.abs(wide).max(axis=1, initial=0.0), flat.shape[1])

    def merge(self, other: Channels) -> None:
        self.total = self.total + other.total
        self.squares = self.squares + other.squares
        self.peak = np.maximum(self.peak, other.peak)
        self.count += other.count

    @property
    def mean(self) -> Array:
        return np.asarray(self.total / max(self.count, 1))


@dataclass
class TensorStatistics:
    """What was seen of one tensor. `channels` is kept when a channel axis was asked for."""

    minimum: float = np.inf
    maximum: float = -np.inf
    count: int = 0
    histogram: Histogram = field(default_factory=Histogram)
    channels: Channels | None = None

    def add(self, values: Array, axis: int | None = None, *, histogram: bool = True) -> None:
        if values.size == 0:
            return
        self.minimum = min(self.minimum, float(values.min()))
        self.maximum = max(self.maximum, float(values.max()))
        self.count += values.size
        if histogram:
            self.histogram.add(values)
        if axis is not None and -values.ndim <= axis < values.ndim:
            self._add_channels(Channels.of(values, axis))

    def merge(self, other: TensorStatistics) -> None:
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)
        self.count += other.count
        self.histogram.merge(other.histogram)
        if other.channels is not None:
            self._add_channels(other.channels)

    def _add_channels(self, channels: Channels) -> None:
        if self.channels is None:
            self.channels = channels
        else:
            self.channels.merge(channels)
