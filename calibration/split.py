"""Two parts of one data set: one to calibrate on, one to verify on, never the same sample in both."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from onnxcomp.calibration.data import Batch, Dataset

__all__ = ["hold_out", "limited", "parts"]

_EVERY = 5  # one sample in five is held out
_MIN_TO_SPLIT = 40  # samples below which none are held out to choose by


def hold_out(data: Dataset) -> tuple[Dataset, Dataset]:
    """(calibration part, verification part): every fifth sample, by position, goes to the second.

    Where batches cannot be cut, whole batches are dealt out. A data set with a single sample or batch is not split:
    the second part is then empty, and reading it raises DataError.
    """
    return _part(data, lambda i: i % _EVERY != _EVERY - 1), _part(data, lambda i: i % _EVERY == _EVERY - 1)


def parts(data: Dataset) -> tuple[Dataset, Dataset]:
    """What statistics are taken from, and what candidates are judged on; the same if there is too little to split.

    A handful of held-out samples chooses by chance; rounding decisions hardly overfit.
    """
    if data.length is not None and data.length < _MIN_TO_SPLIT:
        return data, data
    return hold_out(data)


def limited(data: Dataset, samples: int | None) -> Dataset:
    """At most the first `samples` samples."""
    if samples is None:
        return data
    length = None if data.length is None else min(samples, data.length)
    return Dataset(data.source, data.labelled, length, lambda: data.batches(samples), data.divisible)


def _part(data: Dataset, pick: Callable[[int], bool]) -> Dataset:
    length = None
    if data.length is not None and data.divisible:
        length = sum(map(pick, range(data.length)))
    return Dataset(data.source, data.labelled, length, lambda: _read(data, pick), data.divisible)


def _read(data: Dataset, pick: Callable[[int], bool]) -> Iterator[Batch]:
    position = 0
    for number, batch in enumerate(data.batches()):
        if data.divisible:
            rows = np.array([i for i in range(batch.count) if pick(position + i)], np.intp)
            position += batch.count
            if len(rows):
                yield _rows(batch, rows)
        elif pick(number):
            yield batch


def _rows(batch: Batch, rows: np.ndarray[tuple[int], np.dtype[np.intp]]) -> Batch:
    if len(rows) == batch.count:
        return batch
    feeds = {name: array[rows] for name, array in batch.feeds.items()}
    labels = None if batch.labels is None else batch.labels[rows]
    return Batch(feeds, labels, len(rows), batch.origin)
