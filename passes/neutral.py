"""Nodes that do nothing: rules that name the value which a node's first output equals, bit for bit.

A rule never looks at what recorded shapes say, only at inferred ones. Where a shape decides, equal symbols are equal
numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto

from onnxcomp.graph import Node, producer
from onnxcomp.passes.site import Site

__all__ = ["equal_value"]

Rule = Callable[[Site, Node], Any]
_FAR = (1 << 31) - 1  # exporters write this or more for "to the end"


def equal_value(site: Site, node: Node) -> Any | None:
    """The tensor that the node's first output always equals, None if there is none that is known."""
    rule = _RULES.get(node.kind)
    if rule is None or not node.inputs or not node.plain:
        return None
    return rule(site, node)


def _input(site: Site, node: Node) -> Any:
    return node.inputs[0]


def _only_input(site: Site, node: Node) -> Any:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _only_output(site: Site, node: Node) -> Any:
    return node.inputs[0] if len(node.outputs) == 1 else None


def _dropout(site: Site, node: Node) -> Any:
    if site.opset < 7:
        return node.inputs[0] if node.attrs.get("is_test", 0) else None
    if site.omitted(node, 2):
        return node.inputs[0]
    training = site.value(node, 2)
    return node.inputs[0] if training is not None and not training.any() else None


def _cast(site: Site, node: Node) -> Any:
    """A cast to the type that is there already, or back from a type that held every value."""
    target = node.attrs.get("to") if node.op == "Cast" else site.shapes[node.inputs[1]].elem or None
    if target is None:
        return None
    if site.shapes[node.inputs[0]].elem == target:
        return node.inputs[0]
    return None


def _transpose(site: Site, node: Node) -> Any:
    perm = node.attrs.get("perm")
    rank = site.shapes[node.inputs[0]].rank
    if perm is None:
        return node.inputs[0] if rank in (0, 1) else None
    return node.inputs[0] if list(perm) == list(range(len(perm))) else None


def _undoes(other: str) -> Rule:
    """Squeeze and Unsqueeze of the same axes; both count negative axes from the same end of the same rank."""

    def rule(site: Site, node: Node) -> Any:
        before = site.before(node, other)
        if before is None:
            return None
        wide = before.outputs[0] if other == "Unsqueeze" else before.inputs[0]
        rank = site.shapes[wide].rank
        axes, undone = site.axes(node, rank), site.axes(before, rank)
        return before.inputs[0] if axes is not None and axes == undone else None

    return rule


def _twice(op: str) -> Rule:
    """An operator that is its own inverse."""

    def rule(site: Site, node: Node) -> Any:
        before = site.before(node, op)
        return None if before is None else before.inputs[0]

    return rule


def _idempotent(site: Site, node: Node) -> Any:
    before = site.before(node, node.op)
    return None if before is None else before.outputs[0]


def _same_shape(site: Site, node: Node) -> Any:
    """An operator that keeps the elements and their order, and here the shape as well."""
    return node.inputs[0] if site.same_shape(node.inputs[0], node.outputs[0]) else None


def _reshape(site: Site, node: Node) -> Any:
    """A Reshape to the shape that is there; also to one dimension of a vector, which any target [-1] is."""
    target = site.integers(node, 1, "shape")
    if target == [-1] and site.shapes[node.inputs[0]].rank == 1:
        return node.inputs[0]
    if target is not None and not node.attrs.get("allowzero", 0) and site.shapes[node.inputs[0]].rank == len(target):
        # Zeros copy dimensions, and one dimension follows from the others.
        if all(t == 0 for t in target):
            return node.inputs[0]
        dims = site.shapes[node.inputs[0]].shape or ()
        known = [t == 0 or (t > 0 and t == d) for t, d in zip(target, dims, strict=True)]
        if known.count(False) == 1 and target[known.index(False)] == -1:
            return node.inputs[0]
    return _same_shape(site, node)


def _expand(site: Site, node: Node) -> Any:
    """An Expand that broadcasts to what is there; the target's rank must not be larger."""
    weight = site.model.weight(node.inputs[1]) if len(node.inputs) > 1 else None
    if weight is not None and len(weight.shape) == 1:
        target = tuple(int(d) for d in weight.load())
        return node.inputs[0] if site.within(target, node.inputs[0]) else None
    return _exactly_same_shape(site, node)


def _exactly_same_shape(site: Site, node: Node) -> Any:
    before, after = site.shapes[node.inputs[0]].shape, site.shapes[node.outputs[0]].shape
    return node.inputs[0] if before is not None and before == after and None not in before else None


def _slice(site: Site, node: Node) -> Any:
    """A Slice of everything: forward, from the start, to the end."""
    steps = [1] if site.omitted(node, 4) else site.integers(node, 4, "steps")
    if steps is None or any(s != 1 for s in steps):
        return None
    starts, ends = site.integers(node, 1, "starts"), site.integers(node, 2, "ends")
    if starts is not None and ends is not None and not any(starts) and all(e >= _FAR for e in ends):
        return node.inputs[0]
    return _exactly_same_shape(site, node)


