"""Weights that stay are solved anew, so that what follows a removal sees what it saw before.

`compensate` uses the original's moments only. H = E[x x^T] of an operator's input, K rows that stay, R rows that go:

    W_K' = W_K + H_KK^-1 H_KR W_R,    b' = b + m^T W - m_K^T W_K'

`resolve` goes through the operators in order and fits each to the original's output from the inputs that it really
gets, those of the model pruned and repaired so far (asymmetric, sequential: He et al. 2017, Meng et al. 2024):

    A = A_0 + (U^T U / S + lambda I)^-1 U^T (Y - U A_0) / S

with U the patches of the pruned model and Y the original's outputs. Where a sum with a shortcut follows, Y is the
original's sum minus the pruned model's shortcut, so that errors of earlier blocks do not add up. lambda is chosen on
samples that the fit did not see; an operator for which nothing is better than A_0 keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.data import Dataset
from onnxcomp.calibration.gram import Gram, pick
from onnxcomp.graph import Node, producer
from onnxcomp.linear import linear
from onnxcomp.passes.dim_regression import Sums, solve
from onnxcomp.passes.dim_replay import Replay, piece
from onnxcomp.passes.dim_sites import Site, sites
from onnxcomp.passes.surgery import Cut

__all__ = ["Repaired", "compensate", "resolve"]

Array = npt.NDArray[Any]
_DAMPING = 1e-3
_RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean diagonal
_EVERY = 5  # of the batches one in five chooses the ridge
_MAX_LENGTH = 4608
_LEAST_ROWS, _MOST_ROWS, _ROWS_PER_ENTRY = 16384, 40000, 25  # output positions that an operator is fitted on


@dataclass(frozen=True)
class Repaired:
    """What was fitted: operators, and the relative error of each before and after, on samples kept out of the fit."""

    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def compensate(cut: Cut, found: Sequence[Site], grams: Mapping[Node, Gram]) -> None:
    """Solve the readers of removed slices in closed form, in `cut.model`."""
    twins = _twin_nodes(cut)
    for site in found:
        gram = grams.get(site.node)
        kept = cut.keep(site.view.weight, site.input_axis)
        extent = site.view.weight.shape[site.input_axis]
        adds_up = (site.view.weight, site.input_axis) in cut.coupling.sums
        if gram is None or not adds_up or len(kept) == extent or len(site.view.weight.outputs) > 1:
            continue
        taps = site.length // extent
        rows = (kept[:, None] * taps + np.arange(taps)).reshape(-1)
        moment = gram.covariance if site.takes_bias else gram.products / max(gram.rows, 1)
        weight = site.matrix()
        mixed = np.matmul(moment[:, rows], weight)
        block = moment[:, rows[:, None], rows]
        solved = weight[:, rows] + solve(block, mixed - np.matmul(block, weight[:, rows]), _DAMPING)
        shift = np.einsum("gk,gko->go", gram.mean, weight) - np.einsum("gk,gko->go", gram.mean[:, rows], solved)
        _restrict(cut, site, twins[site.node], solved, site.bias() + shift.reshape(-1))


def resolve(
    cut: Cut,
    data: Dataset,
    *,
    samples: int | None,
    threads: int,
    seed: int,
    memory: int = 1 << 30,
    progress: Callable[[float, str], None] = lambda share, what: None,
) -> Repaired:
    """Fit every operator behind a removal, in order, in `cut.model`.

    Raises DataError if the data do not fit the model.
    """
    tasks = list(_tasks(cut))
    errors: dict[str, tuple[float, float]] = {}
    replay = Replay(cut.model, data, samples=samples, threads=threads, memory=memory)
    per_batch = [-(-rows // max(replay.batches, 1)) for rows in _rows(tasks, memory)]
    targets = _targets(cut, tasks, data, samples, per_batch, threads, seed)
    for number, task in enumerate(tasks):
        progress(number / len(tasks), f"solving the weights of {task.site.node.label}")
        errors[task.site.node.label] = _fit(
            cut, task, replay, per_batch[number], seed + number, targets.pop(task.site.node)
        )
    return Repaired(errors)


def _rows(tasks: Sequence[_Task], memory: int) -> list[int]:
    """Output positions for each task: enough for its unknowns, and all targets together within half the memory."""
    rows = [min(max(_LEAST_ROWS, _ROWS_PER_ENTRY * task.site.length), _MOST_ROWS) for task in tasks]
    needed = sum(4 * n * task.site.view.outputs for n, task in zip(rows, tasks, strict=True))
    return [int(n * min(1.0, memory / 2 / max(needed, 1))) for n in rows]


@dataclass(frozen=True)
class _Task:
    """An operator to fit: `total` is the sum that its output goes into with `shortcut`, both of the original."""

    site: Site
    twin: Node
    total: Any
    shortcut: Any


def _tasks(cut: Cut) -> Iterator[_Task]:
    twins = _twin_nodes(cut)
    place = {node: number for number, node in enumerate(cut.coupling.model.graph.nodes)}
    outputs = cut.coupling.model.outputs()
    reached = _reached(cut)
    for site in sites(cut.coupling.model):
        if not any(t in reached for t in site.node.inputs) or len(site.view.weight.outputs) > 1:
            continue
        if site.length > _MAX_LENGTH or 8 * site.view.groups * site.length**2 > 1 << 30:
            continue
        y = site.output
        total, shortcut = y, None
        after = y.outputs[0] if len(y.outputs) == 1 and y not in outputs else None
        if after is not None and after.kind == "Add":
            other = after.inputs[0] if after.inputs[1] is y else after.inputs[1]
            source = producer(other)
            shapes = cut.coupling.probe.shapes
            if (
                source is not None
                and place.get(source, len(place)) < site.number
                and shapes.get(other) == shapes.get(y)
            ):
                total, shortcut = after.outputs[0], other
        yield _Task(site, twins[site.node], total, shortcut)


def _reached(cut: Cut) -> set[Any]:
    """Values whose elements a removal changes: what lost slices, and all that is computed from it."""
    found: set[Any] = set()
    for node in cut.coupling.model.graph.nodes:
        inside = any(t in found for t in node.reads())
        for tensor in (*node.inputs, *node.outputs):
            if tensor.name and cut.axes(tensor):
                inside = True
                found.add(tensor)
        if inside:
            found.update(t for t in node.outputs if t.name)
    return found


def _twin_nodes(cut: Cut) -> dict[Node, Node]:
    """Nodes of the original's main graph with those of the cut, found by what they compute."""
    by_output = {t.name: node for node in cut.model.graph.nodes for t in node.outputs if t.name}
    return {node: by_output[node.outputs[0].name] for node in cut.coupling.model.graph.nodes if node.outputs[0].name}


