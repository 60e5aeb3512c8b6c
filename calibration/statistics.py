"""Statistics of activations that merge exactly: counts, extremes, histogram, and sums per channel.

The histogram needs no range in advance: a float32 value is counted under its upper 16 bits (sign, 8 bits of exponent,
7 of mantissa), so a bin is at most 0.8 % wide relative to the value, whatever comes. Counts add up, extremes combine,
and sums are kept in digits (see sums.py); so shards merge to the same numbers in any order, and every way to choose
a range (extremes, percentile, squared error, entropy) can be applied afterwards to the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.sums import ExactSum

__all__ = ["SAMPLE", "Channels", "Histogram", "TensorStatistics"]

Array = npt.NDArray[Any]
SAMPLE = 1 << 13  # values of one array that go into the histogram; extremes and sums see all
_KEYS = 1 << 16
_PENDING = 1 << 16  # keys that wait to be counted together: one count costs as much for few as for many
_BLOCK = 1 << 16  # values that stay in the cache between two looks at them


def _centers(keys: Array) -> Array:
    """The value in the middle of each bin (float64); NaN for the keys of infinities and NaNs."""
    infinite = (keys & 0x7F80) == 0x7F80
    wide = (keys.astype(np.uint32) << np.uint32(16)) | np.uint32(0x8000)
    centers = np.where(infinite, np.uint32(0), wide).view(np.float32).astype(np.float64)
    centers[infinite] = np.nan
    centers[keys == 0] = 0.0  # zeros and denormals: all but always exact zeros
    return centers


class Histogram:
    """Counts of float32 values by their upper 16 bits. Only bins that are not empty take memory."""

    __slots__ = ("_counts", "_keys", "_pending", "_waiting")

    def __init__(self, keys: Array | None = None, counts: Array | None = None) -> None:
        self._keys: Array = np.zeros(0, np.uint16) if keys is None else keys
        self._counts: Array = np.zeros(0, np.int64) if counts is None else counts
        self._pending: list[Array] = []
        self._waiting = 0

    def add(self, values: Array) -> None:
        """Count (an evenly spaced part of) an array; zero of either sign is one value."""
        flat = values.reshape(-1)
        if flat.size > SAMPLE:
            flat = flat[:: (flat.size // SAMPLE) | 1]  # an odd step: no power of two hides a channel from it
        keys = (flat.astype(np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        self._pending.append(keys)
        self._waiting += keys.size
        if self._waiting >= _PENDING:
            self._count()

    def merge(self, other: Histogram) -> None:
        keys, counts = other.sparse()
        dense = self.counts
        dense[keys] += counts
        self._keep(dense)

    def sparse(self) -> tuple[Array, Array]:
        """Keys (uint16, ascending) of the bins that are not empty, and their counts (int64)."""
        self._count()
        return self._keys, self._counts

    @property
    def counts(self) -> Array:
        """A copy of the counts of all keys: int64 [65536]."""
        keys, counts = self.sparse()
        dense = np.zeros(_KEYS, np.int64)
        dense[keys] = counts
        return dense

    def bins(self) -> tuple[Array, Array]:
        """Bin centers (float64, ascending) and counts (float64) of the bins that are not empty."""
        keys, counts = self.sparse()
        centers = _centers(keys)
        order = np.argsort(centers)
        order = order[np.isfinite(centers[order])]
        return centers[order], counts[order].astype(np.float64)

    def _count(self) -> None:
        if not self._pending:
            return
        dense = np.bincount(np.concatenate(self._pending), minlength=_KEYS)
        self._pending, self._waiting = [], 0
        dense[self._keys] += self._counts
        dense[0] += dense[0x8000]
        dense[0x8000] = 0
        self._keep(dense)

    def _keep(self, dense: Array) -> None:
        self._keys = np.flatnonzero(dense).astype(np.uint16)
        self._counts = dense[self._keys].astype(np.int64)


@dataclass
class Channels:
    """Per channel: sum, sum of squares, largest magnitude (float64 [channels]), and the elements of each channel."""

    sums: ExactSum  # [2, channels]: of values and of squares
    peak: Array
    count: int = 0

    @classmethod
    def of(cls, values: Array, axis: int) -> Channels:
        """The statistics of one array along an axis."""
        channels = values.shape[axis]
        rows = np.moveaxis(values, axis, 0) if axis in (0, -values.ndim) else np.moveaxis(values, axis, 1)
        found = cls(ExactSum((2, channels)), np.zeros(channels))
        if axis in (0, -values.ndim):
            found._add(rows.reshape(channels, -1))
        else:  # sample by sample: what is made of one stays in the cache, and a sum does not depend on its batch
            for row in rows:
                found._add(row.reshape(channels, -1))
        return found

    def _add(self, rows: Array) -> None:
        """Take in [channels, values]."""
        if not rows.size:
            return
        wide = rows.astype(np.float64)
        self.sums.add(np.stack([wide.sum(axis=1), np.einsum("ij,ij->i", wide, wide)]))
        self.peak = np.maximum(self.peak, np.maximum(wide.max(axis=1), -wide.min(axis=1)))
        self.count += rows.shape[1]

    def merge(self, other: Channels) -> None:
        self.sums.merge(other.sums)
        self.peak = np.maximum(self.peak, other.peak)
        self.count += other.count

    @property
    def total(self) -> Array:
        return np.asarray(self.sums.value[0])

    @property
    def squares(self) -> Array:
        return np.asarray(self.sums.value[1])

    @property
    def mean(self) -> Array:
        return np.asarray(self.total / max(self.count, 1))


@dataclass
class TensorStatistics:
    """What was seen of one tensor. `channels` is kept when a channel axis was asked for.

    `count` is the number of values that were looked at, for a probe (probes.py) those that left the graph.
    """

    minimum: float = np.inf
    maximum: float = -np.inf
    count: int = 0
    histogram: Histogram = field(default_factory=Histogram)
    channels: Channels | None = None

    def add(self, values: Array, axis: int | None = None, *, histogram: bool = True) -> None:
        """Take in an array of floats. `axis` is the channel axis to keep sums for."""
        if values.size == 0:
            return
        self._add_extremes(*_extremes(values))
        self.count += values.size
        if histogram:
            self.histogram.add(values)
        if axis is not None and -values.ndim <= axis < values.ndim:
            self._add_channels(Channels.of(values, axis))

    def add_sample(self, sample: Array, minimum: float, maximum: float) -> None:
        """Take in some values of an array, and the extremes of all of it."""
        self._add_extremes(minimum, maximum)
        self.count += sample.size
        self.histogram.add(sample)

    def merge(self, other: TensorStatistics) -> None:
        self._add_extremes(other.minimum, other.maximum)
        self.count += other.count
        self.histogram.merge(other.histogram)
        if other.channels is not None:
            self._add_channels(other.channels)

    def copy(self) -> TensorStatistics:
        twin = TensorStatistics()
        twin.merge(self)
        return twin

    def _add_extremes(self, minimum: float, maximum: float) -> None:
        # NaN wins: it has to be seen in the end.
        self.minimum = float(np.minimum(self.minimum, minimum))
        self.maximum = float(np.maximum(self.maximum, maximum))

    def _add_channels(self, channels: Channels) -> None:
        if self.channels is None:
            self.channels = Channels(ExactSum(channels.sums.digits.shape[1:]), np.zeros_like(channels.peak))
        self.channels.merge(channels)


def _extremes(values: Array) -> tuple[float, float]:
    """Minimum and maximum, in one pass over memory: block by block, each looked at twice while it is in the cache."""
    flat = values.reshape(-1)
    low, high = np.inf, -np.inf
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        if block.dtype == np.float16:  # numpy compares half precision one by one
            block = block.astype(np.float32)
        low, high = np.minimum(low, block.min()), np.maximum(high, block.max())
    return float(low), float(high)
