"""ONNX messages as Python values, and stubs: tensors whose payload is elsewhere.

A stub is a TensorProto that is marked external with location `SLOT` and its index in a list of payloads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper

from onnxcomp.tensors import tensors
from onnxcomp.weights import Weight

__all__ = ["SLOT", "STUB_BYTES", "Resolver", "attribute_value", "inline", "slot", "slots", "value_type", "without"]

SLOT = "\x00slot"
STUB_BYTES = 1024  # smaller payloads stay in the message: shape inference needs the values of shape tensors

Resolver = Callable[[TensorProto], Weight]


def slots(payloads: list[Weight]) -> Resolver:
    """A resolver for the stubs of `export_model`."""

    def resolve(tensor: TensorProto) -> Weight:
        index = slot(tensor)
        return Weight.from_proto(tensor) if index is None else payloads[index]

    return resolve


def inline(proto: onnx.ModelProto, payloads: list[Weight]) -> None:
    """Put the payloads into their stubs."""
    for _, tensor in tensors(proto, apart=True):
        if (index := slot(tensor)) is not None:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = b"".join(bytes(c) for c in payloads[index].chunks())


def slot(tensor: TensorProto) -> int | None:
    """The index of a stub's payload, None if the tensor is no stub."""
    if tensor.data_location != TensorProto.EXTERNAL or not tensor.external_data:
        return None
    return int(tensor.external_data[1].value) if tensor.external_data[0].value == SLOT else None


def attribute_value(proto: AttributeProto) -> Any:
    """The Python value of an attribute without tensors and graphs; kinds without one stay AttributeProto."""
    if proto.type == AttributeProto.FLOAT:
        return proto.f
    if proto.type == AttributeProto.INT:
        return proto.i
    if proto.type == AttributeProto.STRING:
        return _text(proto.s)
    if proto.type == AttributeProto.FLOATS:
        return list(proto.floats)
    if proto.type == AttributeProto.INTS:
        return list(proto.ints)
    if proto.type == AttributeProto.STRINGS:
        return [_text(s) for s in proto.strings]
    return proto


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def value_type(info: onnx.ValueInfoProto) -> tuple[Any, list[Any] | None]:
    """Element type (numpy, or None where unknown or not a tensor) and shape (None where the rank is unknown)."""
    tensor = info.type.tensor_type
    if not info.type.HasField("tensor_type") or not tensor.elem_type:
        return None, None
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except (KeyError, TypeError, ValueError):
        return None, None
    if not tensor.HasField("shape"):
        return dtype, None
    return dtype, [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim]


def without(message: Any, *fields: str) -> Any:
    """A shallow copy of a message without some fields; the fields' contents are not copied on the way."""
    bare = type(message)()
    for descriptor, value in message.ListFields():
        if descriptor.name in fields:
            continue
        target = getattr(bare, descriptor.name)
        if hasattr(target, "MergeFrom") and hasattr(value, "__len__") and not isinstance(value, (str, bytes)):
            target.MergeFrom(value)
        elif hasattr(target, "CopyFrom"):
            target.CopyFrom(value)
        else:
            setattr(bare, descriptor.name, value)
    return bare
