"""Values of shape arithmetic, known in part: `Shape(x)` of a dynamic batch is ["N", 3, 224, 224].

A value is a list of entries, each an int, or a str (a symbolic dimension of the model), or None (unknown). Only
integer vectors and scalars that come from shapes and constants are followed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Graph, Model, Node
from onnxcomp.shapes import Shapes

__all__ = ["ShapeValues"]

Entry = int | str | None
_MAX_LENGTH = 64


class ShapeValues:
    """What is known of each integer value of one scope, computed once in node order."""

    def __init__(self, model: Model, scope: Graph, shapes: Shapes) -> None:
        self._model = model
        self._shapes = shapes
        self._known: dict[Any, tuple[list[Entry], bool]] = {}
        for node in scope.nodes:
            rule = _RULES.get(node.op) if not node.domain else None
            if rule is None or not node.outputs:
                continue
            found = rule(self, node)
            if found is not None and len(found[0]) <= _MAX_LENGTH:
                self._known[node.outputs[0]] = found

    def __getitem__(self, tensor: Any) -> list[Entry] | None:
        """The entries of a value, None if nothing is known of it."""
        found = self.entries(tensor)
        return None if found is None else found[0]

    def array(self, tensor: Any) -> npt.NDArray[np.int64] | None:
        """The value as an int64 array if it is fully known and was computed (constants give None)."""
        found = self._known.get(tensor)
        if found is None or not all(isinstance(e, int) for e in found[0]):
            return None
        values, scalar = found
        elem = self._shapes[tensor].elem
        if elem != 7:  # INT64
            return None
        return np.asarray(values[0] if scalar else values, np.int64)

    def entries(self, tensor: Any) -> tuple[list[Entry], bool] | None:
        """Entries, and whether the value is a scalar."""
        if tensor in self._known:
            return self._known[tensor]
        weight = self._model.weight(tensor) if tensor.name else None
        if weight is None or weight.data_type not in (6, 7) or weight.size > _MAX_LENGTH or len(weight.shape) > 1:
            return None
        return [int(v) for v in weight.load().reshape(-1)], weight.shape == ()

    def integers(self, tensor: Any) -> list[int] | None:
        """The entries of a value of which all are known."""
        found = self.entries(tensor)
        if found is None or not all(isinstance(e, int) for e in found[0]):
            return None
        return [e for e in found[0] if isinstance(e, int)]

    def shape(self, tensor: Any) -> list[Entry] | None:
        found = self._shapes[tensor].shape
        return None if found is None else list(found)


Found = tuple[list[Entry], bool] | None


def _shape(values: ShapeValues, node: Node) -> Found:
    dims = values.shape(node.inputs[0])
    if dims is None:
        return None
    start, end = node.attrs.get("start", 0), node.attrs.get("end", len(dims))
    return dims[slice(start, end)], False


def _size(values: ShapeValues, node: Node) -> Found:
    dims = values.shape(node.inputs[0])
    if dims is None or not all(isinstance(d, int) for d in dims):
        return None
    return [int(np.prod([d for d in dims if isinstance(d, int)], dtype=np.int64))], True


def _same(values: ShapeValues, node: Node) -> Found:
    return values.entries(node.inputs[0])


def _cast(values: ShapeValues, node: Node) -> Found:
    return values.entries(node.inputs[0]) if node.attrs.get("to") in (6, 7) else None


def _gather(values: ShapeValues, node: Node) -> Found:
    data, indices = values.entries(node.inputs[0]), values.entries(node.inputs[1])
    picks = values.integers(node.inputs[1])
    if data is None or indices is None or picks is None or data[1] or node.attrs.get("axis", 0) not in (0, -1):
        return None
    if any(not -len(data[0]) <= p < len(data[0]) for p in picks):
        return None
    return [data[0][p] for p in picks], indices[1]


def _slice(values: ShapeValues, node: Node) -> Found:
    data = values.entries(node.inputs[0])
    if data is None or data[1]:
        return None
    if len(node.inputs) == 1:
        bounds = [node.attrs.get("starts"), node.attrs.get("ends"), node.attrs.get("axes", [0]), [1]]
    else:
        bounds = [values.integers(t) if t.name else None for t in node.inputs[1:]]
        bounds += [[0], [1]][len(bounds) - 2 :] if len(bounds) < 4 else []
        bounds = [b if b is not None else d for b, d in zip(bounds, [None, None, [0], [1]], strict=True)]
    if any(b is None or len(b) != 1 for b in bounds) or bounds[2][0] not in (0, -1):
        return None
    start, end, _, step = (b[0] for b in bounds)
    if step < 0 and end < -len(data[0]):
        end = None
    return data[0][slice(start, end, step)], False


def _concat(values: ShapeValues, node: Node) -> Found:
    parts = [values.entries(t) for t in node.inputs]
    if any(p is None or p[1] for p in parts):
        return None
    return [e for p in parts if p is not None for e in p[0]], False


def _unsqueeze(values: ShapeValues, node: Node) -> Found:
    data = values.entries(node.inputs[0])
    axes = values.integers(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("axes")
    return (data[0], False) if data is not None and data[1] and axes in ([0], [-1]) else None


def _squeeze(values: ShapeValues, node: Node) -> Found:
    data = values.entries(node.inputs[0])
    return (data[0], True) if data is not None and not data[1] and len(data[0]) == 1 else None


def _arithmetic(compute: Callable[[int, int], int | None]) -> Callable[[ShapeValues, Node], Found]:
    def rule(values: ShapeValues, node: Node) -> Found:
        a, b = values.entries(node.inputs[0]), values.entries(node.inputs[1])
        if a is None or b is None:
            return None
        length = max(len(a[0]), len(b[0]))
        if {len(a[0]), len(b[0])} - {1, length}:
            return None
        left, right = (e * length if len(e) == 1 else e for e in (a[0], b[0]))
        pairs = zip(left, right, strict=True)
        result: list[Entry] = [
            compute(x, y) if isinstance(x, int) and isinstance(y, int) else None for x, y in pairs
        ]
        return result, a[1] and b[1]

    return rule


def _divide(x: int, y: int) -> int | None:
    """ONNX integer division truncates toward zero."""
    return None if y == 0 else int(abs(x) // abs(y)) * (1 if (x < 0) == (y < 0) else -1)


_RULES: dict[str, Callable[[ShapeValues, Node], Found]] = {
    "Shape": _shape,
    "Size": _size,
    "Identity": _same,
    "Cast": _cast,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Add": _arithmetic(lambda x, y: x + y),
    "Sub": _arithmetic(lambda x, y: x - y),
    "Mul": _arithmetic(lambda x, y: x * y),
    "Div": _arithmetic(_divide),
}
