"""The one pass over the calibration data that quantization needs: ranges of values, second moments of inputs."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.data import Dataset
from onnxcomp.calibration.gram import Gram, patches, rows_of
from onnxcomp.calibration.runner import observe, require_finite
from onnxcomp.calibration.statistics import TensorStatistics
from onnxcomp.calibration.store import Statistics, model_hash
from onnxcomp.graph import Model, producer
from onnxcomp.passes.placement import Placement, Unit
from onnxcomp.passes.rectified import with_effective_terms

__all__ = ["Moments", "observe_inputs"]

Array = npt.NDArray[Any]
_MAX_LENGTH = 2400  # entries of an input vector above which second moments cost more than they bring
_ROWS_PER_ENTRY = 8  # rows sampled per entry of the vector, over all batches
# Operators whose output holds the values of the input, each as often; a Pad adds zeros, which every range has.
_SAME_VALUES = frozenset(
    {"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "DepthToSpace", "SpaceToDepth", "Pad"}
)


@dataclass(frozen=True)
class Moments:
    """`statistics` by value name, `grams` by `Unit.key`; `seen` holds both in a form that merges and can be saved."""

    seen: Statistics

    @property
    def statistics(self) -> dict[str, TensorStatistics]:
        return self.seen.tensors

    @property
    def grams(self) -> dict[str, Gram]:
        return self.seen.grams

    def with_more(self, other: Moments) -> Moments:
        """These, and what was observed of other values of the model, or of a copy of it with more values."""
        tensors, grams = {**self.statistics, **other.statistics}, {**self.grams, **other.grams}
        return Moments(replace(self.seen, tensors=tensors, grams=grams))


def observe_inputs(
    model: Model,
    plan: Placement,
    data: Dataset,
    *,
    grams: bool,
    threads: int,
    memory: int,
    seed: int,
    progress: Callable[[float, str], None],
    samples: int | None = None,
) -> Moments:
    """Observe every value whose range is to be chosen and, with `grams`, the input of every weighted unit.

    Of a term of a rectified sum only what the sum takes from it counts (rectified.py).

    `samples` is the number of samples in all where `data` is one shard of several: each shard then takes its part of
    the rows, and the shards merge to what one pass gives.
    """
    # Of every 8-bit value, as another one may decide a shared range when units go back to float.
    wanted = {t.name: t for t in plan.quantized}
    watched, effective = with_effective_terms(model, plan)
    sources = {name: effective.get(name, _source(plan, tensor, wanted)) for name, tensor in wanted.items()}
    statistics = {source: TensorStatistics() for source in dict.fromkeys(sources.values())}
    by_input = _by_input(plan.units, memory) if grams else {}
    found: dict[str, Gram] = {}
    samples = samples or data.length

    def take(name: str, value: Array, count: int) -> None:
        if name in statistics and value.dtype.kind == "f":
            statistics[name].add(value)
        for unit in by_input.get(name, ()):
            _add_rows(found, unit, value, rows_of(_ROWS_PER_ENTRY * _length(unit), count, samples), seed)

    def flush() -> None:
        for gram in found.values():
            gram.flush()  # so that batches give the same numbers in any order

    count = observe(
        watched, data, list(by_input), take,
        threads=threads, memory=memory, progress=progress, summaries=statistics, after_batch=flush,
    )  # fmt: skip
    require_finite(statistics, data)
    tensors = {n: statistics[n] if n == source else statistics[source].copy() for n, source in sources.items()}
    return Moments(Statistics(model_hash(model), count, tensors, found))


def _source(plan: Placement, tensor: Any, wanted: dict[str, Any]) -> str:
    """The value that stands for another one because it holds the same numbers, if it is observed too."""
    node = producer(tensor)
    while node is not None and node.op in _SAME_VALUES and node.inputs[0].name in wanted:
        if node.op == "Pad" and plan.same.get(tensor) is not node.inputs[0]:
            break  # it may repeat values at the border, or add others than zero
        tensor = node.inputs[0]
        node = producer(tensor)
    return str(tensor.name)


def _by_input(units: Iterable[Unit], memory: int) -> dict[str, list[Unit]]:
    found: dict[str, list[Unit]] = {}
    for unit in units:
        if unit.view is not None and unit.node.op != "ConvTranspose" and _affordable(unit, memory):
            found.setdefault(unit.node.inputs[0].name, []).append(unit)
    return found


def _add_rows(found: dict[str, Gram], unit: Unit, value: Array, count: int, seed: int) -> None:
    """Sample positions by a seed made of what is sampled, so that the order of batches does not matter."""
    view = unit.view
    assert view is not None
    state = [seed, zlib.crc32(unit.key.encode()), zlib.crc32(value.reshape(-1)[::97].tobytes())]
    rows = patches(view, value, count, np.random.default_rng(state))
    found.setdefault(unit.key, Gram.empty(view.groups, _length(unit))).add(rows)


def _length(unit: Unit) -> int:
    view = unit.view
    assert view is not None
    if view.op == "Conv":
        return int(np.prod(view.weight.shape[1:]))
    return view.inputs


def _affordable(unit: Unit, memory: int) -> bool:
    view = unit.view
    length = _length(unit)
    return view is not None and length <= _MAX_LENGTH and 8 * view.groups * length * length <= memory