def _pad(site: Site, node: Node) -> Any:
    pads = site.integers(node, 1, "pads")
    return node.inputs[0] if pads is not None and not any(pads) else None


def _tile(site: Site, node: Node) -> Any:
    repeats = site.integers(node, 1, "repeats")
    return node.inputs[0] if repeats is not None and site.opset >= 6 and all(r == 1 for r in repeats) else None


def _resize(site: Site, node: Node) -> Any:
    """Nearest-neighbour resizing to the same size, with coordinates that then fall on the samples."""
    modes = node.attrs.get("mode", "nearest"), node.attrs.get("coordinate_transformation_mode", "half_pixel")
    if modes[0] != "nearest" or modes[1] not in ("half_pixel", "asymmetric", "pytorch_half_pixel"):
        return None
    position = 1 if node.op == "Upsample" or site.opset < 11 else 2
    scales = site.value(node, position)
    if scales is not None and scales.size:
        return node.inputs[0] if bool((scales == 1).all()) else None
    return _exactly_same_shape(site, node) if position == 2 and not site.omitted(node, 3) else None


def _where(site: Site, node: Node) -> Any:
    condition = site.value(node, 0)
    if condition is None or not (condition.all() or not condition.any()) or not condition.size:
        return None
    chosen = node.inputs[1] if condition.all() else node.inputs[2]
    before, after = site.shapes[chosen].shape, site.shapes[node.outputs[0]].shape
    return chosen if before is not None and before == after and None not in before else None


def _neutral_element(value: int, sides: tuple[int, ...]) -> Rule:
    """Arithmetic with a constant that changes nothing and does not broadcast the other side."""

    def rule(site: Site, node: Node) -> Any:
        if len(node.inputs) != 2 or (site.opset < 7 and "axis" in node.attrs):
            return None
        for side in sides:
            weight, other = site.model.weight(node.inputs[side]), node.inputs[1 - side]
            if weight is None or weight.size > 1 << 16 or not weight.size or not site.within(weight.shape, other):
                continue
            if weight.data_type == TensorProto.STRING or not _all_equal(weight.load(), value):
                continue
            return other
        return None

    return rule


def _all_equal(array: np.ndarray[Any, Any], value: int) -> bool:
    """Every element is `value`; x - (-0.0) turns -0.0 into 0.0, so a zero must be a positive one."""
    return bool((array == value).all()) and not (value == 0 and array.dtype.kind == "f" and np.signbit(array).any())


def _add(site: Site, node: Node) -> Any:
    """x + 0 for integers; for floats only -0.0 is neutral."""
    kind = site.shapes[node.outputs[0]].dtype
    return _neutral_element(0, (0, 1))(site, node) if kind is not None and kind.kind in "iu" else None


def _reduce(site: Site, node: Node) -> Any:
    """A reduction over no axes, where that means to do nothing."""
    if not node.attrs.get("noop_with_empty_axes", 0) or node.attrs.get("axes"):
        return None
    if site.omitted(node, 1):
        return node.inputs[0]
    return node.inputs[0] if site.integers(node, 1, "axes") == [] else None


def _sequence_at(site: Site, node: Node) -> Any:
    """An element of a sequence that was made of single tensors."""
    made = producer(node.inputs[0])
    index = site.value(node, 1)
    if made is None or made.kind != "SequenceConstruct" or index is None or index.size != 1:
        return None
    place = int(index.reshape(-1)[0])
    return made.inputs[place] if -len(made.inputs) <= place < len(made.inputs) else None


_RULES: dict[str, Rule] = {
    "Identity": _input,
    "Dropout": _dropout,
    "Cast": _cast,
    "CastLike": _cast,
    "Transpose": _transpose,
    "Squeeze": _undoes("Unsqueeze"),
    "Unsqueeze": _undoes("Squeeze"),
    "Neg": _twice("Neg"),
    "Not": _twice("Not"),
    **dict.fromkeys(("Relu", "Abs", "Ceil", "Floor", "Round", "Sign"), _idempotent),
    **dict.fromkeys(("Concat", "Sum", "Max", "Min", "Mean"), _only_input),
    "Split": _only_output,
    "Reshape": _reshape,
    "Flatten": _same_shape,
    "Expand": _expand,
    "Slice": _slice,
    "Pad": _pad,
    "Tile": _tile,
    "Resize": _resize,
    "Upsample": _resize,
    "Where": _where,
    "Mul": _neutral_element(1, (0, 1)),
    "Div": _neutral_element(1, (1,)),
    "Sub": _neutral_element(0, (1,)),
    "Add": _add,
    "Pow": _neutral_element(1, (1,)),
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"), _reduce),
    "SequenceAt": _sequence_at,
}
