"""Two operators in a row trained together, without labels: the first learns to say in fewer channels what the second
needs.

Least squares (repair.py) solves one operator at a time: channels that stay keep their old meaning. Here a pair

    y = C f(P x + p) + c        f elementwise

is fitted to the original's y (or its sum minus the changed shortcut) by Adam (Kingma and Ba 2015) on the mean squared
error, from where least squares left it, as reconstruction of blocks does for quantization (Li et al. 2021). A pair that
is no better on samples kept out of it stays as it was. Gradients are products with the same weights (dim_products.py);
f' is a difference of two runs of the model's own nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.data import Dataset
from onnxcomp.graph import Constant, producer
from onnxcomp.passes.dim_fitting import Task
from onnxcomp.passes.dim_products import Product
from onnxcomp.passes.dim_replay import Replay, piece
from onnxcomp.passes.dim_rules import ELEMENTWISE
from onnxcomp.passes.dim_sites import Site
from onnxcomp.passes.surgery import Cut
from onnxcomp.runtime import Session

__all__ = ["Refinement"]

Array = npt.NDArray[Any]
_EPOCHS, _BATCH = 8, 64
_RATE = 0.02  # of the root mean square of the weight, falling to zero
_DECAYS = (0.9, 0.999)  # of Adam's moments
_EVERY = 10  # of the samples one in ten decides
_WORK = 3e12  # multiplications for all pairs: some minutes on one core
_LEAST_SAMPLES = 128
_PASSES = 3  # forward, gradients of inputs, gradients of weights
_STEP = 1e-2  # of the spread of z, for the difference that gives f'


@dataclass(frozen=True)
class _Pair:
    """`z` is the output of the first operator with its bias, `h` the input of the second."""

    first: Task
    second: Task
    z: Any
    h: Any


class Refinement:
    """Refines pairs among `tasks` while `replay` goes through the changed model: `seen(task)` after each fit."""

    def __init__(
        self, cut: Cut, tasks: Sequence[Task], data: Dataset, replay: Replay, *, threads: int, memory: int, seed: int
    ) -> None:
        self._cut = cut
        self._replay = replay
        self._threads = threads
        self._memory = memory // 4
        self._seed = seed
        pairs = _pairs(cut, tasks)
        self._by_second = {pair.second.site.key: pair for pair in pairs}
        self._firsts = {pair.first.site.key for pair in pairs}
        self._inputs: dict[Any, list[Array]] = {}
        self._original = Replay(cut.coupling.model, data, samples=None, threads=threads, memory=memory)

    def seen(self, task: Task) -> None:
        """Refine the pair that ends in this task, if there is one."""
        pair = self._by_second.get(task.site.key)
        given = None if pair is None else self._inputs.pop(pair.first.site.key, None)
        if pair is not None and given is not None:
            self._refine(pair, given)
        if task.site.key in self._firsts:
            kept: list[Array] | None = []
            for values in self._replay.before(task.twin, [task.site.source]):
                if kept is not None:
                    kept.append(values[task.site.source])
                    kept = kept if _fits(kept, self._memory) else None
            if kept is not None:
                self._inputs[task.site.key] = kept

    def _refine(self, pair: _Pair, given: list[Array]) -> None:
        wanted = self._targets(pair)
        if wanted is None or not _fits(wanted, self._memory):
            return
        model = self._cut.model
        first, second = (task.site.on(model, task.twin) for task in (pair.first, pair.second))
        assert isinstance(first, Site)  # so are those of pairs
        assert isinstance(second, Site)
        between = piece(model, {pair.z.name: given[0].dtype}, [pair.h.name], self._threads)
        x = _front(np.concatenate(given), first.channel_axis)
        y = _front(np.concatenate(wanted), second.channel_axis)
        training = _Training(first, second, between, (pair.z.name, pair.h.name), x.shape[2:])
        samples = min(x.shape[1], int(_WORK / len(self._by_second) / (_PASSES * _EPOCHS * training.work)))
        if samples < _LEAST_SAMPLES or not training.better(x[:, :samples], y[:, :samples], self._seed):
            return
        training.write(model)
        session = piece(model, {pair.first.site.source: given[0].dtype}, [pair.h.name], self._threads)
        name = session.inputs[0].name
        self._replay.correct(pair.h.name, [session.run({name: batch}, [pair.h.name])[0] for batch in given])

    def _targets(self, pair: _Pair) -> list[Array] | None:
        """The original's y in the channels that stay, minus the changed model's shortcut; None if it is past."""
        task, nodes = pair.second, self._cut.coupling.model.graph.nodes
        place = nodes.index(producer(task.total)) + 1
        if place >= len(nodes) or place < self._original.position:
            return None
        assert isinstance(task.site, Site)
        name, axis, kept = task.total.name, task.site.channel_axis, task.site.kept_outputs(self._cut.keep)
        found = [np.take(v[name], kept, axis=axis) for v in self._original.before(nodes[place], [name])]
        if task.shortcut is not None:
            other = task.shortcut.name
            pairs = zip(found, self._replay.before(task.twin, [other]), strict=True)
            found = [y - values[other] for y, values in pairs]
        return found


def _fits(batches: Sequence[Array], memory: int) -> bool:
    """Whether batches are alike, single precision, and together small enough."""
    alike = all(b.shape[1:] == batches[0].shape[1:] and b.dtype == np.float32 for b in batches)
    return alike and sum(b.nbytes for b in batches) <= memory


def _front(value: Array, axis: int) -> Array:
    return np.ascontiguousarray(np.moveaxis(value, axis, 0))


def _pairs(cut: Cut, tasks: Sequence[Task]) -> list[_Pair]:
    """Tasks whose input follows elementwise from the output of another, which nothing else reads."""
    plain = [t for t in tasks if isinstance(t.site, Site) and t.site.form is t.site.view]
    by_output = {t.site.on(cut.model, t.twin).output: t for t in plain}
    outputs = cut.model.outputs()
    found = []
    for task in plain:
        h = task.twin.inputs[0]
        z = _start(h, set(by_output), outputs)
        if z is not None and z is not h and len(h.outputs) == 1 and h not in outputs:
            found.append(_Pair(by_output[z], task, z, h))
    return found


def _start(h: Any, known: set[Any], outputs: set[Any]) -> Any:
    """The one value among `known` that `h` follows from by elementwise nodes, if they alone read it; else None."""
    nodes, starts, stack = set(), set(), [h]
    while stack:
        tensor = stack.pop()
        if tensor in known:
            starts.add(tensor)
            continue
        node = producer(tensor)
        if isinstance(tensor, Constant) or not tensor.name or node in nodes:
            continue
        if node is None or node.kind not in ELEMENTWISE or len(node.outputs) > 1:
            return None
        nodes.add(node)
        stack.extend(node.inputs)
    inner = [*starts, *(t for node in nodes for t in node.outputs if t is not h)]
    private = all(t not in outputs and all(n in nodes for n in t.outputs) for t in inner)
    return starts.pop() if len(starts) == 1 and private else None


@dataclass
class _Parameter:
    """Values under Adam; `rate` is its step at the start."""

    value: Array
    rate: float
    first: Array = field(init=False)
    second: Array = field(init=False)

    def __post_init__(self) -> None:
        self.first, self.second = np.zeros_like(self.value), np.zeros_like(self.value)

    def step(self, gradient: Array, number: int, share: float) -> None:
        """Step `number` from 1 on, at `share` of the rate."""
        a, b = _DECAYS
        self.first = a * self.first + (1 - a) * gradient
        self.second = b * self.second + (1 - b) * np.square(gradient)
        moved = self.first / (1 - a**number) / (np.sqrt(self.second / (1 - b**number)) + 1e-12)
        self.value = (self.value - share * self.rate * moved).astype(np.float32)


class _Training:
    """A pair in float32; values are [channels, samples, *spatial]."""

    def __init__(
        self, first: Site, second: Site, between: Session, names: tuple[str, str], spatial: tuple[int, ...]
    ) -> None:
        self._sites = (first, second)
        self._between, self._names = between, names
        p = Product(first.form, spatial)
        c = Product(second.form, p.positions)
        self._products = (p, c)
        weights = [_unfolded(site) for site in self._sites]
        rates = [_RATE * float(np.sqrt(np.square(w, dtype=np.float64).mean())) for w in weights]
        self._weights = [_Parameter(w, rate) for w, rate in zip(weights, rates, strict=True)]
        self._biases = [
            _Parameter(site.bias().astype(np.float32), rate if site.takes_bias else 0.0)
            for site, rate in zip(self._sites, rates, strict=True)
        ]
        self._step = 0.0

    @property
    def work(self) -> float:
        """Multiplications of one sample, forward."""
        sizes = zip(self._weights, self._products, strict=True)
        return float(sum(w.value.size * np.prod(product.positions) for w, product in sizes))

    def better(self, x: Array, y: Array, seed: int) -> bool:
        """Train; whether the error on samples kept out has fallen."""
        number = np.arange(x.shape[1])
        kept, taught = number[number % _EVERY == 0], number[number % _EVERY != 0]
        self._step = _STEP * max(float(self._output(0, x[:, kept]).std()), 1e-12)
        before = self._error(x[:, kept], y[:, kept])
        rng = np.random.default_rng(seed)
        batches = [b for _ in range(_EPOCHS) for b in _batches(rng.permutation(taught))]
        for k, chosen in enumerate(batches):
            self._learn(x[:, chosen], y[:, chosen], k + 1, 1 - k / len(batches))
        return self._error(x[:, kept], y[:, kept]) < before

    def write(self, model: Any) -> None:
        for site, weight, bias in zip(self._sites, self._weights, self._biases, strict=True):
            groups, outputs = weight.value.shape[:2]
            matrix = weight.value.reshape(groups, outputs, -1).transpose(0, 2, 1)
            site.rewrite(model, matrix, bias.value)

    def _error(self, x: Array, y: Array) -> float:
        found = self._output(1, self._activated(self._output(0, x)))
        return float(np.square(found - y, dtype=np.float64).mean())

    def _output(self, place: int, x: Array) -> Array:
        y = self._products[place].forward(x, self._weights[place].value)
        return np.asarray(y + self._biases[place].value.reshape(-1, *(1,) * (y.ndim - 1)))

    def _activated(self, z: Array) -> Array:
        axes = [site.channel_axis for site in self._sites]
        native = np.ascontiguousarray(np.moveaxis(z, 0, axes[0]))
        return _front(self._between.run({self._names[0]: native}, [self._names[1]])[0], axes[1])

    def _learn(self, x: Array, y: Array, number: int, share: float) -> None:
        z = self._output(0, x)
        h = self._activated(z)
        slope = (self._activated(z + np.float32(self._step)) - h) / np.float32(self._step)
        wrong = self._output(1, h) - y
        wrong *= np.float32(2 / wrong.size)
        back = self._products[1].to_input(self._weights[1].value, wrong) * slope
        for place, (value, gradient) in enumerate(((x, back), (h, wrong))):
            self._weights[place].step(self._products[place].to_weight(value, gradient), number, share)
            self._biases[place].step(gradient.reshape(len(gradient), -1).sum(axis=1), number, share)


def _unfolded(site: Site) -> Array:
    """The weight as [groups, O/g, C/g, taps], float32."""
    matrix = site.matrix().transpose(0, 2, 1)
    taps = int(np.prod(site.form.weight.shape[2:])) if site.form.op == "Conv" else 1
    return np.ascontiguousarray(matrix.reshape(*matrix.shape[:2], -1, taps), dtype=np.float32)


def _batches(order: Array) -> list[Array]:
    return [order[k : k + _BATCH] for k in range(0, len(order) - _BATCH + 1, _BATCH)]
