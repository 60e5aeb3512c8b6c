"""Sequential sharing: each operator is fitted to the original's output from the inputs that it really gets.

In the order of the graph, with U the inputs in the model whose earlier weights are shared already and Y the original's
outputs (behind a sum with a shortcut: the original's sum minus the shortcut as it is now, so that errors of earlier
blocks are made good rather than passed on):

    W* = W + (U^T U / S + ridge)^-1 U^T (Y - U W) / S

is the float weight that would do best (repair.py does the same after a removal); W* is then shared with the second
moments of U, and the bias takes what is left of the mean. The ridge is chosen on batches that the fit did not see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.data import Dataset
from onnxcomp.calibration.gram import pick
from onnxcomp.graph import Constant, Model, producer
from onnxcomp.passes.codebook import Problem, Shared, shrunk
from onnxcomp.passes.dim_regression import Sums, solve
from onnxcomp.passes.dim_replay import Replay, piece
from onnxcomp.passes.dim_sites import Site
from onnxcomp.passes.share_sites import Weight
from onnxcomp.passes.share_storage import Key
from onnxcomp.shapes import infer

__all__ = ["Targets", "Task", "find_targets", "refit", "tasks"]

Array = npt.NDArray[Any]
_RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # of the mean diagonal
_EVERY = 5  # of the batches one in five chooses the ridge
_MAX_LENGTH = 2400
_LEAST_ROWS, _MOST_ROWS, _ROWS_PER_ENTRY = 8192, 24000, 16


@dataclass(frozen=True)
class Task:
    """A weight of the main graph and its operator, and the sum that the output goes into with a shortcut, by name."""

    weight: Weight
    site: Site
    total: str
    shortcut: str | None


def tasks(model: Model, weights: Sequence[Weight], memory: int) -> list[Task]:
    """The weights with one linear reader in the main graph, in the order of the graph."""
    place = {node: number for number, node in enumerate(model.graph.nodes)}
    outputs, shapes = model.outputs(), infer(model)
    found = []
    for weight in weights:
        site = weight.site
        if site is None or site.node not in place or site.view.alpha != 1.0:
            continue
        groups, _, length = weight.rows.shape
        if length > _MAX_LENGTH or 8 * groups * length**2 > memory // 4:
            continue
        total, shortcut = site.output, None
        y = _decoded(site.output)
        after = y.outputs[0] if len(y.outputs) == 1 and y not in outputs else None
        if after is not None and after.kind == "Add":
            other = after.inputs[0] if after.inputs[1] is y else after.inputs[1]
            source, shape = producer(other), shapes[y].shape
            early = source is not None and place.get(source, len(place)) < place[site.node]
            if early and shape is not None and shapes[other].shape == shape:
                total, shortcut = after.outputs[0], other.name
        found.append(Task(weight, site, total.name, shortcut))
    return sorted(found, key=lambda t: place[t.site.node])


def _decoded(y: Any) -> Any:
    """What follows a pair of QuantizeLinear and DequantizeLinear that does not cut negative values off."""
    quantize = y.outputs[0] if len(y.outputs) == 1 else None
    if quantize is None or quantize.kind != "QuantizeLinear" or len(quantize.outputs[0].outputs) != 1:
        return y
    decode, zero = quantize.outputs[0].outputs[0], quantize.inputs[2:]
    cuts = bool(zero) and isinstance(zero[0], Constant) and zero[0].values.item(0) == np.iinfo(zero[0].dtype).min
    return decode.outputs[0] if decode.kind == "DequantizeLinear" and not cuts else y


def refit(
    work: Model,
    todo: Sequence[Task],
    targets: Mapping[Key, Targets],
    share: Callable[[Key, Problem], Shared],
    write: Callable[[Task, Array, Array], None],
    wanted: Mapping[Key, Array],
    biased: Mapping[Key, bool],
    data: Dataset,
    *,
    threads: int,
    memory: int,
    progress: Callable[[float, str], None],
) -> dict[Key, Shared]:
    """Share the weights of `todo` (of `work`, a copy of the original that is changed) one after the other.

    `targets` come from the original (`find_targets`), `share` turns a problem into a codebook, `write` puts rows and a
    bias into `work`; `wanted` are the rows of the original, `biased` says which operators can have a bias.
    """
    replay = Replay(work, data, samples=None, threads=threads, memory=memory // 2)
    found: dict[Key, Shared] = {}
    for number, task in enumerate(todo):
        progress(number / len(todo), f"sharing the weights of {task.site.node.label}")
        key = task.weight.key
        fit, check = _observe(task, replay, targets[key])
        shared, rows, bias = _fit(task, wanted[key], fit, check, share, centered=biased[key])
        write(task, rows, bias)
        if shared is not None:
            found[key] = shared
    return found


@dataclass(frozen=True)
class Targets:
    """The original's outputs at up to `count` sampled positions of each batch, float32 [rows, outputs] each."""

    count: int
    seed: int
    rows: list[Array]

    def rng(self, batch: int) -> np.random.Generator:
        """What picks the positions in a batch: the same in the original and in the model that changes."""
        return np.random.default_rng([self.seed, batch])


