"""Short names, and no attributes that say what holds anyway: in small files both take a tenth of the bytes, or more."""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Iterator
from typing import Any

import onnx

from onnxcomp.graph import Model, Node

__all__ = ["shortened"]

# Lists of which the specification says in words what holds without them: the same for every axis.
_WINDOWS = frozenset({"Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool"})
_EACH_AXIS = {"dilations": 1, "strides": 1, "pads": 0}


def shortened(model: Model) -> Model:
    """A copy whose inner values are called a, b, c and so on, those that are used most first, and whose nodes have no
    name or attribute that can go. Inputs and outputs of the model keep theirs, and so do the bodies of local functions.
    """
    copy = model.copy()
    for scope, opset in copy.versions():
        for node in scope.nodes:
            for name in _spelled_out(node, opset):
                del node.attrs[name]
    kept = {t.name for t in (*copy.graph.inputs, *copy.graph.outputs)}
    uses: Counter[Any] = Counter()
    for scope in copy.graph.scopes():
        uses.update(t for t in scope.tensors_here() if t.name and t.name not in kept)
        for node in scope.nodes:
            node.name = ""
    free = (name for name in _names() if name not in kept)
    for (tensor, _), name in zip(uses.most_common(), free, strict=False):
        tensor.name = name
    return copy


def _spelled_out(node: Node, opset: int) -> list[str]:
    """Attributes of a node that have the value that holds without them."""
    if node.kind != node.op:
        return []
    try:
        declared = onnx.defs.get_schema(node.op, opset, "").attributes
    except onnx.defs.SchemaError:
        return []
    return [name for name, value in node.attrs.items() if name in declared and _is_default(node, declared[name], value)]


def _is_default(node: Node, declared: onnx.defs.OpSchema.Attribute, value: object) -> bool:
    if declared.name in _EACH_AXIS and node.op in _WINDOWS:
        return isinstance(value, list) and set(value) == {_EACH_AXIS[declared.name]}
    default = declared.default_value
    if not default.name or not isinstance(value, (int, float, str)):
        return False
    held = onnx.helper.get_attribute_value(default)
    return (held.decode() if isinstance(held, bytes) else held) == value


def _names() -> Iterator[str]:
    """a, b, ..., Z, aa, ab and so on."""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_letters, repeat=length))