# --- fitting ------------------------------------------------------------------------------------------------


def _targets(
    cut: Cut, tasks: Sequence[_Task], data: Dataset, samples: int | None, rows: Sequence[int], threads: int, seed: int
) -> dict[Node, list[Array]]:
    """For each task and batch the original's outputs at sampled positions, kept channels only: float32 [rows, O]."""
    names = list(dict.fromkeys(task.total.name for task in tasks))
    found: dict[Node, list[Array]] = {task.site.node: [] for task in tasks}
    if not tasks:
        return found
    session = piece(cut.coupling.model, (), names, threads)
    for number, batch in enumerate(data.batches(samples)):
        feeds = {spec.name: batch.feeds[spec.name] for spec in session.inputs}
        values = dict(zip(names, session.run(feeds, names), strict=True))
        for index, task in enumerate(tasks):
            kept = cut.keep(task.total, task.site.channel_axis)
            flat = _flat(task.site, values[task.total.name])
            picked = pick(len(flat), rows[index], np.random.default_rng([seed + index, number]))
            found[task.site.node].append(flat[picked][:, kept])
    return found


def _flat(site: Site, y: Array) -> Array:
    """Output as [positions, channels], positions in the order of `patches`."""
    last = np.moveaxis(y, site.channel_axis, -1)
    return last.reshape(-1, last.shape[-1])


def _fit(cut: Cut, task: _Task, replay: Replay, rows: int, seed: int, targets: Sequence[Array]) -> tuple[float, float]:
    """Fit one operator; its relative error before and after, on the batches that chose the ridge."""
    view = linear(cut.model, task.twin)
    assert view is not None  # it was one before the removal, which keeps constants constant
    site = Site(view, task.site.number)
    fit, check = _observe(site, task, replay, rows, seed, targets)
    start = site.matrix()
    centered = site.takes_bias
    xx, xy, yy = check.moments(centered=centered)
    power = max(float(yy.sum()), 1e-30)

    def error(weight: Array) -> float:
        product = np.matmul(xx, weight)
        return float(
            (yy.sum() - 2 * np.einsum("gko,gko->", xy, weight) + np.einsum("gko,gko->", product, weight)) / power
        )

    best, before = start, error(start)
    found = before
    exact, mixed, _ = fit.moments(centered=centered)
    chosen = None
    for ridge in _RIDGES:
        weight = start + solve(exact, mixed - np.matmul(exact, start), ridge)
        if (now := error(weight)) < found:
            best, found, chosen = weight, now, ridge
    everything = fit.plus(check)
    if chosen is not None:
        exact, mixed, _ = everything.moments(centered=centered)
        best = start + solve(exact, mixed - np.matmul(exact, start), chosen)
    n = max(everything.rows, 1)
    bias = everything.y / n - np.einsum("gk,gko->go", everything.x / n, best)
    site.rewrite(cut.model, best, bias.reshape(-1))
    return before, found


def _observe(
    site: Site, task: _Task, replay: Replay, rows: int, seed: int, targets: Sequence[Array]
) -> tuple[Sums, Sums]:
    """Sums over the batches to fit on and over those to choose on, from the pruned model as it is now."""
    groups = site.view.groups
    parts = [Sums.empty(groups, site.length, site.view.outputs // groups) for _ in range(2)]
    name = site.node.inputs[0].name
    names = [name] if task.shortcut is None else [name, task.shortcut.name]
    for number, values in enumerate(replay.before(task.twin, names)):
        x = site.patches(values[name], rows, np.random.default_rng([seed, number]))
        y = targets[number]
        if task.shortcut is not None:
            flat = _flat(site, values[task.shortcut.name])
            y = y - flat[pick(len(flat), rows, np.random.default_rng([seed, number]))]
        y = y.reshape(len(y), groups, -1).transpose(1, 0, 2)
        parts[number % _EVERY == _EVERY - 1].add(x, y)
    if not parts[1].rows:  # too few batches to keep one out
        return parts[0], parts[0]
    return parts[0], parts[1]


def _restrict(cut: Cut, site: Site, twin: Node, weight: Array, bias: Array) -> None:
    """Give the twin of a site, which has lost outputs, its part of a weight [groups, K, O] and a bias [outputs]."""
    view = linear(cut.model, twin)
    assert view is not None  # it was one before the removal, which keeps constants constant
    kept = cut.keep(site.node.outputs[0], site.channel_axis)
    groups = view.groups
    rows = weight.transpose(0, 2, 1).reshape(-1, weight.shape[1])[kept].reshape(groups, -1, weight.shape[1])
    Site(view, site.number).rewrite(cut.model, rows.transpose(0, 2, 1), bias[kept])
