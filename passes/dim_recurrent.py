"""The sums over channels inside LSTM, GRU and RNN: the input times W, the hidden states times R.

    gates_t = W x_t + R h_(t-1) + b_W + b_R

Each is a product with a matrix per direction, so what `dim_sites` does with a Conv or a MatMul holds for both. The
states are read off Y, whose rows are h_1 to h_T: the last state stands for the one before the first. In a GRU whose
reset gate comes before the product (linear_before_reset = 0) R multiplies something else than the states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.gram import pick
from onnxcomp.graph import Constant, Model, Node, Variable

__all__ = ["Recurrent", "expose_states", "recurrent_sites"]

Array = npt.NDArray[Any]
_INPUT, _HIDDEN, _BIAS = 1, 2, 3  # positions of W, R and B among the inputs


@dataclass(frozen=True)
class Recurrent:
    """W [directions, gates * H, K] or R [directions, gates * H, H] of a recurrent node; half of B is its bias."""

    node: Node
    number: int
    position: int

    @property
    def key(self) -> tuple[Node, int]:
        return self.node, self.position

    @property
    def label(self) -> str:
        return f"{self.node.label} ({'W' if self.position == _INPUT else 'R'})"

    @property
    def weight(self) -> Constant:
        found = self.node.inputs[self.position]
        assert isinstance(found, Constant)  # such are chosen
        return found

    @property
    def output(self) -> Any:
        """The gates have no name: what they add up follows from the input."""
        return self.node.outputs[0] if self.position == _HIDDEN else self.node.inputs[0]

    @property
    def source(self) -> str:
        return str(self.output.name)

    @property
    def groups(self) -> int:
        return int(self.weight.shape[0])

    @property
    def outputs(self) -> int:
        return self.groups * int(self.weight.shape[1])

    @property
    def length(self) -> int:
        return int(self.weight.shape[2])

    @property
    def input_axis(self) -> int:
        return 2

    @property
    def takes_bias(self) -> bool:
        return self._bias is None or isinstance(self._bias, Constant)

    @property
    def _bias(self) -> Any:
        given = self.node.inputs[_BIAS] if len(self.node.inputs) > _BIAS else None
        return given if given is not None and given.name else None

    def _biases(self) -> Array:
        """Both halves, float64 [directions, 2, gates * H]."""
        directions, outputs, _ = self.weight.shape
        if not isinstance(self._bias, Constant):
            return np.zeros((directions, 2, outputs))
        return np.asarray(self._bias.values.astype(np.float64).reshape(directions, 2, outputs))

    def bias(self) -> Array:
        return self._biases()[:, self.position - _INPUT].reshape(-1)

    def matrix(self) -> Array:
        return np.ascontiguousarray(self.weight.values.astype(np.float64).transpose(0, 2, 1))

    def patches(self, x: Array, rows: int, rng: np.random.Generator) -> Array:
        """From x [time, batch, K], or from Y [time, directions, batch, H] (`layout` 1: batch first)."""
        directions, length = self.groups, self.length
        if self.position == _HIDDEN:
            axis = 2 if self.node.attrs.get("layout", 0) else 1
            split = np.moveaxis(x, axis, 0).reshape(directions, -1, length)
        else:
            split = np.broadcast_to(x.reshape(1, -1, length), (directions, x.size // length, length))
        return np.ascontiguousarray(split[:, pick(split.shape[1], rows, rng)])

    def observed(self, value: Array, rows: int, rng: np.random.Generator) -> Array:
        x = self.patches(value, rows, rng)
        product = np.matmul(x, self.matrix().astype(x.dtype)).transpose(1, 0, 2).reshape(x.shape[1], -1)
        return np.asarray(product + self.bias().astype(x.dtype))

    def kept_outputs(self, keep: Callable[[Any, int], Array]) -> Array:
        outputs = self.weight.shape[1]
        return np.asarray((np.arange(self.groups)[:, None] * outputs + keep(self.weight, 1)).reshape(-1))

    def on(self, model: Model, twin: Node) -> Recurrent:
        return replace(self, node=twin)

    def rewrite(self, model: Model, weight: Array, bias: Array) -> None:
        old = self.weight
        self.rewrite_bias(model, bias)
        native = np.ascontiguousarray(weight.transpose(0, 2, 1).astype(old.dtype))
        self.node.inputs[self.position] = model.constant(model.graph, old.name, native)

    def rewrite_bias(self, model: Model, bias: Array) -> None:
        """Give this half of B new values [directions * gates * H], if B is known."""
        if not self.takes_bias:
            return
        both = self._biases()
        both[:, self.position - _INPUT] = bias.reshape(self.groups, -1)
        name = f"{self.node.label}_bias" if self._bias is None else self._bias.name
        values = both.reshape(self.groups, -1).astype(self.weight.dtype)
        while len(self.node.inputs) <= _BIAS:
            self.node.inputs.append(Variable(""))
        self.node.inputs[_BIAS] = model.constant(model.graph, name, values)


def recurrent_sites(model: Model) -> list[Recurrent]:
    """Of the recurrent nodes of the main graph, in order: each constant W, and each constant R where Y has a name."""
    found: list[Recurrent] = []
    for number, node in enumerate(model.graph.nodes):
        if node.kind not in ("LSTM", "GRU", "RNN"):
            continue
        states = node.outputs[0].name and (node.op != "GRU" or node.attrs.get("linear_before_reset", 0))
        for position in (_INPUT, _HIDDEN) if states else (_INPUT,):
            weight = node.inputs[position]
            if isinstance(weight, Constant) and weight.dtype.kind == "f":
                found.append(Recurrent(node, number, position))
    return found


def expose_states(model: Model) -> None:
    """Give recurrent nodes that only return their last state the output with all states."""
    for scope in model.graph.scopes():
        for node in scope.nodes:
            if node.kind in ("LSTM", "GRU", "RNN") and not node.outputs[0].name:
                node.outputs[0] = model.variable(f"{node.label}_states")
