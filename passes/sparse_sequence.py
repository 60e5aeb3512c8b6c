"""Sparse weights operator by operator: each is chosen and solved for the inputs that it really gets.

With U the inputs in the model pruned so far and Y the original's outputs (behind a sum: minus the pruned model's
shortcut), mask and weights minimize E |U W - Y|^2 (sparse_update.py), so that later operators make good what earlier
ones lost. How strongly weights are pulled towards those they were is chosen on samples that the fit did not see.
Operators that stay dense are solved too, where that is better on these samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.data import Dataset
from onnxcomp.concrete import concrete_types
from onnxcomp.graph import Model
from onnxcomp.passes.dim_fitting import Task, observe, rows_of, sum_behind, targets
from onnxcomp.passes.dim_regression import Sums
from onnxcomp.passes.dim_replay import Replay
from onnxcomp.passes.sparse_operands import Operand
from onnxcomp.passes.sparse_patterns import Pattern
from onnxcomp.passes.sparse_update import ROUGH, Form, Method, select, solve_on

__all__ = ["Recipe", "prune_in_order"]

Array = npt.NDArray[Any]
_RIDGES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # of the mean diagonal; each solution is where the next one begins


@dataclass(frozen=True)
class Recipe:
    """What is to become of one weight."""

    sparsity: float
    pattern: Pattern
    method: Method


def prune_in_order(
    original: Model,
    pruned: Model,
    pairs: Sequence[tuple[Operand, Operand]],
    recipes: Mapping[str, Recipe],
    data: Dataset,
    *,
    threads: int,
    seed: int,
    memory: int,
    progress: Callable[[float, str], None],
) -> dict[str, float]:
    """Prune and fit the operators of the main graph in `pruned`; the relative error of each output, by key.

    `pairs` are operands of both models, those that have a site; the ones before the first that is to be sparse stay as
    they are. Raises DataError if the data do not fit the model.
    """
    tasks, twins = _tasks(original, pairs, recipes, data)
    replay = Replay(pruned, data, samples=None, threads=threads, memory=memory)
    rows = [-(-n // max(replay.batches, 1)) for n in rows_of(tasks, memory)]
    wanted = targets(original, tasks, data, samples=None, rows=rows, threads=threads, seed=seed)
    errors: dict[str, float] = {}
    for number, (task, twin) in enumerate(zip(tasks, twins, strict=True)):
        progress(number / len(tasks), f"pruning {twin.label}")
        assert twin.site is not None  # such are the pairs
        fit, check = observe(twin.site, task, replay, rows[number], seed + number, wanted.pop(task.site.node))
        errors[twin.key] = _fit(pruned, twin, fit, check, recipes[twin.key])
    return errors


def _tasks(
    original: Model, pairs: Sequence[tuple[Operand, Operand]], recipes: Mapping[str, Recipe], data: Dataset
) -> tuple[list[Task], list[Operand]]:
    feeds = next(iter(data.batches(1))).feeds
    shapes = concrete_types(original, known={name: np.shape(value) for name, value in feeds.items()})
    place = {node: number for number, node in enumerate(original.graph.nodes)}
    known = {t: shapes[t].shape for node in place for t in (*node.inputs, *node.outputs) if shapes[t].size is not None}
    outputs = original.outputs()
    tasks: list[Task] = []
    twins: list[Operand] = []
    for ours, twin in sorted(pairs, key=lambda pair: 0 if pair[0].site is None else pair[0].site.number):
        if ours.site is None or twin.site is None or not (tasks or recipes[ours.key].sparsity):
            continue
        tasks.append(Task(ours.site, twin.site.node, *sum_behind(ours.site, place, outputs, known)))
        twins.append(twin)
    return tasks, twins


def _fit(model: Model, operand: Operand, fit: Sums, check: Sums, recipe: Recipe) -> float:
    site = operand.site
    assert site is not None
    start = site.matrix()
    everything = fit.plus(check) if check is not fit else fit
    whole, part, rest = (_form(sums, start, centered=site.takes_bias) for sums in (everything, fit, check))
    mask = np.ones(start.shape, bool)
    if recipe.sparsity:
        mask = select(whole, recipe.method, recipe.pattern, operand.taps, recipe.sparsity)
    best, least = None, np.inf if recipe.sparsity else rest.error(start)
    tried = start
    for ridge in _RIDGES:
        tried = solve_on(part, mask, ridge, rounds=ROUGH, begin=tried)
        if (now := rest.error(tried)) < least:
            best, least = ridge, now
    weight = start if best is None else solve_on(whole, mask, best)
    operand.write(weight)
    if site.takes_bias:
        n = max(everything.rows, 1)
        site.rewrite_bias(model, (everything.y / n - np.einsum("gk,gko->go", everything.x / n, weight)).reshape(-1))
    return float(least)


def _form(sums: Sums, start: Array, *, centered: bool) -> Form:
    return Form(*sums.moments(centered=centered), start)
