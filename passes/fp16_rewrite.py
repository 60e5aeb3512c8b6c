"""Let chosen nodes compute in float16, with conversions where float32 begins and ends.

    x (float32) -> Cast -> node in float16 -> Cast -> readers in float32

A value has at most one conversion in each direction; between two float16 nodes there is none. The interface of the
model and of its subgraphs stays float32.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxcomp.graph import Constant, Graph, Model, Node
from onnxcomp.passes.fp16_rules import LARGEST, half_positions
from onnxcomp.shapes import Shapes

__all__ = ["rounded_to_half", "to_half"]

Array = npt.NDArray[Any]
_FLOAT, _HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def to_half(
    model: Model, scope: Graph, nodes: Collection[Node], shapes: Shapes, version: int, constants: dict[Any, Constant]
) -> None:
    """Convert `nodes` of a scope, in place. The scope is not sorted afterwards.

    `constants` holds what other scopes have converted already, by its float32 form, and takes in what is new.
    """
    writer = _Writer(model, scope, constants)
    chosen = set(nodes)
    for node in [n for n in scope.nodes if n in chosen]:
        positions = half_positions(node, version)
        if positions is None:
            continue
        for i in positions[0]:
            if node.inputs[i].name and shapes[node.inputs[i]].elem == _FLOAT:
                node.inputs[i] = writer.half(node.inputs[i])
        for i in positions[1]:
            if node.outputs[i].name and shapes[node.outputs[i]].elem == _FLOAT:
                node.outputs[i] = writer.produced(node.outputs[i])
    writer.widen()


def rounded_to_half(model: Model, scope: Graph, nodes: Collection[Node], shapes: Shapes, version: int) -> None:
    """Make `nodes` compute in float32 what they would in float16, up to sums: weights and results are rounded to it.

    ONNX Runtime's CPU provider runs neighbouring operators in float32 without rounding in between, so the float16 model
    itself shows neither the error nor the overflow that it has on a GPU. In place; the scope is not sorted afterwards.
    """
    chosen = set(nodes)
    for node in [n for n in scope.nodes if n in chosen]:
        positions = half_positions(node, version)
        for i in positions[0] if positions is not None else []:
            weight = model.weight(node.inputs[i]) if node.inputs[i].name else None
            if weight is not None and weight.data_type == _FLOAT:
                rounded = _narrow(weight.load()).astype(np.float32)
                node.inputs[i] = model.constant(scope, f"{node.inputs[i].name}_h", rounded)
        for i in positions[1] if positions is not None else []:
            tensor = node.outputs[i]
            if tensor.name and shapes[tensor].elem == _FLOAT:
                exact, narrow = model.variable(f"{tensor.name}_exact"), model.variable(f"{tensor.name}_h")
                node.outputs[i] = exact
                scope.add("Cast", [exact], [narrow], attrs={"to": _HALF})
                scope.add("Cast", [narrow], [tensor], attrs={"to": _FLOAT})


class _Writer:
    def __init__(self, model: Model, scope: Graph, constants: dict[Any, Constant]) -> None:
        self._model = model
        self._scope = scope
        self._constants = constants
        self._halves: dict[Any, Any] = {}
        self._made: list[Any] = []

    def half(self, tensor: Any) -> Any:
        """The float16 form of a value: as computed, as a constant, or converted."""
        if tensor in self._halves:
            return self._halves[tensor]
        if tensor in self._constants:
            return self._constants[tensor]
        weight = self._model.weight(tensor)
        if weight is not None:  # in the main graph, so that all scopes see it
            made = self._model.constant(self._model.graph, f"{tensor.name}_h", _narrow(weight.load()))
            self._constants[tensor] = made
            return made
        result = self._halves[tensor] = self._model.variable(f"{tensor.name}_h")
        self._scope.add("Cast", [tensor], [result], attrs={"to": _HALF})
        return result

    def produced(self, tensor: Any) -> Any:
        """A new value that a float16 node computes in place of `tensor`."""
        result = self._halves[tensor] = self._model.variable(f"{tensor.name}_h")
        self._made.append(tensor)
        return result

    def widen(self) -> None:
        """Convert back what somebody still reads as float32."""
        outputs = set(self._scope.outputs)
        captured = {t for n in self._scope.nodes for b in n.bodies() for s in b.scopes() for t in _read(s)}
        for tensor in self._made:
            if tensor.outputs or tensor in outputs or tensor in captured:
                self._scope.add("Cast", [self._halves[tensor]], [tensor], attrs={"to": _FLOAT})


def _read(scope: Graph) -> list[Any]:
    return [*scope.outputs, *(t for n in scope.nodes for t in n.inputs)]


def _narrow(values: Array) -> Array:
    """float16, what is finite clamped to its range."""
    clamped = np.where(np.isfinite(values), np.clip(values, -LARGEST, LARGEST), values)
    return np.asarray(clamped.astype(np.float16))
