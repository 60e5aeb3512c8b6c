"""Weights that stay are solved anew, so that what follows a removal sees what it saw before.

`compensate` uses the original's moments only. H = E[x x^T] of an operator's input, K rows that stay, R rows that go:

    W_K' = W_K + H_KK^-1 H_KR W_R,    b' = b + m^T W - m_K^T W_K'

`resolve` goes through the operators in order and fits each to the original's output from the inputs that it really
gets, those of the model pruned and repaired so far (asymmetric, sequential: He et al. 2017, Meng et al. 2024):

    A = A_0 + (U^T U / S + lambda I)^-1 U^T (Y - U A_0) / S

with U the patches of the pruned model and Y the original's outputs. Where a sum with a shortcut follows, Y is the
original's sum minus the pruned model's shortcut, so that errors of earlier blocks do not add up. Gates of LSTM, GRU
and RNN hold two such products, of the input and of the states, whose Y follows from the original's x and h. lambda is
chosen on samples that the fit did not see; an operator for which nothing is better than A_0 keeps it. Both solve a
sparse weight on its support, so that what prune-weights took out stays out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.data import Dataset
from onnxcomp.calibration.gram import Gram
from onnxcomp.graph import Node, producer
from onnxcomp.passes.dim_fitting import Task, observe, rows_of, sum_behind, targets
from onnxcomp.passes.dim_readers import Reader
from onnxcomp.passes.dim_recurrent import recurrent_sites
from onnxcomp.passes.dim_refine import Refinement
from onnxcomp.passes.dim_regression import solve
from onnxcomp.passes.dim_replay import Replay
from onnxcomp.passes.dim_sites import sites
from onnxcomp.passes.sparse_patterns import held_zeros
from onnxcomp.passes.sparse_update import Form, solve_on
from onnxcomp.passes.surgery import Cut

__all__ = ["Repaired", "compensate", "resolve"]

Array = npt.NDArray[Any]
_DAMPING = 1e-3
_RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean diagonal
_LONG = 1024  # a system of this size is solved for every second ridge only
_MAX_LENGTH = 4608


@dataclass(frozen=True)
class Repaired:
    """What was fitted: operators, and the relative error of each before and after, on samples kept out of the fit."""

    errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def compensate(cut: Cut, found: Sequence[Reader], grams: Mapping[Any, Gram]) -> None:
    """Solve the readers of removed slices in closed form, in `cut.model`."""
    twins = _twin_nodes(cut)
    for site in found:
        gram = grams.get(site.key)
        kept = cut.keep(site.weight, site.input_axis)
        extent = site.weight.shape[site.input_axis]
        adds_up = (site.weight, site.input_axis) in cut.coupling.sums
        if gram is None or not adds_up or len(kept) == extent or len(site.weight.outputs) > 1:
            continue
        taps = site.length // extent
        rows = (kept[:, None] * taps + np.arange(taps)).reshape(-1)
        moment = gram.covariance if site.takes_bias else gram.products / max(gram.rows, 1)
        weight = site.matrix()
        mixed = np.matmul(moment[:, rows], weight)
        block = moment[:, rows[:, None], rows]
        solved = _solved(block, mixed, weight[:, rows], _support(weight, weight[:, rows]), _DAMPING)
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
    nearest: int | None = None,
    longest: int | None = None,
    rows: int | None = None,
    refine: bool = False,
    progress: Callable[[float, str], None] = lambda share, what: None,
) -> Repaired:
    """Fit every operator behind a removal, in order, in `cut.model`; of them the first `nearest` ones if it is given,
    and of these none with rows of more than `longest` entries.

    `rows` is the number of output positions to fit each operator on, by default as many as its unknowns call for.
    `refine` trains pairs of operators together after that: see dim_refine.py.

    Raises DataError if the data do not fit the model.
    """
    tasks = [t for t in list(_tasks(cut))[:nearest] if longest is None or t.site.length <= longest]
    errors: dict[str, tuple[float, float]] = {}
    replay = Replay(cut.model, data, samples=samples, threads=threads, memory=memory)
    per_batch = [-(-count // max(replay.batches, 1)) for count in rows_of(tasks, memory, rows)]
    wanted = targets(
        cut.coupling.model,
        tasks,
        data,
        samples=samples,
        rows=per_batch,
        threads=threads,
        seed=seed,
        keep=cut.keep,
    )
    refinement = None
    if refine:
        refinement = Refinement(cut, tasks, data, replay, threads=threads, memory=memory, seed=seed)
    for number, task in enumerate(tasks):
        progress(number / len(tasks), f"solving the weights of {task.site.node.label}")
        errors[task.site.label] = _fit(cut, task, replay, per_batch[number], seed + number, wanted.pop(task.site.key))
        if refinement is not None:
            refinement.seen(task)
    return Repaired(errors)


def _tasks(cut: Cut) -> Iterator[Task]:
    twins = _twin_nodes(cut)
    place = {node: number for number, node in enumerate(cut.coupling.model.graph.nodes)}
    outputs = cut.coupling.model.outputs()
    reached = _reached(cut)
    found: list[Reader] = [*sites(cut.coupling.model), *recurrent_sites(cut.coupling.model)]
    gone = {node for residual in cut.residuals for node in residual.nodes}
    bypassed = {residual.total for residual in cut.residuals}
    for site in sorted(found, key=lambda s: s.number):
        if site.node in gone or not any(t in reached for t in site.node.inputs) or len(site.weight.outputs) > 1:
            continue
        if site.length > _MAX_LENGTH or 8 * site.groups * site.length**2 > 1 << 30:
            continue
        total, shortcut = sum_behind(site, place, outputs, cut.coupling.probe.shapes)
        yield Task(site, twins[site.node], total, None if producer(total) in bypassed else shortcut)


def _reached(cut: Cut) -> set[Any]:
    """Values whose elements a removal changes: what lost slices, and all that is computed from it."""
    found = {residual.total.outputs[0] for residual in cut.residuals}
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


def _fit(cut: Cut, task: Task, replay: Replay, rows: int, seed: int, wanted: Sequence[Array]) -> tuple[float, float]:
    """Fit one operator; its relative error before and after, on the batches that chose the ridge."""
    site = task.site.on(cut.model, task.twin)
    fit, check = observe(site, task, replay, rows, seed, wanted)
    start = site.matrix()
    support = _support(task.site.matrix(), start)
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
    for ridge in _RIDGES if site.length <= _LONG else _RIDGES[1::2]:
        weight = _solved(exact, mixed, start, support, ridge)
        if (now := error(weight)) < found:
            best, found, chosen = weight, now, ridge
    everything = fit.plus(check)
    if chosen is not None:
        exact, mixed, _ = everything.moments(centered=centered)
        best = _solved(exact, mixed, start, support, chosen)
    n = max(everything.rows, 1)
    bias = everything.y / n - np.einsum("gk,gko->go", everything.x / n, best)
    site.rewrite(cut.model, best, bias.reshape(-1))
    return before, found


def _support(original: Array, weight: Array) -> Array | None:
    """Where a weight may be other than zero, if the original was made sparse on purpose; None for anywhere."""
    return None if held_zeros(original) is None else weight != 0


def _solved(moment: Array, mixed: Array, start: Array, support: Array | None, ridge: float) -> Array:
    """Ridge regression towards `start`, on the support if there is one."""
    if support is None:
        return start + solve(moment, mixed - np.matmul(moment, start), ridge)
    return solve_on(Form(moment, mixed, np.zeros((len(start), start.shape[2])), start), support, ridge)


def _restrict(cut: Cut, site: Reader, twin: Node, weight: Array, bias: Array) -> None:
    """Give the twin of a site, which has lost outputs, its part of a weight [groups, K, O] and a bias [outputs]."""
    narrowed = site.on(cut.model, twin)
    kept = site.kept_outputs(cut.keep)
    rows = weight.transpose(0, 2, 1).reshape(-1, weight.shape[1])[kept].reshape(narrowed.groups, -1, weight.shape[1])
    narrowed.rewrite(cut.model, rows.transpose(0, 2, 1), bias[kept])
