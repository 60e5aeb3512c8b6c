"""Calibration and evaluation data in every form that users have them, streamed as model inputs.

    open_data("calib.npz", session.inputs)  ->  Dataset.batches()  ->  Batch(feeds, labels, count, origin)

A dataset can be read any number of times and holds no more than a batch. What can be checked without reading
all values (names, types, shapes, counts) is checked when it is opened, the values themselves on the way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.calibration.batches import Batch, Dataset, regroup, sample_hashes
from onnxcomp.calibration.fit import Interface, interface
from onnxcomp.calibration.items import given_batches, test_data_sets
from onnxcomp.calibration.pictures import IMAGE_SUFFIXES, picture_batches
from onnxcomp.calibration.sources import (
    array_column,
    load_function,
    npy_column,
    npz_columns,
    reading,
    suggest,
)
from onnxcomp.calibration.tables import Table, arrange
from onnxcomp.errors import DataError, UsageError
from onnxcomp.runtime import TensorSpec

__all__ = ["Batch", "Dataset", "open_data", "sample_hashes"]

_ARRAY_SUFFIXES = (".npz", ".npy")


def open_data(
    source: Any,
    inputs: Sequence[TensorSpec],
    *,
    preprocess: Any = None,
    batch: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Open `source` for a model with these `inputs`, and check what does not need all values.

    `source` is one of

    * a .npz file: one array per input and optionally `labels`; a .npy file, for a model with one input;
    * a folder of such files, each one sample or batch;
    * a folder of `test_data_set_N/input_K.pb`, or one such test_data_set;
    * a folder of pictures, labelled by class sub-folders or a `labels.csv` (see `find_pictures`);
    * the text "package.module:function" or "file.py:function", or a callable: called at each reading, it
      gives dicts of arrays or (feeds, labels), each one batch;
    * a dict of arrays or an array, as in a .npz or .npy file; a list of feed dicts, each one batch;
    * a Dataset, returned as it is.

    An array of the rank of its input has samples along the first axis, one of a rank more one feed per row.

    A batch has as many samples as the model fixes, else `batch`, else 16; batches given by functions, lists
    and TensorProto files stay as they are unless the model fixes the size. `preprocess` is for pictures (see
    `Preprocess.from_spec`); they come in an order shuffled with `seed`, so that a few are a fair sample of
    the classes.

    Raises DataError if the data cannot be read or do not fit, UsageError for options that make no sense.
    """
    if isinstance(source, Dataset):
        return source
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError(f"the seed must be a whole number from 0, not {seed!r}")
    model = interface(inputs, batch)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        place, _, name = str(source).rpartition(":")
        with reading(str(path)):
            is_function = bool(place) and name.isidentifier() and not path.exists()
        if is_function:
            text = str(source)
            return _no_preprocess(preprocess, given_batches(text, load_function(text), model))
        return _open_path(path, model, preprocess, seed)
    return _no_preprocess(preprocess, _open_object(source, model))


def _open_path(path: Path, model: Interface, preprocess: Any, seed: int) -> Dataset:
    if not path.exists():
        near = suggest(path.name, os.listdir(path.parent) if path.parent.is_dir() else [])
        raise DataError(f"there is no file or folder {path}{near}")
    if path.is_file():
        return _no_preprocess(preprocess, _tables(str(path), [_file_table(path, model)], model))
    with reading(str(path)):
        entries = sorted(path.iterdir())
    if any(entry.match("input_*.pb") for entry in entries):
        return _no_preprocess(preprocess, test_data_sets(path, [path], model))
    sets = [entry for entry in entries if entry.match("test_data_set_*") and entry.is_dir()]
    if sets:
        return _no_preprocess(preprocess, test_data_sets(path, sets, model))
    files = [
        entry
        for entry in entries
        if entry.suffix.lower() in _ARRAY_SUFFIXES and not entry.name.startswith(".")
    ]
    if not files:
        return picture_batches(path, model, preprocess, seed)
    if any(entry.suffix.lower() in IMAGE_SUFFIXES for entry in entries):
        raise DataError(
            f"{path} holds both arrays (such as {files[0].name}) and pictures; keep them in two folders"
        )
    tables = [_file_table(file, model, single=True) for file in files]
    return _no_preprocess(preprocess, _tables(str(path), tables, model))


def _open_object(source: Any, model: Interface) -> Dataset:
    if isinstance(source, Mapping):
        where = "the given arrays"
        columns = {str(name): array_column(str(name), values, where) for name, values in source.items()}
        return _tables(where, [arrange(columns, model, where)], model)
    if isinstance(source, np.ndarray):
        where = "the given array"
        return _tables(where, [arrange({"data": array_column("data", source, where)}, model, where)], model)
    if isinstance(source, (list, tuple)):
        return given_batches("the given list", lambda: iter(source), model)
    if callable(source):
        name = getattr(source, "__qualname__", type(source).__name__)
        return given_batches(f"the function {name}", source, model)
    hint = (
        "; give the function that makes it, so that it can be read again"
        if isinstance(source, Iterator)
        else ""
    )
    raise UsageError(
        f"data cannot be a {type(source).__name__}{hint}; give a path, a dict of arrays, an array, a list "
        "of feeds or a function"
    )


def _no_preprocess(preprocess: Any, dataset: Dataset) -> Dataset:
    if preprocess is not None:
        raise UsageError(
            f"preprocessing is for folders of pictures, but {dataset.source} holds arrays; leave it out"
        )
    return dataset


def _file_table(path: Path, model: Interface, *, single: bool = False) -> Table:
    suffix = path.suffix.lower()
    if suffix not in _ARRAY_SUFFIXES:
        hint = "; give its folder" if suffix in IMAGE_SUFFIXES or suffix == ".pb" else ""
        raise DataError(
            f"{path} is of an unknown kind {suffix!r}{hint}; expected .npz, .npy, a folder, or "
            "package.module:function"
        )
    if suffix == ".npz":
        return arrange(npz_columns(path), model, str(path), single=single)
    if len(model.inputs) != 1:
        raise DataError(
            f"{path} holds one array, but the model has {len(model.inputs)} inputs: "
            f"{', '.join(model.names)}; use .npz"
        )
    name = model.inputs[0].name
    return arrange({name: npy_column(path, name)}, model, str(path), single=single)


def _tables(source: str, tables: Sequence[Table], model: Interface) -> Dataset:
    first = tables[0]
    for table in tables:
        if (table.labels is None) != (first.labels is None):
            raise DataError(f"{source}: of {first.where} and {table.where} only one has labels")
        if table.batched != first.batched:
            raise DataError(
                f"{source}: of {first.where} and {table.where} one has samples along the first axis, the "
                "other one feed per row; use one form in a folder"
            )
    length = sum(table.samples for table in tables)
    exact = first.batched and model.fixed is not None
    if exact and length < model.size:
        raise DataError(
            f"{source} has {length} sample(s), but the model takes batches of exactly {model.size}"
        )

    def read() -> Iterator[Batch]:
        batches = (batch for table in tables for batch in table.batches())
        return regroup(batches, model.size, exact=exact) if first.batched else batches

    length = length // model.size * model.size if exact else length
    return Dataset(source, first.labels is not None, length, read, first.batched and not exact)