def find_targets(
    original: Model, todo: Sequence[Task], data: Dataset, *, threads: int, memory: int, seed: int
) -> dict[Key, Targets]:
    """What the operator of each task is to come close to, in a quarter of the memory at most."""
    names = list(dict.fromkeys(task.total for task in todo))
    if not todo:
        return {}
    batches = max(1, sum(1 for _ in data.batches()))
    wanted = [min(max(_LEAST_ROWS, _ROWS_PER_ENTRY * t.weight.rows.shape[2]), _MOST_ROWS) for t in todo]
    needed = sum(4 * rows * t.site.outputs for rows, t in zip(wanted, todo, strict=True))
    share = min(1.0, memory / 4 / needed) / batches
    found = {
        t.weight.key: Targets(int(np.ceil(share * rows)), seed + number, [])
        for number, (rows, t) in enumerate(zip(wanted, todo, strict=True))
    }
    session = piece(original, {}, names, threads)
    for number, batch in enumerate(data.batches()):
        feeds = {spec.name: batch.feeds[spec.name] for spec in session.inputs}
        values = dict(zip(names, session.run(feeds, names), strict=True))
        for task in todo:
            flat, of = _flat(task.site, values[task.total]), found[task.weight.key]
            of.rows.append(flat[pick(len(flat), of.count, of.rng(number))])
    return found


def _flat(site: Site, y: Array) -> Array:
    """Output as [positions, channels], positions in the order of `patches`."""
    last = np.moveaxis(y, site.channel_axis, -1)
    return last.reshape(-1, last.shape[-1])


def _observe(task: Task, replay: Replay, targets: Targets) -> tuple[Sums, Sums]:
    """Moments over the batches to fit on and over those to choose on, from the model as it is now."""
    groups, outputs, length = task.weight.rows.shape
    parts = [Sums.empty(groups, length, outputs) for _ in range(2)]
    source = task.site.node.inputs[0].name
    names = [source] if task.shortcut is None else [source, task.shortcut]
    for number, values in enumerate(replay.before(task.site.node, names)):
        x = task.site.patches(values[source], targets.count, targets.rng(number))
        y = targets.rows[number]
        if task.shortcut is not None:
            flat = _flat(task.site, values[task.shortcut])
            y = y - flat[pick(len(flat), targets.count, targets.rng(number))]
        y = y.reshape(len(y), groups, -1).transpose(1, 0, 2)
        parts[number % _EVERY == _EVERY - 1].add(x.astype(np.float32, copy=False), y.astype(np.float32, copy=False))
    return (parts[0], parts[1]) if parts[1].rows else (parts[0], parts[0])


def _fit(
    task: Task, start: Array, fit: Sums, check: Sums, share: Callable[[Key, Problem], Shared], *, centered: bool
) -> tuple[Shared | None, Array, Array]:
    """The shared rows that come closest to the targets (None: those that the weight has already), and the bias."""
    everything = fit if check is fit else fit.plus(check)
    exact, mixed, power = everything.moments(centered=centered)

    def error(rows: Array, moments: tuple[Array, Array, Array]) -> float:
        xx, xy, yy = moments
        product = np.matmul(rows, xx)
        return float(yy.sum() - 2 * np.einsum("gko,gok->", xy, rows) + np.einsum("gok,gok->", product, rows))

    now = task.weight.rows
    best, ridge = error(start, check.moments(centered=centered)), None
    xx, xy, _ = fit.moments(centered=centered)
    rest = xy - np.matmul(xx, start.transpose(0, 2, 1))
    for tried in _RIDGES:
        rows = start + solve(xx, rest, tried).transpose(0, 2, 1)
        if (found := error(rows, check.moments(centered=centered))) < best:
            best, ridge = found, tried
    wish = start
    if ridge is not None:
        rest = mixed - np.matmul(exact, start.transpose(0, 2, 1))
        wish = start + solve(exact, rest, ridge).transpose(0, 2, 1)
    shared = share(task.weight.key, Problem(wish, shrunk(exact, everything.rows)))
    better = error(shared.values, (exact, mixed, power)) < error(now, (exact, mixed, power))
    rows = shared.values if better else now
    n = max(everything.rows, 1)
    bias = everything.y / n - np.einsum("gk,gok->go", everything.x / n, rows)
    return (shared if better else None), rows, bias.reshape(-1)
