"""How much memory and time the constants of a model ask for before any data come in.

A few bytes of constants can demand terabytes: ConstantOfShape, Tile, Range. Each rule here gives the least
number of elements that one operator creates, as far as constants alone fix it. Values that are computed are
not followed; the memory and time limits of `onnxcomp.probe` hold there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from onnx import (
    AttributeProto,
    GraphProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    ValueInfoProto,
    numpy_helper,
)

from onnxcomp.errors import ModelError
from onnxcomp.limits import Limits
from onnxcomp.tensors import ELEMENT_BITS, element_bytes

__all__ = ["RULES", "Scope", "check_loop", "check_size", "check_sparse", "label"]

Number = int | float
_LONGEST = 1024  # elements of a constant that is read; a shape has one per dimension


class Scope:
    """What is known about the values of one graph and of the graphs around it.

    `payload` gives the bytes of a tensor with external data; `sizes` maps names to least numbers of elements.
    """

    def __init__(self, payload: Callable[[TensorProto], bytes], parent: Scope | None = None) -> None:
        self.payload, self.parent = payload, parent
        self.constants: dict[str, TensorProto | list[Number]] = {}
        self.sizes: dict[str, int] = {}

    def enter(self, initializers: Iterable[TensorProto], nodes: Iterable[NodeProto]) -> Scope:
        """The scope of a graph inside this one, with its initializers and Constant nodes."""
        inner = Scope(self.payload, self)
        inner.constants.update((tensor.name, tensor) for tensor in initializers)
        for node in nodes:
            if node.op_type == "Constant" and len(node.attribute) == 1 and any(node.output[:1]):
                attribute = node.attribute[0]
                tensor = attribute.type == AttributeProto.TENSOR
                inner.constants[node.output[0]] = attribute.t if tensor else _plain(attribute)
        return inner

    def declare(self, inputs: Iterable[ValueInfoProto]) -> None:
        """Note the number of elements of graph inputs; a dimension that is not fixed counts as 1."""
        for value in inputs:
            elements = 1
            for dimension in value.type.tensor_type.shape.dim:
                elements = min(elements * max(1, dimension.dim_value), 1 << 63)
            self.sizes[value.name] = elements

    def numbers(self, name: str) -> list[Number] | None:
        """The elements of a small numeric constant, None if the value is not one."""
        found = self._constant(name)
        if not isinstance(found, TensorProto):
            return found
        if found.data_type not in ELEMENT_BITS or math.prod(found.dims) > _LONGEST:
            return None
        if found.data_location == TensorProto.EXTERNAL:
            raw = self.payload(found)
            found = TensorProto(data_type=found.data_type, dims=found.dims, raw_data=raw)
        array = numpy_helper.to_array(found)
        return array.reshape(-1).tolist() if array.dtype.kind in "iufb" else None

    def elements(self, name: str) -> int:
        """The least number of elements of a value; 1 if nothing is known."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.sizes:
                return scope.sizes[name]
            scope = scope.parent
        found = self._constant(name)
        return math.prod(found.dims) if isinstance(found, TensorProto) else 1

    def bits(self, name: str) -> int:
        """Bits per element of a constant; 8, the least that is sure to be there, if nothing is known."""
        found = self._constant(name)
        return ELEMENT_BITS.get(found.data_type, 8) if isinstance(found, TensorProto) else 8

    def _constant(self, name: str) -> TensorProto | list[Number] | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.constants:
                return scope.constants[name]
            scope = scope.parent
        return None


def label(node: NodeProto) -> str:
    """A node as messages name it; names from a file are shortened and escaped."""
    operator = node.op_type if str(node.op_type).isidentifier() else repr(node.op_type)
    which = repr(node.name[:80]) if node.name else f"of {[name[:80] for name in node.output[:1]]}"
    return f"{operator[:80]} node {which}"


def check_size(node: NodeProto, scope: Scope, limits: Limits) -> None:
    """Apply the rule for a node, if there is one. Raises ModelError if it creates too many bytes."""
    rule = RULES.get(node.op_type)
    if rule is None:
        return
    elements, bits = rule(node, scope)
    if elements * bits > 8 * limits.dense_bytes:
        raise ModelError(
            f"{label(node)} creates at least {_approximate(elements * bits // 8)} bytes from constants; "
            f"{limits.dense_bytes} are allowed, so the model is damaged or hostile"
        )
    if node.output:
        scope.sizes[node.output[0]] = elements


def check_sparse(sparse: SparseTensorProto, where: str, limits: Limits) -> None:
    """Check the parts of a sparse tensor against each other and its dense size against the limit.

    The values are [NNZ]; the indices are int64 [NNZ] (linear) or [NNZ, rank]. Raises ModelError.
    """
    count = list(sparse.values.dims)
    dense = element_bytes(sparse.values.data_type, sparse.dims)
    if dense > limits.dense_bytes:
        raise ModelError(
            f"{where} is {_approximate(dense)} bytes when dense, {limits.dense_bytes} are allowed"
        )
    fits = list(sparse.indices.dims) in (count, [*count, len(sparse.dims)])
    if len(count) != 1 or count[0] > math.prod(sparse.dims) or not fits:
        raise ModelError(
            f"{where} of shape {list(sparse.dims)} has values of shape {count} and indices of shape "
            f"{list(sparse.indices.dims)}, not [NNZ] and [NNZ] or [NNZ, {len(sparse.dims)}]"
        )
    if sparse.indices.data_type != TensorProto.INT64:
        raise ModelError(f"{where} has indices of data type {sparse.indices.data_type}, not int64")


