"""Let chosen nodes compute in float16 instead of float32, or the other way round, with conversions at the borders.

    x (float32) -> Cast -> node in float16 -> Cast -> readers in float32

A value has at most one conversion in each direction; between two converted nodes there is none. The interface of the
model and of its subgraphs stays.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxcomp.graph import Constant, Graph, Model, Node, sort
from onnxcomp.manager import Context
from onnxcomp.passes.dead import remove_dead
from onnxcomp.passes.fp16_rules import LARGEST, half_positions
from onnxcomp.shapes import Shapes, infer

__all__ = ["rounded_to_half", "to_half", "widened"]

Array = npt.NDArray[Any]
# The type of what these give is an attribute.
_TYPED = frozenset({"Cast", "CastLike", "Constant", "ConstantOfShape", "EyeLike", "RandomNormal", "RandomUniform"})
_FLOAT, _HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def to_half(
    model: Model, scope: Graph, nodes: Collection[Node], shapes: Shapes, version: int, constants: dict[Any, Constant]
) -> None:
    """Convert `nodes` of a scope, in place. The scope is not sorted afterwards.

    `constants` holds what other scopes have converted already, by its float32 form, and takes in what is new.
    """
    _retype(_Writer(model, scope, constants, _FLOAT, _HALF), nodes, shapes, version)


def widened(model: Model) -> Model:
    """A copy in which everything that computes in float16 does so in float32; the interface stays."""
    copy = model.copy()
    shapes = infer(copy)
    constants: dict[Any, Constant] = {}
    for scope in copy.graph.scopes():
        nodes = [n for n in scope.nodes if n.op not in _TYPED and not n.bodies()]
        _retype(_Writer(copy, scope, constants, _HALF, _FLOAT), nodes, shapes, copy.opset)
    sort(copy)
    remove_dead(copy, Context())
    return copy


def _retype(writer: _Writer, nodes: Collection[Node], shapes: Shapes, version: int) -> None:
    scope, source = writer.scope, writer.source
    chosen = set(nodes)
    for node in [n for n in scope.nodes if n in chosen]:
        positions = half_positions(node, version)
        if positions is None:
            continue
        for i in positions[0]:
            if node.inputs[i].name and shapes[node.inputs[i]].elem == source:
                node.inputs[i] = writer.converted(node.inputs[i])
        for i in positions[1]:
            if node.outputs[i].name and shapes[node.outputs[i]].elem == source:
                node.outputs[i] = writer.produced(node.outputs[i])
    writer.convert_back()


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
    """Values of a scope in the type `target`, made from those in the type `source`."""

    def __init__(
        self, model: Model, scope: Graph, constants: dict[Any, Constant], source: int, target: int
    ) -> None:
        self.scope = scope
        self.source = source
        self._target = target
        self._model = model
        self._constants = constants
        self._converted: dict[Any, Any] = {}
        self._made: list[Any] = []

    def converted(self, tensor: Any) -> Any:
        """A value in the new type: as computed, as a constant, or converted."""
        if tensor in self._converted:
            return self._converted[tensor]
        if tensor in self._constants:
            return self._constants[tensor]
        weight = self._model.weight(tensor)
        if weight is not None:  # in the main graph, so that all scopes see it
            values = weight.load()
            values = _narrow(values) if self._target == _HALF else values.astype(np.float32)
            made = self._model.constant(self._model.graph, f"{tensor.name}_h", values)
            self._constants[tensor] = made
            return made
        result = self._converted[tensor] = self._model.variable(f"{tensor.name}_h")
        self.scope.add("Cast", [tensor], [result], attrs={"to": self._target})
        return result

    def produced(self, tensor: Any) -> Any:
        """A new value that a converted node computes in place of `tensor`."""
        result = self._converted[tensor] = self._model.variable(f"{tensor.name}_h")
        self._made.append(tensor)
        return result

    def convert_back(self) -> None:
        """Give back in the old type what somebody still reads so."""
        outputs = set(self.scope.outputs)
        captured = {t for n in self.scope.nodes for b in n.bodies() for s in b.scopes() for t in _read(s)}
        for tensor in self._made:
            if tensor.outputs or tensor in outputs or tensor in captured:
                self.scope.add("Cast", [self._converted[tensor]], [tensor], attrs={"to": self.source})


def _read(scope: Graph) -> list[Any]:
    return [*scope.outputs, *(t for n in scope.nodes for t in n.inputs)]


def _narrow(values: Array) -> Array:
    """float16, what is finite clamped to its range."""
    clamped = np.where(np.isfinite(values), np.clip(values, -LARGEST, LARGEST), values)
    return np.asarray(clamped.astype(np.float16))
