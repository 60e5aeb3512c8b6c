"""Two nodes in a row that one can do: rules that let a node read further up. Bit-exact.

`Transpose(Transpose(x))` becomes one Transpose, `Concat(a, Concat(b, c))` one Concat, and so on. The first node of the
row stays for its other readers and is dead without them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from onnxcomp.graph import Node, Variable, producer
from onnxcomp.passes.casts import holds_all
from onnxcomp.passes.site import Site

__all__ = ["shorter"]

Edit = Callable[[], None]
Rule = Callable[[Site, Node], Edit | None]

# Operators with one output of the shape of their first input.
_SAME_SHAPE = frozenset({
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BatchNormalization", "Cast", "CastLike", "Ceil",
    "Clip", "Cos", "Cosh", "CumSum", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish",
    "Hardmax", "InstanceNormalization", "IsInf", "IsNaN", "LRN", "LayerNormalization", "LeakyRelu", "Log",
    "LogSoftmax", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Sinh",
    "Softmax", "Softplus", "Softsign", "Sqrt", "Tan", "Tanh", "ThresholdedRelu", "QuantizeLinear",
    "DequantizeLinear",
})  # fmt: skip
_RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
# Operators that only move or repeat elements: of zeros they make zeros.
_MOVES = frozenset({
    "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose",
    "Unsqueeze",
})  # fmt: skip


def shorter(site: Site, node: Node) -> Edit | None:
    """What to do so that the node reads further up, None if there is nothing."""
    rule = _RULES.get(node.kind)
    return rule(site, node) if rule is not None and node.inputs and node.plain else None


def _transpose(site: Site, node: Node) -> Edit | None:
    before, perm = site.before(node, "Transpose"), node.attrs.get("perm")
    if before is None:
        return _reshaping(site, node)
    first = before.attrs.get("perm")
    rank = len(perm or first or ()) or site.shapes[node.inputs[0]].rank
    if rank is None:
        return None
    backwards = list(range(rank))[::-1]
    first, perm = list(first or backwards), list(perm or backwards)
    if len(first) != len(perm):
        return None

    def edit() -> None:
        node.attrs["perm"] = [first[p] for p in perm]
        node.inputs[0] = before.inputs[0]

    return edit


def _reshape(site: Site, node: Node) -> Edit | None:
    """A Reshape sees only the order of the elements, unless zeros in its target copy dimensions."""
    before = next((b for op in _RESHAPES if (b := site.before(node, op)) is not None), None)
    target = site.integers(node, 1, "shape")
    if before is None or target is None or (0 in target and not node.attrs.get("allowzero", 0)):
        return _reshaping(site, node)

    def edit() -> None:
        node.inputs[0] = before.inputs[0]

    return edit


def _reshaping(site: Site, node: Node) -> Edit | None:
    """Two nodes that keep the order of the elements are one Reshape, if its target can be written down."""
    before = producer(node.inputs[0])
    if before is None or not before.plain or len(node.inputs[0].outputs) != 1 or node.inputs[0] in site.scope.outputs:
        return None
    if site.opset < 5 or not (_keeps_order(site, node) and _keeps_order(site, before)):
        return None
    dims = site.shapes[node.outputs[0]].shape
    if dims is None or any(isinstance(d, int) and d <= 0 for d in dims):
        return None
    target = [d if isinstance(d, int) else -1 for d in dims]
    if target.count(-1) > 1:
        return None

    def edit() -> None:
        node.op, node.domain = "Reshape", ""
        node.attrs.clear()
        shape = site.model.constant(site.scope, f"{node.outputs[0].name}_shape", np.asarray(target, np.int64))
        node.inputs = [before.inputs[0], shape]

    return edit


def _keeps_order(site: Site, node: Node) -> bool:
    """Whether the elements stay in their order: also in a Transpose that moves only dimensions of size 1."""
    if node.kind in _RESHAPES:
        return True
    dims, perm = site.shapes[node.inputs[0]].shape if node.kind == "Transpose" else None, node.attrs.get("perm")
    if dims is None:
        return False
    moved = [p for p in (perm or list(range(len(dims)))[::-1]) if dims[p] != 1]
    return moved == sorted(moved)


def _zero_state(site: Site, node: Node) -> Edit | None:
    """A recurrent operator starts from zeros if no initial state is given."""
    zeros = [p for p in (5, 6) if not site.omitted(node, p) and _is_zero(site, node.inputs[p])]
    if not zeros:
        return None

    def edit() -> None:
        for place in zeros:
            node.inputs[place] = Variable("")

    return edit


def _is_zero(site: Site, tensor: Any) -> bool:
    """Whether a value is made of positive zeros only, whatever its shape."""
    stack = [tensor]
    while stack:
        current = stack.pop()
        weight, source = site.model.weight(current), producer(current)
        if weight is not None:
            values = weight.load()
            if values.dtype.kind != "f" or values.any() or np.signbit(values).any():
                return False
        elif source is not None and source.kind in _MOVES:
            stack.extend(source.inputs if source.op == "Concat" else source.inputs[:1])
        elif source is not None and source.kind == "ConstantOfShape" and source.plain:
            value = source.attrs.get("value")
            if value is not None and (value.values.any() or np.signbit(value.values).any()):
                return False
        else:
            return False
    return True


def _merged_axes(op: str) -> Rule:
    """Squeeze after Squeeze, Unsqueeze after Unsqueeze: one with the axes of both."""

    def rule(site: Site, node: Node) -> Edit | None:
        before = site.before(node, op)
        if before is None:
            return _reshaping(site, node)
        inner = before.inputs[0] if op == "Squeeze" else before.outputs[0]
        outer = node.inputs[0] if op == "Squeeze" else node.outputs[0]
        first = site.axes(before, site.shapes[inner].rank)
        second = site.axes(node, site.shapes[outer].rank)
        if first is None or second is None or min([*first, *second], default=0) < 0:
            return None
        axes = _through_squeeze(first, second) if op == "Squeeze" else _through_unsqueeze(first, second)

        def edit() -> None:
            if site.opset >= 13:
                node.inputs[1] = site.model.constant(
                    site.scope, f"{node.outputs[0].name}_axes", np.asarray(axes, np.int64)
                )
            else:
                node.attrs["axes"] = axes
            node.inputs[0] = before.inputs[0]

        return edit

    return rule


def _through_squeeze(first: list[int], second: list[int]) -> list[int]:
    """Axes of the first input that both remove: `second` counts in what `first` leaves."""
    left = [a for a in range(len(first) + max(second, default=0) + 1) if a not in first]
    return sorted([*first, *(left[a] for a in second)])


def _through_unsqueeze(first: list[int], second: list[int]) -> list[int]:
    """Axes of the last output that both insert: `first` counts in what `second` leaves."""
    left = [a for a in range(len(second) + max(first, default=0) + 1) if a not in second]
    return sorted([*second, *(left[a] for a in first)])


def _concat(site: Site, node: Node) -> Edit | None:
    """A Concat inside a Concat of the same axis whose value nobody else reads; parts that are empty."""
    axis = node.attrs.get("axis")
    outputs = set(site.scope.outputs)
    parts: list[Any] = []
    for tensor in node.inputs:
        inner = producer(tensor)
        nested = inner is not None and inner.kind == "Concat" and inner.plain and inner.attrs.get("axis") == axis
        if inner is not None and nested and len(tensor.outputs) == 1 and tensor not in outputs:
            parts.extend(inner.inputs)
            continue
        shape = site.shapes[tensor].shape
        if shape is None or not isinstance(axis, int) or not -len(shape) <= axis < len(shape) or shape[axis] != 0:
            parts.append(tensor)
    if not parts or (len(parts) == len(node.inputs) and all(a is b for a, b in zip(parts, node.inputs, strict=True))):
        return None

    def edit() -> None:
        node.inputs = parts

    return edit


def _cast(site: Site, node: Node) -> Edit | None:
    """A cast by way of a type that holds every value of the first one."""
    before = site.before(node, "Cast")
    if before is None:
        return None
    source = site.shapes[before.inputs[0]].elem
    if not holds_all(source, before.attrs.get("to", 0), node.attrs.get("to", 0)):
        return None

    def edit() -> None:
        node.inputs[0] = before.inputs[0]

    return edit


def _slice(site: Site, node: Node) -> Edit | None:
    """Two forward Slices of different axes."""
    before = site.before(node, "Slice")
    if before is None or site.opset < 10:
        return None
    rank = site.shapes[before.inputs[0]].rank
    first, second = _bounds(site, before, rank), _bounds(site, node, rank)
    if first is None or second is None or set(first[2]) & set(second[2]):
        return None

    def edit() -> None:
        names = ("starts", "ends", "axes", "steps")
        joined = [np.asarray(a + b, np.int64) for a, b in zip(first, second, strict=True)]
        tensors = [
            site.model.constant(site.scope, f"{node.outputs[0].name}_{n}", v)
            for n, v in zip(names, joined, strict=True)
        ]
        node.inputs = [before.inputs[0], *tensors]

    return edit


def _bounds(site: Site, node: Node, rank: int | None) -> tuple[list[int], list[int], list[int], list[int]] | None:
    starts, ends = site.integers(node, 1, "starts"), site.integers(node, 2, "ends")
    if starts is None or ends is None or rank is None:
        return None
    axes = list(range(len(starts))) if site.omitted(node, 3) else site.integers(node, 3, "axes")
    steps = [1] * len(starts) if site.omitted(node, 4) else site.integers(node, 4, "steps")
    if axes is None or steps is None:
        return None
    return starts, ends, [a + rank if a < 0 else a for a in axes], steps


def _shape(site: Site, node: Node) -> Edit | None:
    """The shape of what an elementwise operator gives is the shape of what it takes."""
    before = producer(node.inputs[0])
    if before is None or before.kind not in _SAME_SHAPE or before.outputs[0] is not node.inputs[0]:
        return None
    if not before.inputs or not before.inputs[0].name or site.model.weight(before.inputs[0]) is not None:
        return None

    def edit() -> None:
        node.inputs[0] = before.inputs[0]

    return edit


_RULES: dict[str, Rule] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Squeeze": _merged_axes("Squeeze"),
    "Unsqueeze": _merged_axes("Unsqueeze"),
    "Concat": _concat,
    "Cast": _cast,
    "Slice": _slice,
    "Shape": _shape,
    "Size": _shape,
    "Flatten": _reshaping,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _zero_state),
}
