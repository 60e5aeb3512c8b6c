"""The one pass over the calibration data that quantization needs: ranges of values, second moments of inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.data import Dataset
from onnxcomp.calibration.gram import Gram, patches
from onnxcomp.calibration.runner import observe, require_finite
from onnxcomp.calibration.statistics import TensorStatistics
from onnxcomp.graph import Model
from onnxcomp.passes.placement import Placement, Unit

__all__ = ["Moments", "observe_inputs"]

Array = npt.NDArray[Any]
_MAX_LENGTH = 2400  # entries of an input vector above which second moments cost more than they bring
_ROWS_PER_ENTRY = 8  # rows sampled per entry of the vector, over all batches


@dataclass(frozen=True)
class Moments:
    """`statistics` by value name, `grams` by `Unit.key`."""

    statistics: dict[str, TensorStatistics]
    grams: dict[str, Gram]


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
) -> Moments:
    """Observe every value whose range is to be chosen and, with `grams`, the input of every weighted unit."""
    # Of every 8-bit value, as another one may decide a shared range when units go back to float.
    statistics = {t.name: TensorStatistics() for t in plan.quantized}
    rng = np.random.default_rng(seed)
    by_input: dict[str, list[Unit]] = {}
    found: dict[str, Gram] = {}
    for unit in plan.units if grams else ():
        if unit.view is not None and _affordable(unit, memory):
            by_input.setdefault(unit.node.inputs[0].name, []).append(unit)
    batches = max(1, -(-(data.length or 64) // 16))

    def take(name: str, value: Array) -> None:
        if name in statistics and value.dtype.kind == "f":
            statistics[name].add(value)
        for unit in by_input.get(name, ()):
            view = unit.view
            assert view is not None
            length = _length(unit)
            rows = patches(view, value, max(64, _ROWS_PER_ENTRY * length // batches), rng)
            found.setdefault(unit.key, Gram.empty(view.groups, length)).add(rows)

    names = list(dict.fromkeys([*statistics, *by_input]))
    observe(model, data, names, take, threads=threads, memory=memory, progress=progress)
    require_finite(statistics, data)
    return Moments(statistics, found)


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
