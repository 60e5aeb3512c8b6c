"""Batches of samples, the datasets that give them, and how they are cut and joined to the size of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from onnxcomp.calibration.sources import Array
from onnxcomp.errors import DataError, UsageError

__all__ = ["Batch", "Dataset", "regroup", "sample_hashes", "take"]


@dataclass(frozen=True)
class Batch:
    """The feeds of one run of the model.

    `feeds` has one array per model input, of exactly the input's type; `labels` has the samples along its
    first axis, or is None; `count` is the number of samples; `origin` says where they come from ("calib.npz
    rows 0-31"). The arrays may be views of the caller's own: they are not to be written to.
    """

    feeds: dict[str, Array]
    labels: Array | None
    count: int
    origin: str


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples that fit a model, made by `onnxcomp.calibration.data.open_data`.

    `source` is what the user called them; `labelled` tells whether batches carry labels; `length` is the
    number of samples that `batches()` delivers, None if only a full read would tell.
    """

    source: str
    labelled: bool
    length: int | None
    _read: Callable[[], Iterator[Batch]] = field(repr=False)
    divisible: bool = field(repr=False)

    def batches(self, limit: int | None = None) -> Iterator[Batch]:
        """Read from the start, at most `limit` samples; where batches cannot be cut, at least one batch.

        Raises UsageError if `limit` is not positive, DataError if a value does not fit its input or there is
        no sample at all.
        """
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise UsageError(f"the number of samples must be a positive whole number, not {limit!r}")
        return self._limited(limit)

    def _limited(self, limit: int | None) -> Iterator[Batch]:
        done = 0
        for batch in self._read():
            if limit is not None and done + batch.count > limit and (done or self.divisible):
                if self.divisible:
                    yield take(batch, 0, limit - done)
                return
            yield batch
            done += batch.count
            if limit is not None and done >= limit:
                return
        if not done:
            raise DataError(
                f"{self.source} gives no complete batch; a function must give all of its samples at every "
                "call"
            )


def take(batch: Batch, start: int, stop: int) -> Batch:
    """Samples `start` to `stop` of a batch in which every input has the samples along its first axis."""
    if (start, stop) == (0, batch.count):
        return batch
    return Batch(
        {name: array[start:stop] for name, array in batch.feeds.items()},
        None if batch.labels is None else batch.labels[start:stop],
        stop - start,
        f"{batch.origin} (samples {start}-{stop - 1} of it)",
    )


def regroup(batches: Iterable[Batch], size: int, *, exact: bool) -> Iterator[Batch]:
    """Cut and join batches to `size` samples. Only for batches as in `take`.

    Samples of different shapes go into different batches. With `exact` every batch has `size` samples: an
    incomplete last one is dropped, and DataError is raised if samples of different shapes would have to share
    a batch.
    """
    held: list[Batch] = []
    for batch in batches:
        if held and _row_shapes(held[0]) != _row_shapes(batch):
            if exact:
                raise DataError(
                    f"{held[0].origin} and {batch.origin} have different shapes, {_row_shapes(held[0])} and "
                    f"{_row_shapes(batch)}, but the model takes batches of exactly {size}; make the "
                    "samples alike"
                )
            yield _join(held)
            held = []
        start = 0
        while start < batch.count:
            stop = min(batch.count, start + size - sum(b.count for b in held))
            held.append(take(batch, start, stop))
            start = stop
            if sum(b.count for b in held) == size:
                yield _join(held)
                held = []
    if held and not exact:
        yield _join(held)


def sample_hashes(batch: Batch) -> list[str]:
    """SHA-256 of each sample's feeds, the same however the samples are batched.

    An array with one row per sample counts with the sample's row, any other array as a whole. With them,
    samples used for calibration are kept out of verification.
    """
    hashes = []
    for sample in range(batch.count):
        digest = hashlib.sha256()
        for name, array in sorted(batch.feeds.items()):
            per_sample = batch.count > 1 and array.ndim > 0 and len(array) == batch.count
            row = array[sample : sample + 1] if per_sample else array  # still an array, of strings too
            data = repr(row.tolist()).encode() if row.dtype.hasobject else row.tobytes()
            digest.update(f"{name} {row.dtype} {len(data)}\n".encode())
            digest.update(data)
        hashes.append(digest.hexdigest())
    return hashes


def _row_shapes(batch: Batch) -> list[tuple[int, ...]]:
    return [array.shape[1:] for array in batch.feeds.values()]


def _join(batches: list[Batch]) -> Batch:
    first, last = batches[0], batches[-1]
    if len(batches) == 1:
        return first
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return Batch(
        {name: np.concatenate([batch.feeds[name] for batch in batches]) for name in first.feeds},
        np.concatenate(labels) if labels else None,
        sum(batch.count for batch in batches),
        f"{first.origin} to {last.origin}",
    )