def check_loop(node: NodeProto, scope: Scope, limits: Limits) -> None:
    """Refuse a Loop that provably runs more than `limits.trips` times: nothing in it can end it earlier."""
    trip_name, condition_name = _inputs(node, 2)
    trips, condition = scope.numbers(trip_name), scope.numbers(condition_name)
    if (trip_name and trips is None) or (condition_name and condition is None):
        return  # computed
    if condition_name and (condition == [False] or _may_end(node, scope)):
        return
    if trips is None or any(count > limits.trips for count in trips):
        count = "for ever" if trips is None else f"{trips[0]} times"
        raise ModelError(
            f"{label(node)} runs {count} and cannot end earlier; {limits.trips} times are allowed"
        )


def _may_end(node: NodeProto, scope: Scope) -> bool:
    """Whether a loop body computes its condition, rather than hand on the one it got or a constant true."""
    body = next((attribute.g for attribute in node.attribute if attribute.name == "body"), GraphProto())
    if not body.output or len(body.input) < 2:
        return True
    copies = {n.output[0]: n.input[0] for n in body.node if n.op_type == "Identity" and n.input and n.output}
    name = body.output[0].name
    while name in copies:
        name = copies.pop(name)
    return name != body.input[1].name and scope.enter(body.initializer, body.node).numbers(name) != [True]


def _constant_of_shape(node: NodeProto, scope: Scope) -> tuple[int, int]:
    value = next((a.t.data_type for a in node.attribute if a.name == "value"), TensorProto.FLOAT)
    return _volume(scope.numbers(*_inputs(node, 1))), ELEMENT_BITS.get(value, 8)


def _expand(node: NodeProto, scope: Scope) -> tuple[int, int]:
    data, shape = _inputs(node, 2)
    return max(_volume(scope.numbers(shape)), scope.elements(data)), scope.bits(data)


def _tile(node: NodeProto, scope: Scope) -> tuple[int, int]:
    data, repeats = _inputs(node, 2)
    return _volume(scope.numbers(repeats)) * scope.elements(data), scope.bits(data)


def _range(node: NodeProto, scope: Scope) -> tuple[int, int]:
    ends = [scope.numbers(name) for name in _inputs(node, 3)]
    if any(end is None or len(end) != 1 for end in ends):
        return 1, 8
    start, limit, delta = (end[0] for end in ends if end)
    if not delta:
        return 1, 8
    if isinstance(start, int) and isinstance(limit, int) and isinstance(delta, int):
        return max(0, -((start - limit) // delta)), scope.bits(node.input[0])
    return _whole((limit - start) / delta), scope.bits(node.input[0])


def _pad(node: NodeProto, scope: Scope) -> tuple[int, int]:
    data, name = _inputs(node, 2)
    pads = (scope.numbers(name) if name else _attribute(node, "pads")) or []
    half = len(pads) // 2
    return math.prod(max(1, 1 + _whole(pads[i] + pads[half + i])) for i in range(half)), scope.bits(data)


def _resize(node: NodeProto, scope: Scope) -> tuple[int, int]:
    data, second, third, fourth = _inputs(node, 4)
    if fourth:
        return _volume(scope.numbers(fourth)), scope.bits(data)
    name = third if len(node.input) > 2 else second
    scales = (scope.numbers(name) if name else _attribute(node, "scales")) or [1]
    return _whole(math.prod(map(float, scales)) * scope.elements(data)), scope.bits(data)


def _one_hot(node: NodeProto, scope: Scope) -> tuple[int, int]:
    indices, depth, values = _inputs(node, 3)
    return _volume((scope.numbers(depth) or [1])[:1]) * scope.elements(indices), scope.bits(values)


def _eye_like(node: NodeProto, scope: Scope) -> tuple[int, int]:
    return scope.elements(*_inputs(node, 1)), 8


def _random(node: NodeProto, scope: Scope) -> tuple[int, int]:
    return _volume(_attribute(node, "shape")), 16


def _window(node: NodeProto, scope: Scope) -> tuple[int, int]:
    return _volume((scope.numbers(*_inputs(node, 1)) or [1])[:1]), 16


# Operator -> (least number of elements of its first output, least bits of one).
RULES: dict[str, Callable[[NodeProto, Scope], tuple[int, int]]] = {
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Tile": _tile,
    "Range": _range,
    "Pad": _pad,
    "Resize": _resize,
    "Upsample": _resize,
    "OneHot": _one_hot,
    "EyeLike": _eye_like,
    "RandomNormal": _random,
    "RandomUniform": _random,
    "HannWindow": _window,
    "HammingWindow": _window,
    "BlackmanWindow": _window,
}


def _inputs(node: NodeProto, count: int) -> list[str]:
    """The first `count` input names, "" for those that are missing."""
    return [*node.input[:count], *[""] * (count - len(node.input))]


def _volume(dims: Sequence[Number] | None) -> int:
    """Product of constant dimensions; 1 if they are not constant, 0 if one is zero or negative."""
    return 1 if dims is None else math.prod(max(0, _whole(size)) for size in dims)


def _whole(value: Number) -> int:
    """Rounded up; what is not finite counts as too large for any limit."""
    if isinstance(value, int):
        return value
    return math.ceil(value) if math.isfinite(value) else 1 << 80


def _attribute(node: NodeProto, name: str) -> list[Number] | None:
    return next((_plain(attribute) for attribute in node.attribute if attribute.name == name), None)


def _plain(attribute: AttributeProto) -> list[Number]:
    if attribute.type in (AttributeProto.INT, AttributeProto.INTS):
        return [attribute.i] if attribute.type == AttributeProto.INT else list(attribute.ints)
    return [attribute.f] if attribute.type == AttributeProto.FLOAT else list(attribute.floats)


def _approximate(value: int) -> str:
    return str(value) if value < 1 << 63 else f"2^{value.bit_length() - 1}"
