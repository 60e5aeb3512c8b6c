"""Feeds that are batches already: what functions and lists give, and ONNX test_data_set folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.calibration.batches import Batch, Dataset, regroup
from onnxcomp.calibration.fit import LABELS, Interface, check_dtype, check_shape, fit_values, match_names
from onnxcomp.calibration.sources import Array, as_array, pb_arrays, reading
from onnxcomp.calibration.tables import check_labels, feed_count
from onnxcomp.errors import DataError

__all__ = ["given_batches", "test_data_sets"]


def given_batches(
    source: str, items: Callable[[], Iterable[Any]], model: Interface, origins: Sequence[str] | None = None
) -> Dataset:
    """A dataset of what `items()` gives at each call: dicts of arrays by input name, or (feeds, labels).

    Each is one batch and stays so, unless the model fixes another size. The first is checked now; all of them
    are if `origins` names them one by one. Raises DataError.
    """

    def each() -> Iterator[Batch]:
        labelled = None
        with reading(source):
            for number, item in enumerate(items()):
                batch = _batch(item, model, origins[number] if origins else f"{source} item {number}")
                if labelled not in (None, batch.labels is not None):
                    raise DataError(
                        f"{batch.origin} has {'no ' if labelled else ''}labels, unlike the items before it"
                    )
                labelled = batch.labels is not None
                yield batch

    def read() -> Iterator[Batch]:
        return regroup(each(), model.size, exact=True) if model.common and model.fixed else each()

    checked = [batch.labels is not None for _, batch in zip(origins or range(1), each(), strict=False)]
    if not checked:
        raise DataError(
            f"{source} gives no samples; expected dicts of arrays, or (feeds, labels), a batch each"
        )
    return Dataset(source, checked[0], None, read, model.common and model.fixed is None)


def test_data_sets(folder: Path, sets: Sequence[Path], model: Interface) -> Dataset:
    """A dataset of the `input_K.pb` in `sets`, each one batch. Raises DataError."""
    ordered = sorted(
        sets, key=lambda path: (len(path.name), path.name)
    )  # test_data_set_10 after test_data_set_9
    return given_batches(
        str(folder),
        lambda: (pb_arrays(path, model.names) for path in ordered),
        model,
        [str(path) for path in ordered],
    )


def _batch(item: Any, model: Interface, where: str) -> Batch:
    labels = None
    if isinstance(item, tuple) and len(item) == 2:
        item, labels = item
    if isinstance(item, np.ndarray):
        item = {"data": item}
    if not isinstance(item, Mapping):
        raise DataError(
            f"{where} is a {type(item).__name__}; expected a dict of arrays by input name, or a pair "
            "(feeds, labels)"
        )
    names = match_names(item, model.inputs, where)
    if labels is None and LABELS not in names:
        labels = item.get(LABELS)
    feeds: dict[str, Array] = {}
    for spec in model.inputs:
        array = as_array(spec.name, item[names[spec.name]], where)
        check_dtype(spec, array.dtype, where)
        check_shape(spec, array.shape, where, free_first=model.common)
        feeds[spec.name] = fit_values(spec, array, where, 0)
    if model.common and len({len(array) for array in feeds.values()}) > 1:
        counts = ", ".join(f"{name!r} {len(array)}" for name, array in feeds.items())
        raise DataError(f"{where}: the inputs have different numbers of samples: {counts}")
    count = feed_count({name: array.shape for name, array in feeds.items()}, model)
    if count == 0:
        raise DataError(f"{where} holds no samples (the first axis has length 0)")
    if labels is None:
        return Batch(feeds, None, count, where)
    values = as_array(LABELS, labels, where)
    check_labels(values.shape, values.dtype, count, where)
    return Batch(feeds, values, count, where)
