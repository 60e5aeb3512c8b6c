"""What an operator of a changed model is fitted to: the inputs that it gets there, the outputs that the original gave.

Where a sum with a shortcut follows an operator, the target is the original's sum minus the changed model's shortcut,
so that errors of earlier blocks do not add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.data import Dataset
from onnxcomp.graph import Model, Node, producer
from onnxcomp.passes.dim_readers import Reader
from onnxcomp.passes.dim_regression import Sums
from onnxcomp.passes.dim_replay import Replay, piece

__all__ = ["Task", "observe", "rows_of", "sum_behind", "targets"]

Array = npt.NDArray[Any]
Keep = Callable[[Any, int], Array]
_EVERY = 5  # of the batches one in five is kept out of the fit
_LEAST_ROWS, _MOST_ROWS, _ROWS_PER_ENTRY = 40000, 120000, 100  # output positions that an operator is fitted on
_MOST_PRODUCTS, _LEAST_PER_ENTRY = 4e11, 6


@dataclass(frozen=True)
class Task:
    """An operator to fit: `site` and `total`, the sum that its output goes into with `shortcut`, are the original's.

    `twin` is the node in the changed model. Without such a sum `total` is the output and `shortcut` None.
    """

    site: Reader
    twin: Node
    total: Any
    shortcut: Any


def sum_behind(
    site: Reader, place: Mapping[Node, int], outputs: set[Any], shapes: Mapping[Any, Any]
) -> tuple[Any, Any]:
    """The sum of a site's output with a value that is there before it, and that value; else the output and None.

    `place` has the position of each node, `outputs` the outputs of scopes, `shapes` extents where they are known.
    """
    y = site.output
    after = y.outputs[0] if len(y.outputs) == 1 and y not in outputs else None
    if after is not None and after.kind == "Add":
        other = after.inputs[0] if after.inputs[1] is y else after.inputs[1]
        source = producer(other)
        same = shapes.get(y) is not None and shapes.get(other) == shapes.get(y)
        if source is not None and place.get(source, len(place)) < site.number and same:
            return after.outputs[0], other
    return y, None


def rows_of(tasks: Sequence[Task], memory: int, given: int | None = None) -> list[int]:
    """Output positions for each task: `given`, or enough for its unknowns; all targets within half the memory."""
    rows = [given or _wanted_rows(task.site.length) for task in tasks]
    needed = sum(4 * n * task.site.outputs for n, task in zip(rows, tasks, strict=True))
    return [int(n * min(1.0, memory / 2 / max(needed, 1))) for n in rows]


def _wanted_rows(length: int) -> int:
    """Products take rows x length^2 multiplications: of long rows fewer are taken, but several for each unknown."""
    affordable = max(int(_MOST_PRODUCTS / length**2), _LEAST_PER_ENTRY * length)
    return min(max(_LEAST_ROWS, _ROWS_PER_ENTRY * length), _MOST_ROWS, affordable)


def targets(
    original: Model,
    tasks: Sequence[Task],
    data: Dataset,
    *,
    samples: int | None,
    rows: Sequence[int],
    threads: int,
    seed: int,
    keep: Keep | None = None,
) -> dict[Any, list[Array]]:
    """For each task and batch the original's outputs at `rows` sampled positions, float32 [rows, O].

    `keep` gives the channels of a value that the changed model still has, all by default.
    """
    names = list(dict.fromkeys(task.total.name for task in tasks))
    found: dict[Any, list[Array]] = {task.site.key: [] for task in tasks}
    if not tasks:
        return found
    session = piece(original, {}, names, threads)
    for number, batch in enumerate(data.batches(samples)):
        feeds = {spec.name: batch.feeds[spec.name] for spec in session.inputs}
        values = dict(zip(names, session.run(feeds, names), strict=True))
        for index, task in enumerate(tasks):
            rng = np.random.default_rng([seed + index, number])
            chosen = task.site.observed(values[task.total.name], rows[index], rng)
            found[task.site.key].append(chosen if keep is None else chosen[:, task.site.kept_outputs(keep)])
    return found


def observe(
    site: Reader, task: Task, replay: Replay, rows: int, seed: int, wanted: Sequence[Array]
) -> tuple[Sums, Sums]:
    """Sums over the batches to fit on and over those to choose on, from the changed model as it is now.

    `site` is the operator there, `wanted` are its targets by batch, `seed` is that of the targets plus the number of
    the task.
    """
    groups = site.groups
    parts = [Sums.empty(groups, site.length, site.outputs // groups) for _ in range(2)]
    name = site.source
    names = [name] if task.shortcut is None else [name, task.shortcut.name]
    for number, values in enumerate(replay.before(task.twin, names)):
        x = site.patches(values[name], rows, np.random.default_rng([seed, number]))
        y = wanted[number]
        if task.shortcut is not None:
            y = y - site.observed(values[task.shortcut.name], rows, np.random.default_rng([seed, number]))
        y = y.reshape(len(y), groups, -1).transpose(1, 0, 2)
        parts[number % _EVERY == _EVERY - 1].add(_wide(x), _wide(y))
    if not parts[1].rows:  # too few batches to keep one out
        return parts[0], parts[0]
    return parts[0], parts[1]


def _wide(values: Array) -> Array:
    """Products of half precision would overflow."""
    return values.astype(np.float32) if values.dtype == np.float16 else values
