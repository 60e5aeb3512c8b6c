"""The layers of a model: nodes that multiply or hold parameters, with what they weigh and cost.

The weight of a layer may lie behind nodes that compute it from constants alone (DequantizeLinear, a decoder
of compressed weights): those belong to the layer, their stored bytes are its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto

from onnxcomp.graph import Graph, Model, Node, producer
from onnxcomp.mac_rules import RULES
from onnxcomp.macs import Dims, Macs
from onnxcomp.shapes import Shapes
from onnxcomp.weights import Weight

__all__ = ["Layer", "Place", "count_parameters", "is_parameter", "layers", "places", "stored"]

_PIECE = 1 << 22  # elements that are looked at in one go
_INTEGERS = frozenset({"int8", "uint8", "int4", "uint4", "int2", "uint2"})
_PACKED = ("com.microsoft.MatMulNBits", "com.microsoft.MatMulBnb4")


@dataclass(frozen=True)
class Layer:
    """One node. `weight_shape` and `dtype` are of its largest constant input, as the node sees it.

    `bits_per_weight` is 8 times the stored bytes behind that input, scales and tables included, per element.
    `quantized` says that the input is an integer of 8 bits or less, or comes from one through
    DequantizeLinear. `macs` is None where it is not known, 0 where the node is in a branch that does not
    count; `share` is its share of all MACs that are known. `nested` says that the node is in a branch or a
    loop.
    """

    node: str
    op: str
    weight_shape: tuple[int, ...] | None
    dtype: str | None
    parameters: int
    bytes: int
    bits_per_weight: float | None
    quantized: bool
    macs: int | None
    share: float
    nested: bool

    @property
    def weighted(self) -> bool:
        """Whether the node multiplies by a constant."""
        return self.op in RULES and self.weight_shape is not None


@dataclass(frozen=True)
class Place:
    """A layer and where it is in the graph: its node, its main constant input, and the largest tensor behind that."""

    layer: Layer
    node: Node
    tensor: Any = None
    weight: Weight | None = None


def stored(model: Model) -> Iterator[tuple[str, Weight]]:
    """Name and payload of every tensor in the file, each once: initializers and Constant nodes."""
    seen: set[int] = set()
    for scope in model.scopes():
        for name, weight in _in_scope(scope):
            if id(weight) not in seen:
                seen.add(id(weight))
                yield name, weight


def _in_scope(scope: Graph) -> Iterator[tuple[str, Weight]]:
    constants = [t for n in scope.nodes for t in n.inputs if getattr(t, "weight", None) is not None]
    for tensor in dict.fromkeys([*scope.initializers, *constants]):
        weight = getattr(tensor, "weight", None) or tensor.default
        if weight is not None:
            yield tensor.name, weight
    for node in scope.nodes:
        value = node.attrs.get("value")
        if node.op == "Constant" and getattr(value, "weight", None) is not None:
            yield node.outputs[0].name, value.weight


def is_parameter(weight: Weight) -> bool:
    """Numbers, except int64, which are shapes and indices."""
    return weight.data_type not in (TensorProto.STRING, TensorProto.BOOL, TensorProto.INT64)


def count_parameters(weights: Iterable[Weight]) -> tuple[int, int]:
    """Number of parameters, and of those that are not zero. Reads one weight at a time, in pieces."""
    total = nonzero = 0
    for weight in weights:
        if is_parameter(weight):
            total += weight.size
            flat = weight.load().reshape(-1)
            nonzero += sum(int(np.count_nonzero(flat[i : i + _PIECE])) for i in range(0, flat.size, _PIECE))
    return total, nonzero


def layers(model: Model, shapes: Shapes, macs: Macs) -> list[Layer]:
    """One entry per node of the main graph and its branches and loops, in file order.

    Nodes are listed that multiply, that call a function that does, or that read parameters of more than one
    element.
    """
    return [place.layer for place in places(model, shapes, macs)]


def places(model: Model, shapes: Shapes, macs: Macs) -> list[Place]:
    """The same as `layers`, each with where it is in the graph."""
    sources = _constant_sources(model)
    unknown = {u.where for u in macs.unknown}
    total = macs.total
    found: list[Place] = []
    for scope in model.graph.scopes():
        for node in scope.nodes:
            constant = {t: s for t in node.inputs if t.name and (s := _sources(model, sources, t))}
            if len(constant) == len({t for t in node.inputs if t.name}) and node not in macs.nodes:
                continue
            weights = {id(w): w for behind in constant.values() for w in behind.values() if is_parameter(w)}
            if node.kind in RULES or node in macs.nodes or any(w.size > 1 for w in weights.values()):
                count = macs.nodes.get(node, None if node.label in unknown else 0)
                share = (count or 0) / total if total else 0.0
                main = _main_input(model, constant, shapes)
                shape, dtype, bits = _main_weight(model, node, main, constant, shapes)
                layer = Layer(
                    node=node.label,
                    op=node.kind,
                    weight_shape=shape,
                    dtype=dtype,
                    parameters=sum(w.size for w in weights.values()),
                    bytes=sum(w.nbytes for w in weights.values()),
                    bits_per_weight=bits,
                    quantized=dtype in _INTEGERS,
                    macs=count,
                    share=share,
                    nested=scope is not model.graph,
                )
                behind = constant[main].values() if main is not None else ()
                found.append(Place(layer, node, main, max(behind, key=lambda w: w.size, default=None)))
    return found


Sources = dict[int, Weight]


def _constant_sources(model: Model) -> dict[Any, Sources]:
    """For each value that nodes compute from constants alone: the constants, by identity."""
    found: dict[Any, Sources] = {}
    for scope in model.graph.scopes():
        for node in scope.nodes:
            inputs = [_sources(model, found, t) for t in node.inputs if t.name]
            if inputs and all(inputs) and not node.bodies():
                merged = {key: weight for behind in inputs for key, weight in behind.items()}
                found.update((output, merged) for output in node.outputs)
    return found


def _sources(model: Model, found: Mapping[Any, Sources], tensor: Any) -> Sources:
    weight = model.weight(tensor)
    return {id(weight): weight} if weight is not None else found.get(tensor, {})


def _main_input(model: Model, constant: Mapping[Any, Sources], shapes: Shapes) -> Any:
    """The largest constant input of known shape that holds numbers, None if there is none."""
    best: tuple[int, Any] | None = None
    for tensor, behind in constant.items():
        size = _size(_dims(model, tensor, shapes))
        if size is not None and any(is_parameter(w) for w in behind.values()) and (best is None or size > best[0]):
            best = size, tensor
    return None if best is None else best[1]


def _dims(model: Model, tensor: Any, shapes: Shapes) -> tuple[Any, ...] | None:
    weight = model.weight(tensor)
    return weight.shape if weight is not None else shapes[tensor].shape


def _size(dims: tuple[Any, ...] | None) -> int | None:
    return math.prod(dims) if dims is not None and all(isinstance(d, int) for d in dims) else None


def _main_weight(
    model: Model, node: Node, tensor: Any, constant: Mapping[Any, Sources], shapes: Shapes
) -> tuple[Dims | None, str | None, float | None]:
    """Shape, stored element type and bits per element of the main constant input."""
    if tensor is None:
        return None, None, None
    dims = tuple(_dims(model, tensor, shapes) or ())
    if node.kind in _PACKED:
        dims = (int(node.attrs["K"]), int(node.attrs["N"]))
    source = producer(tensor)
    inner = source.inputs[0] if source is not None and source.op == "DequantizeLinear" else tensor
    weight = model.weight(inner)
    kind = weight.dtype if weight is not None else shapes[inner].dtype
    size = 8 * sum(w.nbytes for w in constant[tensor].values())
    return dims, str(kind) if kind is not None else None, size / math.prod(dims) if math.prod(dims) else None
