"""How weights are stored, and the same model with all of them as float initializers ("plain form").

A weight lies in the file as float values, or as int8 codes behind DequantizeLinear(scale), behind Cast and
Mul(scale), or behind Cast, Mul and Cast. In the plain form each of these is one float initializer, so that whoever
changes weights sees one kind; what was changed then goes back into the form that the model has, code by code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Constant, Graph, Model, Node
from onnxcomp.shapes import infer

__all__ = ["Key", "Storage", "by_key", "plain_form", "store_codes"]

Array = npt.NDArray[Any]
Key = tuple[int, str]  # position of the scope, name in the plain form: the same in every copy of the model
_CODES = (np.dtype(np.int8), np.dtype(np.int32))


@dataclass(frozen=True)
class Storage:
    """Codes of a weight: the initializer that holds them, and the scale (float64, broadcasts to its shape)."""

    constant: str
    scale: Array
    dtype: np.dtype[Any]


def by_key(model: Model) -> dict[Key, tuple[Graph, Constant]]:
    """The initializers of all scopes of the main graph."""
    return {
        (number, item.name): (scope, item)
        for number, scope in enumerate(model.graph.scopes())
        for item in scope.initializers
        if isinstance(item, Constant)
    }


def plain_form(model: Model) -> tuple[Model, dict[Key, Storage]]:
    """A copy with float initializers in place of codes, and how those are stored in `model`."""
    copy = model.copy()
    found: dict[Key, Storage] = {}
    for number, scope in enumerate(copy.graph.scopes()):
        for node in list(scope.nodes):
            chain = _chain(node)
            if chain is None:
                continue
            codes, scale, last = chain
            if codes not in scope.initializers or last.outputs[0] in scope.outputs:
                continue
            kind = last.outputs[0].dtype or np.float32
            values = (codes.values.astype(np.float64) * scale).astype(kind)
            weight = copy.constant(scope, f"{last.outputs[0].name}_plain", values)
            found[number, weight.name] = Storage(codes.name, scale, codes.dtype)
            copy.redirect(last.outputs[0], weight)
            scope.remove([last])
    shapes = infer(copy)
    for node in copy.graph.nodes:  # a cut through the graph needs the types of what crosses it
        for tensor in node.outputs:
            tensor.dtype = tensor.dtype or shapes[tensor].dtype
    return copy, found


def _chain(node: Node) -> tuple[Constant, Array, Node] | None:
    """The codes that a node starts to decode, their scale, and the last node of the decoding."""
    source = node.inputs[0] if node.inputs else None
    if not isinstance(source, Constant) or source.dtype not in _CODES or node.domain or len(source.outputs) != 1:
        return None
    if node.op == "DequantizeLinear":
        return _dequantized(node, source)
    if node.op != "Cast":
        return None
    product = _only_reader(node)
    if product is None or product.op != "Mul":
        return None
    scale = next((t for t in product.inputs if isinstance(t, Constant)), None)
    if scale is None:
        return None
    narrow = _only_reader(product)
    last = narrow if narrow is not None and narrow.op == "Cast" else product
    return source, np.asarray(scale.values.astype(np.float64)), last


def _dequantized(node: Node, source: Constant) -> tuple[Constant, Array, Node] | None:
    scale, *rest = node.inputs[1:]
    if not isinstance(scale, Constant) or node.attrs.get("block_size", 0):
        return None
    zero = rest[0] if rest and rest[0].name else None
    if zero is not None and not (isinstance(zero, Constant) and not zero.values.any()):
        return None
    values = np.asarray(scale.values.astype(np.float64))
    if values.size > 1:
        shape = [1] * len(source.shape)
        shape[int(node.attrs.get("axis", 1))] = -1
        values = values.reshape(shape)
    return source, values.reshape(()) if values.size == 1 else values, node


def _only_reader(node: Node) -> Node | None:
    readers: list[Node] = list(node.outputs[0].outputs)
    return readers[0] if len(readers) == 1 and not readers[0].domain else None


def store_codes(model: Model, changed: Mapping[Key, Array], storage: Mapping[Key, Storage]) -> None:
    """Write values of the plain form back as codes, in place: each code is value / scale, rounded."""
    constants = by_key(model)
    for key, values in changed.items():
        held = storage[key]
        limits = np.iinfo(held.dtype)
        codes = np.clip(np.rint(values.astype(np.float64) / held.scale), limits.min, limits.max)
        _, constant = constants[key[0], held.constant]
        constant.values = codes.astype(held.dtype)
