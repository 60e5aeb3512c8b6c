"""Where the tensors of a model are, and how many bytes and values each has to have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto

from onnxcomp.errors import ModelError

__all__ = ["ELEMENT_BITS", "check_tensor", "element_bytes", "tensors"]

# Bits of one element of each fixed-size data type in `raw_data`.
ELEMENT_BITS: dict[int, int] = {
    getattr(TensorProto, name): bits
    for bits, names in (
        (2, "UINT2 INT2"),
        (4, "UINT4 INT4 FLOAT4E2M1"),
        (6, "FLOAT6E2M3 FLOAT6E3M2"),
        (8, "UINT8 INT8 BOOL FLOAT8E4M3FN FLOAT8E4M3FNUZ FLOAT8E5M2 FLOAT8E5M2FNUZ FLOAT8E8M0"),
        (16, "UINT16 INT16 FLOAT16 BFLOAT16"),
        (32, "FLOAT INT32 UINT32"),
        (64, "INT64 DOUBLE UINT64 COMPLEX64"),
        (128, "COMPLEX128"),
    )
    for name in names.split()
    if hasattr(TensorProto, name)  # the newest types are missing in older versions of onnx
}
# Data type -> (field for the values when `raw_data` is not used, entries per element); the rest: int32_data.
_TYPED: dict[int, tuple[str, int]] = {
    TensorProto.FLOAT: ("float_data", 1),
    TensorProto.COMPLEX64: ("float_data", 2),
    TensorProto.DOUBLE: ("double_data", 1),
    TensorProto.COMPLEX128: ("double_data", 2),
    TensorProto.INT64: ("int64_data", 1),
    TensorProto.UINT32: ("uint64_data", 1),
    TensorProto.UINT64: ("uint64_data", 1),
    TensorProto.STRING: ("string_data", 1),
}
_MAX_RANK = 256
_VALUE_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
# Attribute types without a tensor: readers of ONNX go by the type, whatever else an attribute carries.
_PLAIN = frozenset(
    getattr(AttributeProto, name)
    for name in ("FLOAT", "INT", "STRING", "FLOATS", "INTS", "STRINGS", "TYPE_PROTO", "TYPE_PROTOS")
)


def element_bytes(data_type: int, dims: Iterable[int]) -> int:
    """Bytes of a dense tensor: ceil(bits * product of dims / 8), in exact integers.

    Raises ModelError for a data type without a fixed size (strings, unknown types), a negative dimension, and
    2^60 elements or more.
    """
    bits = ELEMENT_BITS.get(data_type)
    if bits is None:
        raise ModelError(f"data type {data_type} is not known or has no fixed size")
    return -(-bits * _elements(dims) // 8)


def _elements(dims: Iterable[int]) -> int:
    sizes = tuple(dims)
    if len(sizes) > _MAX_RANK:
        raise ModelError(f"{len(sizes)} dimensions are more than {_MAX_RANK}")
    if any(size < 0 for size in sizes):
        raise ModelError(f"a dimension of {list(sizes)[:8]} is negative")
    count = math.prod(sizes)
    if count >= 1 << 60:  # its bytes must fit 64 bits everywhere
        raise ModelError(f"{list(sizes)[:8]} are more elements than any memory holds")
    return count


def check_tensor(tensor: TensorProto, where: str) -> None:
    """Check that a tensor's type and dims are possible, and that the values in it are as many as they say.

    `where` names the tensor in the message. External data are not looked at. Raises ModelError.
    """
    string = tensor.data_type == TensorProto.STRING
    try:
        size = 0 if string else element_bytes(tensor.data_type, tensor.dims)
        count = _elements(tensor.dims)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    if tensor.data_location == TensorProto.EXTERNAL:
        if string:
            raise ModelError(f"{where} is a string tensor with external data, which ONNX does not allow")
        return
    held = {name: len(getattr(tensor, name)) for name in _VALUE_FIELDS}
    field, entries = _TYPED.get(tensor.data_type, ("int32_data", 1))
    if tensor.HasField("raw_data") and not any(held.values()):
        if string or len(tensor.raw_data) != size:
            raise _misfit(where, tensor, f"{size} bytes", f"{len(tensor.raw_data)} bytes")
        return
    if ELEMENT_BITS.get(tensor.data_type, 8) in (2, 4):  # several elements in an entry
        expected = size
    else:
        expected = count * entries
    found = held.pop(field)
    if any(held.values()) or len(tensor.raw_data):
        raise ModelError(f"{where} holds its values in more than one field, or in the wrong one")
    if found != expected:
        raise _misfit(where, tensor, f"{expected} entries in {field}", f"{found}")


def _misfit(where: str, tensor: TensorProto, expected: str, found: str) -> ModelError:
    name = TensorProto.DataType.Name(tensor.data_type)
    shape = list(tensor.dims)
    return ModelError(f"{where} of type {name} and shape {shape} needs {expected}, but has {found}")


def tensors(model: ModelProto, *, apart: bool = False) -> Iterator[tuple[str, TensorProto]]:
    """Yield (where, tensor) for every tensor of a model, also in subgraphs, functions and sparse tensors.

    With `apart` only for those whose payload the editable graph keeps apart from the message: dense initializers and
    single tensors in attributes of nodes.
    """
    stack: list[tuple[str, GraphProto | NodeProto]] = [("", model.graph)]
    for info in () if apart else model.training_info:
        stack += [("training_info: ", info.initialization), ("training_info: ", info.algorithm)]
    for function in model.functions:
        stack += [(f"function {function.name!r}: ", node) for node in function.node]
        if not apart:
            yield from _of_attributes(f"function {function.name!r}: ", function.attribute_proto, stack)
    while stack:
        where, holder = stack.pop()
        if isinstance(holder, NodeProto):
            yield from _of_attributes(where, holder.attribute, stack, holder, apart=apart)
            continue
        for tensor in holder.initializer:
            yield f"{where}initializer {tensor.name!r}", tensor
        for sparse in () if apart else holder.sparse_initializer:
            yield from _of_sparse(f"{where}sparse initializer {sparse.values.name!r}", sparse)
        for node in holder.node:
            if node.attribute:
                yield from _of_attributes(where, node.attribute, stack, node, apart=apart)


def _of_attributes(
    where: str,
    attributes: Any,
    stack: list[tuple[str, GraphProto | NodeProto]],
    node: NodeProto | None = None,
    *,
    apart: bool = False,
) -> Iterator[tuple[str, TensorProto]]:
    for attribute in attributes:
        if attribute.type in _PLAIN:
            continue
        if attribute.HasField("t") or attribute.tensors:
            owner = f"{where}attribute {attribute.name!r}" + ("" if node is None else f" of {_label(node)}")
            if attribute.HasField("t"):
                yield owner, attribute.t
            for tensor in () if apart else attribute.tensors:
                yield owner, tensor
        if not apart and attribute.HasField("sparse_tensor"):
            yield from _of_sparse(f"{where}attribute {attribute.name!r}", attribute.sparse_tensor)
        for sparse in () if apart else attribute.sparse_tensors:
            yield from _of_sparse(f"{where}attribute {attribute.name!r}", sparse)
        if attribute.HasField("g"):
            stack.append((where, attribute.g))
        for graph in attribute.graphs:
            stack.append((where, graph))


def _of_sparse(where: str, sparse: SparseTensorProto) -> Iterator[tuple[str, TensorProto]]:
    yield f"values of {where}", sparse.values
    yield f"indices of {where}", sparse.indices


def _label(node: NodeProto) -> str:
    return f"{node.op_type} node {node.name!r}"
