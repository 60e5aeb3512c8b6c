"""Tables: one array per model input, as .npz and .npy files and dicts of arrays hold them, read as batches.

An array of the input's rank has the samples along its first axis. An array of one rank more has one feed per
row, used as it is: scalars, recurrent states and inputs without a batch axis come so. If one input comes so,
or the inputs have no common batch axis, every batch is one feed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from onnxcomp.calibration.batches import Batch
from onnxcomp.calibration.fit import (
    LABELS,
    Interface,
    check_dtype,
    check_shape,
    fit_values,
    fixed_dim,
    match_names,
)
from onnxcomp.calibration.sources import Column
from onnxcomp.errors import DataError
from onnxcomp.runtime import TensorSpec

__all__ = ["Table", "arrange", "check_labels", "feed_count"]


@dataclass(frozen=True)
class _Part:
    """One input of a table: `step` rows make a batch; `squeeze` if the row itself is the feed."""

    spec: TensorSpec
    column: Column
    step: int
    squeeze: bool


@dataclass(frozen=True)
class Table:
    """`samples` samples, read `step` at a time.

    `batched` if they lie along the first axis of every input, so that batches may be cut and joined.
    """

    where: str
    parts: tuple[_Part, ...]
    labels: Column | None
    samples: int
    step: int
    batched: bool

    def batches(self) -> Iterator[Batch]:
        """One read from front to back. Raises DataError for values that the model's inputs cannot take."""
        streams = [part.column.rows(part.step) for part in self.parts]
        labels = None if self.labels is None else self.labels.rows(self.step)
        for first in range(0, self.samples, self.step):
            count = min(self.step, self.samples - first)
            feeds = {}
            for part, stream in zip(self.parts, streams, strict=True):
                block = next(stream)
                row = first // self.step * part.step if block.ndim else None
                value = fit_values(part.spec, block, self.where, row)
                feeds[part.spec.name] = value.reshape(value.shape[1:]) if part.squeeze else value
            rows = f"row {first}" if count == 1 else f"rows {first}-{first + count - 1}"
            origin = self.where if count == self.samples else f"{self.where} {rows}"
            yield Batch(feeds, None if labels is None else np.array(next(labels)), count, origin)


def arrange(columns: Mapping[str, Column], model: Interface, where: str, *, single: bool = False) -> Table:
    """Work out how the columns feed the model, from names, types and shapes alone.

    With `single`, arrays that lack just the batch axis are one sample. Raises DataError if they do not fit.
    """
    names = match_names(columns, model.inputs, where)
    chosen = [(spec, columns[names[spec.name]]) for spec in model.inputs]
    labels = columns.get(LABELS) if LABELS not in names else None
    for spec, column in chosen:
        check_dtype(spec, column.dtype, where)
    if single and model.common and all(_rank_over(spec, column) == -1 for spec, column in chosen):
        chosen = [(spec, column.as_row()) for spec, column in chosen]
    for spec, column in chosen:
        _check_rank(spec, column, where, model)
    squeezed = [_rank_over(spec, column) == 1 for spec, column in chosen]
    if model.common and not any(squeezed):
        table = _batched(chosen, model, where)
    else:
        table = _feed_by_feed(chosen, squeezed, model, where)
    if labels is None:
        return table
    if not labels.shape and table.samples == 1:
        labels = labels.as_row()
    check_labels(labels.shape, labels.dtype, table.samples, where)
    return replace(table, labels=labels)


def check_labels(shape: tuple[int, ...], dtype: np.dtype[np.generic], samples: int, where: str) -> None:
    """Raise DataError unless the labels are numbers, one entry per sample."""
    if dtype.kind not in "biuf":
        raise DataError(f"{where}: labels are {dtype}; give numbers, such as the index of the class")
    if not shape or shape[0] != samples:
        raise DataError(f"{where}: labels have shape {list(shape)}, but there are {samples} samples")


def feed_count(shapes: Mapping[str, tuple[int, ...]], model: Interface) -> int:
    """Samples in one feed of these shapes by input name.

    That is the size of the first axis where it is a batch axis of all inputs, or else where the model leaves
    it free; 1 if the inputs do not agree on it.
    """
    batched = [
        spec.name
        for spec in model.inputs
        if shapes[spec.name] and (model.common or fixed_dim(spec, 0) is None)
    ]
    sizes = {shapes[name][0] for name in batched}
    return sizes.pop() if len(sizes) == 1 else 1


def _batched(chosen: list[tuple[TensorSpec, Column]], model: Interface, where: str) -> Table:
    for spec, column in chosen:
        check_shape(spec, column.shape, where, free_first=True)
    samples = _agreed({spec.name: column.shape[0] for spec, column in chosen}, where)
    parts = tuple(_Part(spec, column, model.size, False) for spec, column in chosen)
    return Table(where, parts, None, samples, model.size, True)


def _feed_by_feed(
    chosen: list[tuple[TensorSpec, Column]], squeezed: list[bool], model: Interface, where: str
) -> Table:
    parts = [
        _Part(spec, column, 1 if squeeze else fixed_dim(spec, 0) or 1, squeeze)
        for (spec, column), squeeze in zip(chosen, squeezed, strict=True)
    ]
    samples_per_feed = 1
    if not any(squeezed) and not _alike(parts):
        # Arrays of the inputs' own ranks that cannot be cut alike are a single feed.
        parts = [replace(part, step=max(_rows(part), 1)) for part in parts]
        samples_per_feed = feed_count({spec.name: column.shape for spec, column in chosen}, model)
    for part in parts:
        shape = part.column.shape[1:]
        if part.column.shape and not part.squeeze:
            shape = (min(part.step, _rows(part)), *shape)
        check_shape(part.spec, shape, where)
    feeds = _agreed({part.spec.name: _rows(part) // part.step for part in parts}, where)
    return Table(where, tuple(parts), None, feeds * samples_per_feed, samples_per_feed, False)


def _rows(part: _Part) -> int:
    return part.column.shape[0] if part.column.shape else 1


def _alike(parts: list[_Part]) -> bool:
    """Whether the rows of all inputs make the same number of feeds, with none left over."""
    return (
        len({divmod(_rows(part), part.step) for part in parts} | {(_rows(parts[0]) // parts[0].step, 0)}) == 1
    )


def _agreed(counts: dict[str, int], where: str) -> int:
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{name!r} {count}" for name, count in counts.items())
        raise DataError(f"{where}: the inputs have different numbers of samples: {text}")
    samples = next(iter(counts.values()))
    if samples == 0:
        raise DataError(f"{where}: the arrays hold no samples (their first axis has length 0)")
    return samples


def _rank_over(spec: TensorSpec, column: Column) -> int:
    return 0 if spec.shape is None else len(column.shape) - len(spec.shape)


def _check_rank(spec: TensorSpec, column: Column, where: str, model: Interface) -> None:
    over = _rank_over(spec, column)
    if over in (0, 1) and (column.shape or spec.shape == ()):
        return
    rank = 1 if spec.shape is None else len(spec.shape)
    hint = "; one sample needs a first axis of length 1: array[None]" if over == -1 and model.common else ""
    raise DataError(
        f"{where}: input {spec.name!r} has shape {list(column.shape)}, but the model takes rank {rank}; "
        f"give rank {rank} with samples along the first axis, or rank {rank + 1} with one feed per row{hint}"
    )
