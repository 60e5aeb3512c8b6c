"""Where removed channels are missed: the weighted operators that add channels up, with moments of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.data import Dataset
from onnxcomp.calibration.gram import Gram, patches, pick, rows_of
from onnxcomp.calibration.runner import observe
from onnxcomp.graph import Constant, Graph, Model, Node
from onnxcomp.linear import Linear, linear
from onnxcomp.passes.dim_readers import Reader
from onnxcomp.passes.dim_transposed import equivalent, representable, spread, turned_back
from onnxcomp.passes.rounding import as_rows, from_rows

__all__ = ["Site", "collect_grams", "sites"]

Array = npt.NDArray[Any]
_MAX_LENGTH = 4608  # beyond it a Gram matrix costs more time than it is worth
_ROWS_PER_ENTRY, _MOST_ROWS = 12, 24000


@dataclass(frozen=True)
class Site:
    """A weighted node of the main graph, in y = W x + b form with x the patch under one output position."""

    view: Linear
    number: int  # position among the nodes of the graph

    @property
    def node(self) -> Node:
        return self.view.node

    @property
    def key(self) -> Node:
        return self.node

    @property
    def label(self) -> str:
        return self.node.label

    @property
    def weight(self) -> Constant:
        return self.view.weight

    @property
    def source(self) -> str:
        return str(self.node.inputs[0].name)

    @property
    def groups(self) -> int:
        return self.view.groups

    @property
    def outputs(self) -> int:
        return self.view.outputs

    @cached_property
    def form(self) -> Linear:
        """The operator as Conv, Gemm or MatMul."""
        return equivalent(self.view) if self.view.op == "ConvTranspose" else self.view

    @property
    def length(self) -> int:
        """K: entries of x per group."""
        shape = self.form.weight.shape
        return int(np.prod(shape[1:])) if self.form.op == "Conv" else self.view.inputs

    @property
    def input_axis(self) -> int:
        """The axis of the weight that the sum runs over."""
        return 1 if self.view.op == "Conv" or self.view.transposed else 0

    @property
    def channel_axis(self) -> int:
        """Axis of the output channels in the output, from the front for Conv, else the last."""
        return 1 if self.form.op == "Conv" else -1

    @property
    def addition(self) -> Node | None:
        """The Add right behind a MatMul that gives it a constant bias per channel."""
        y = self.node.outputs[0]
        after = y.outputs[0] if self.view.op == "MatMul" and len(y.outputs) == 1 else None
        if after is None or after.kind != "Add":
            return None
        other = after.inputs[1] if after.inputs[0] is y else after.inputs[0]
        return after if isinstance(other, Constant) and other.shape == (self.view.outputs,) else None

    @property
    def takes_bias(self) -> bool:
        return self.view.op != "MatMul" or self.addition is not None

    @property
    def output(self) -> Any:
        """The value with the bias in it."""
        addition = self.addition
        return (self.node if addition is None else addition).outputs[0]

    def bias(self) -> Array:
        """float64 [outputs], zeros if there is none."""
        addition = self.addition
        if addition is None:
            return self.view.bias_values()
        constant = next(t for t in addition.inputs if isinstance(t, Constant))
        return np.asarray(constant.values.astype(np.float64))

    def rewrite(self, model: Model, weight: Array, bias: Array) -> None:
        """Give the node a new weight [groups, K, outputs per group] and, where it takes one, a bias [outputs]."""
        direct = bias if self.takes_bias and self.addition is None else None
        self.view.rewrite(model, model.graph, self.native(weight), direct)
        if self.addition is not None:
            self.rewrite_bias(model, bias)

    def observed(self, value: Array, rows: int, rng: np.random.Generator) -> Array:
        """Output channels at the positions that `patches` takes: [at most `rows`, outputs]."""
        last = np.moveaxis(value, self.channel_axis, -1)
        flat = last.reshape(-1, last.shape[-1])
        return np.asarray(flat[pick(len(flat), rows, rng)])

    def kept_outputs(self, keep: Callable[[Any, int], Array]) -> Array:
        """Of the output channels those that stay; `keep` gives the indices of an axis of a tensor that do."""
        return keep(self.node.outputs[0], self.channel_axis)

    def on(self, model: Model, twin: Node) -> Site:
        """The site of the node's counterpart in a copy of the model."""
        view = linear(model, twin)
        assert view is not None  # constants stay constant in a copy
        return Site(view, self.number)

    def native(self, weight: Array) -> Array:
        """A weight [groups, K, outputs per group] in the layout of the operator."""
        native = from_rows(self.form, weight.transpose(0, 2, 1))
        return turned_back(self.view, native) if self.form is not self.view else native

    def rewrite_bias(self, model: Model, bias: Array) -> None:
        """Give a node that takes one a bias [outputs], of its own, and leave the weight as it is."""
        node = self.node if self.addition is None else self.addition
        place = 2 if self.addition is None else next(k for k, t in enumerate(node.inputs) if isinstance(t, Constant))
        old = node.inputs[place] if place < len(node.inputs) and node.inputs[place].name else None
        wish = f"{self.node.outputs[0].name}_bias" if old is None else old.name
        constant = model.constant(model.graph, wish, bias.astype(self.view.weight.dtype if old is None else old.dtype))
        node.attrs.pop("beta", None)  # of a Gemm
        if place < len(node.inputs):
            node.inputs[place] = constant
        else:
            node.inputs.append(constant)

    def matrix(self) -> Array:
        """The weight, float64 [groups, K, outputs per group]."""
        rows = as_rows(self.form, self.form.weight.values.astype(np.float64) * self.view.alpha)
        return np.ascontiguousarray(rows.transpose(0, 2, 1))

    def patches(self, x: Array, rows: int, rng: np.random.Generator) -> Array:
        """What the rows of `matrix` are multiplied with at some output positions: [groups, at most `rows`, K]."""
        wide = spread(self.view, x) if self.form is not self.view else x
        return patches(self.form, wide, rows, rng)


def sites(model: Model, scope: Graph | None = None) -> list[Site]:
    """All sites of the main graph, in order: Conv, ConvTranspose, Gemm and MatMul with a constant weight."""
    graph = model.graph if scope is None else scope
    views = ((linear(model, node), number) for number, node in enumerate(graph.nodes))
    found = [Site(view, number) for view, number in views if view is not None]
    return [site for site in found if site.view.op != "ConvTranspose" or representable(site.view)]


def collect_grams(
    model: Model,
    chosen: Sequence[Reader],
    data: Dataset,
    *,
    threads: int,
    memory: int,
    seed: int,
    progress: Callable[[float, str], None] | None = None,
) -> dict[Any, Gram]:
    """Second moments of the inputs of sites, by key, as far as the memory budget goes (narrow ones first)."""
    found: dict[Any, Gram] = {}
    by_input: dict[str, list[Reader]] = {}
    left = memory
    for site in sorted(chosen, key=lambda s: s.length):
        cost = 8 * site.groups * site.length**2
        if site.length <= _MAX_LENGTH and cost <= left:
            left -= cost
            by_input.setdefault(site.source, []).append(site)
    rng = np.random.default_rng(seed)

    def take(name: str, value: Array, count: int) -> None:
        for site in by_input[name]:
            wanted = rows_of(min(_ROWS_PER_ENTRY * site.length, _MOST_ROWS), count, data.length)
            rows = site.patches(value, wanted, rng)
            found.setdefault(site.key, Gram.empty(site.groups, site.length)).add(rows)

    if by_input:
        observe(model, data, list(by_input), take, threads=threads, memory=memory, progress=progress)
    return found
