"""Values of shape arithmetic, known in part: `Shape(x)` of a dynamic batch is ["N", 3, 224, 224].

A value is a list of entries, each an int, or a str (a symbolic dimension of the model, or an expression of such: equal
texts are equal numbers), or None (unknown). Only integer and boolean vectors and scalars that come from shapes and
constants are followed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from onnxcomp.graph import Graph, Model, Node
from onnxcomp.passes.dimensions import Entry, add, divide, equal, extreme, multiply, subtract
from onnxcomp.shapes import Shapes

__all__ = ["ShapeValues"]

Found = tuple[list[Entry], bool] | None
_MAX_LENGTH = 64
_DTYPES: dict[int, Any] = {TensorProto.INT32: np.int32, TensorProto.INT64: np.int64, TensorProto.BOOL: np.bool_}


class ShapeValues:
    """What is known of each integer value of one scope, computed once in node order."""

    def __init__(self, model: Model, scope: Graph, shapes: Shapes) -> None:
        self._model = model
        self._shapes = shapes
        self._known: dict[Any, tuple[list[Entry], bool]] = {}
        for node in scope.nodes:
            rule = _RULES.get(node.kind)
            if rule is None or not node.outputs or not node.plain:
                continue
            found = rule(self, node)
            if found is not None and len(found[0]) <= _MAX_LENGTH:
                self._known[node.outputs[0]] = found

    def __getitem__(self, tensor: Any) -> list[Entry] | None:
        """The entries of a value, None if nothing is known of it."""
        found = self.entries(tensor)
        return None if found is None else found[0]

    def array(self, tensor: Any) -> npt.NDArray[Any] | None:
        """The value if it is fully known and was computed (constants give None)."""
        found = self._known.get(tensor)
        dtype = _DTYPES.get(self._shapes[tensor].elem)
        if found is None or dtype is None:
            return None
        values, scalar = found
        exact = np.asarray([e for e in values if isinstance(e, int)], object)
        if len(exact) != len(values) or (dtype is not np.bool_ and not _fits(values, np.iinfo(dtype))):
            return None
        return np.asarray(exact[0] if scalar else exact, dtype)

    def key(self, tensor: Any) -> Hashable:
        """Equal keys: equal values, of which some entry is symbolic. None if an entry is unknown."""
        found, elem = self._known.get(tensor), self._shapes[tensor].elem
        if found is None or not elem or None in found[0] or not any(isinstance(e, str) for e in found[0]):
            return None
        return (elem, found[1], *found[0])

    def entries(self, tensor: Any) -> tuple[list[Entry], bool] | None:
        """Entries, and whether the value is a scalar."""
        if tensor in self._known:
            return self._known[tensor]
        weight = self._model.weight(tensor) if tensor.name else None
        if weight is None or weight.data_type not in _DTYPES or weight.size > _MAX_LENGTH or len(weight.shape) > 1:
            return None
        return [int(v) for v in weight.load().reshape(-1)], weight.shape == ()

    def scalar(self, tensor: Any) -> bool:
        found = self.entries(tensor)
        return found is not None and found[1]

    def integers(self, tensor: Any) -> list[int] | None:
        """The entries of a value of which all are known."""
        found = self.entries(tensor)
        known = [e for e in found[0] if isinstance(e, int)] if found is not None else []
        return known if found is not None and len(known) == len(found[0]) else None

    def shape(self, tensor: Any) -> list[Entry] | None:
        found = self._shapes[tensor].shape
        return None if found is None else list(found)

    def elem(self, tensor: Any) -> int:
        return self._shapes[tensor].elem


def _fits(values: list[Entry], limits: Any) -> bool:
    return all(isinstance(v, int) and limits.min <= v <= limits.max for v in values)


def _shape(values: ShapeValues, node: Node) -> Found:
    dims = values.shape(node.inputs[0])
    if dims is None:
        return None
    return dims[slice(node.attrs.get("start", 0), node.attrs.get("end", len(dims)))], False


def _size(values: ShapeValues, node: Node) -> Found:
    dims = values.shape(node.inputs[0])
    return None if dims is None else ([_product(dims)], True)


def _product(entries: list[Entry]) -> Entry:
    total: Entry = 1
    for entry in entries:
        total = multiply(total, entry)
    return total


def _same(values: ShapeValues, node: Node) -> Found:
    return values.entries(node.inputs[0])


def _cast(values: ShapeValues, node: Node) -> Found:
    """Between integers; a symbol below 2^31 is the same number in both."""
    return values.entries(node.inputs[0]) if node.attrs.get("to") in (TensorProto.INT32, TensorProto.INT64) else None


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
    given: list[list[int] | None] = [node.attrs.get("starts"), node.attrs.get("ends"), node.attrs.get("axes", [0]), [1]]
    if len(node.inputs) > 1:
        given = [None, None, [0], [1]]
        for place, tensor in enumerate(node.inputs[1:]):
            if tensor.name:
                given[place] = values.integers(tensor)
    bounds = [b[0] for b in given if b is not None and len(b) == 1]
    if len(bounds) != 4 or bounds[2] not in (0, -1) or bounds[3] == 0:
        return None
    start, end, _, step = bounds
    if step < 0 and end < -len(data[0]):
        return data[0][slice(start, None, step)], False
    return data[0][slice(start, end, step)], False


def _concat(values: ShapeValues, node: Node) -> Found:
    parts = [values.entries(t) for t in node.inputs]
    if all(p is None for p in parts):
        return None
    joined: list[Entry] = []
    for tensor, part in zip(node.inputs, parts, strict=True):
        dims = values.shape(tensor)
        if part is not None and not part[1]:
            joined.extend(part[0])
        elif (
            part is None and dims is not None and len(dims) == 1 and isinstance(dims[0], int) and dims[0] <= _MAX_LENGTH
        ):
            joined.extend([None] * dims[0])  # nothing is known but how many there are
        else:
            return None
    return joined, False


def _unsqueeze(values: ShapeValues, node: Node) -> Found:
    data = values.entries(node.inputs[0])
    axes = values.integers(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("axes")
    return (data[0], False) if data is not None and data[1] and axes in ([0], [-1]) else None


def _squeeze(values: ShapeValues, node: Node) -> Found:
    data = values.entries(node.inputs[0])
    return (data[0], True) if data is not None and not data[1] and len(data[0]) == 1 else None


def _reshape(values: ShapeValues, node: Node) -> Found:
    data = values.entries(node.inputs[0])
    target = values.integers(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("shape")
    if data is None or target is None or node.attrs.get("allowzero", 0):
        return None
    if target in ([-1], [len(data[0])]):
        return data[0], False
    return (data[0], True) if target == [] and len(data[0]) == 1 else None


def _constant_of_shape(values: ShapeValues, node: Node) -> Found:
    target, value = values.integers(node.inputs[0]), node.attrs.get("value")
    if target is None or len(target) != 1 or not 0 <= target[0] <= _MAX_LENGTH:
        return None
    if value is None or value.weight.data_type not in _DTYPES:
        return None
    return [int(value.values.reshape(-1)[0])] * target[0], False


def _range(values: ShapeValues, node: Node) -> Found:
    bounds = [values.integers(t) for t in node.inputs]
    if any(b is None or len(b) != 1 for b in bounds):
        return None
    start, end, step = (b[0] for b in bounds if b is not None)
    if step == 0 or len(range(start, end, step)) > _MAX_LENGTH:
        return None
    return list(range(start, end, step)), False


def _reduce_prod(values: ShapeValues, node: Node) -> Found:
    data, dims = values.entries(node.inputs[0]), values.shape(node.inputs[0])
    if data is None or data[1] or dims is None or len(dims) != 1:
        return None
    axes = (
        values.integers(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1].name else node.attrs.get("axes", [0])
    )
    return ([_product(data[0])], not node.attrs.get("keepdims", 1)) if axes in ([0], [-1]) else None


def _where(values: ShapeValues, node: Node) -> Found:
    parts = [values.entries(t) for t in node.inputs]
    condition, a, b = parts
    if condition is None or a is None or b is None:
        return None
    lined = _broadcast(condition[0], a[0], b[0])
    if lined is None:
        return None
    chosen = [x if c == 1 else y if c == 0 else x if x == y else None for c, x, y in lined]
    return chosen, condition[1] and a[1] and b[1]


def _broadcast(*parts: list[Entry]) -> list[tuple[Entry, ...]] | None:
    length = 0 if any(not p for p in parts) else max(len(p) for p in parts)
    if any(len(p) not in (1, length) for p in parts):
        return None
    return list(zip(*(p * length if len(p) == 1 else p for p in parts), strict=True))


def _elementwise(compute: Callable[[Entry, Entry], Entry]) -> Callable[[ShapeValues, Node], Found]:
    def rule(values: ShapeValues, node: Node) -> Found:
        if len(node.inputs) != 2 or "axis" in node.attrs:
            return None
        a, b = values.entries(node.inputs[0]), values.entries(node.inputs[1])
        lined = None if a is None or b is None else _broadcast(a[0], b[0])
        if a is None or b is None or lined is None:
            return None
        return [compute(x, y) for x, y in lined], a[1] and b[1]

    return rule


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
    "Reshape": _reshape,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "ReduceProd": _reduce_prod,
    "Where": _where,
    "Equal": _elementwise(equal),
    "Add": _elementwise(add),
    "Sub": _elementwise(subtract),
    "Mul": _elementwise(multiply),
    "Div": _elementwise(divide),
    "Min": _elementwise(extreme(min)),
    "Max": _elementwise(extreme(max)),
}
