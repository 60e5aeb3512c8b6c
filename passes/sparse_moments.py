"""Second moments of what multiplies the weights that can be made sparse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.data import Dataset
from onnxcomp.calibration.gram import Gram, rows_of
from onnxcomp.calibration.runner import observe
from onnxcomp.errors import DataError
from onnxcomp.graph import Model
from onnxcomp.passes.sparse_operands import Operand, Source

__all__ = ["collect_moments", "second_moment"]

Array = npt.NDArray[Any]
_MAX_LENGTH = 4608  # beyond it a Gram matrix costs more time than it is worth
_ROWS_PER_ENTRY, _MOST_ROWS = 25, 40000


def collect_moments(
    model: Model,
    chosen: Sequence[Operand],
    data: Dataset,
    *,
    threads: int,
    memory: int,
    seed: int,
    progress: Callable[[float, str], None] | None = None,
) -> dict[str, list[Gram]]:
    """Second moments of the inputs of operands, one per source, by key; small ones first as far as the memory goes.

    Raises DataError if the data do not fit the model or an activation is not finite.
    """
    found: dict[str, list[Gram]] = {}
    readers: dict[str, list[tuple[Source, Gram]]] = {}
    left = memory
    for operand in sorted(chosen, key=lambda o: o.shape[1]):
        groups, length, _ = operand.shape
        cost = 16 * groups * length**2 * len(operand.sources)  # two parts of an exact sum
        if not operand.sources or length > _MAX_LENGTH or cost > left:
            continue
        left -= cost
        found[operand.key] = [Gram.empty(groups, length) for _ in operand.sources]
        for source, gram in zip(operand.sources, found[operand.key], strict=True):
            readers.setdefault(source.name, []).append((source, gram))
    rng = np.random.default_rng(seed)

    def take(name: str, value: Array, count: int) -> None:
        value = value.astype(np.float32) if value.dtype == np.float16 else value
        for source, gram in readers[name] if value.size else ():  # empty: a branch that was not taken
            length = gram.length
            wanted = rows_of(min(_ROWS_PER_ENTRY * length, _MOST_ROWS), count, data.length)
            gram.add(source.rows(value, wanted, rng))

    if readers:
        observe(model, data, list(readers), take, threads=threads, memory=memory, progress=progress)
    for name, pairs in readers.items():
        if not all(np.isfinite(gram.totals).all() for _, gram in pairs):
            raise DataError(
                f"the activation {name!r} is not finite on the calibration data {data.source}; check the preprocessing"
            )
    return {key: grams for key, grams in found.items() if all(g.rows for g in grams)}


def second_moment(operand: Operand, grams: Sequence[Gram]) -> Array:
    """H of all sources together: about the means where biases take them up. float64 [groups, K, K]"""
    rows = max(sum(g.rows for g in grams), 1)
    parts = (g.covariance if operand.centered else g.products / g.rows for g in grams)
    return np.asarray(sum(part * (g.rows / rows) for part, g in zip(parts, grams, strict=True)))
