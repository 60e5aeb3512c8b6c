"""Puts payloads into a serialized model without having the model in memory.

The counterpart of wire.py: there payloads are cut out of a message, here they are put in. A stub of serde.py becomes
`raw_data`; every message around it, up to the model, gets longer, so its length is written anew. What holds no stub is
copied. The result has the bytes that protobuf would write for the whole message.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onnx import ModelProto, TensorProto

from onnxcomp.protos import SLOT, slot
from onnxcomp.weights import Buffer, Weight
from onnxcomp.wire import encode_varint, holders

__all__ = ["Spliced", "splice"]

_MARK = SLOT.encode()
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_RAW_DATA = TensorProto.RAW_DATA_FIELD_NUMBER


class Spliced:
    """A message as a row of pieces. `size` is its length in bytes; `chunks` gives the bytes themselves."""

    def __init__(self) -> None:
        self.pieces: list[bytes | Weight] = []
        self.size = 0

    def add(self, piece: bytes | Weight) -> None:
        self.pieces.append(piece)
        self.size += piece.nbytes if isinstance(piece, Weight) else len(piece)

    def nest(self, field: int, inner: Spliced) -> None:
        """Add a message as a field of this one."""
        self.add(encode_varint(field << 3 | _LENGTH) + encode_varint(inner.size))
        self.pieces += inner.pieces
        self.size += inner.size

    def chunks(self) -> Iterator[Buffer]:
        for piece in self.pieces:
            if isinstance(piece, Weight):
                yield from piece.chunks()
            else:
                yield piece


def splice(proto: ModelProto, payloads: list[Weight]) -> Spliced:
    """The serialized form of what `serde.export_model` gives, with each payload in its place.

    The order of fields is that of protobuf's deterministic form: the same model gives the same bytes.
    """
    return _message(proto.SerializeToString(deterministic=True), ModelProto.DESCRIPTOR, payloads)


def _message(data: bytes, descriptor: Any, payloads: list[Weight]) -> Spliced:
    """The message in `data`; whatever in it holds no stub is copied unread."""
    found, kept = Spliced(), 0
    children = holders(descriptor)
    for number, key, begin, stop in _fields(data):
        if number in children and data.find(_MARK, begin, stop) >= 0:
            found.add(data[kept:key])
            child, inner = children[number], data[begin:stop]
            is_tensor = child is TensorProto.DESCRIPTOR
            found.nest(number, _tensor(inner, payloads) if is_tensor else _message(inner, child, payloads))
            kept = stop
    found.add(data[kept:])
    return found


def _tensor(data: bytes, payloads: list[Weight]) -> Spliced:
    tensor, found = TensorProto.FromString(data), Spliced()
    index = slot(tensor)
    if index is None:
        found.add(data)
        return found
    behind = TensorProto(metadata_props=tensor.metadata_props)  # the fields with numbers above raw_data's
    if tensor.HasField("doc_string"):
        behind.doc_string = tensor.doc_string
    for field in ("doc_string", "metadata_props", "external_data", "data_location"):
        tensor.ClearField(field)
    payload = Spliced()
    payload.add(payloads[index])
    found.add(tensor.SerializeToString(deterministic=True))
    found.nest(_RAW_DATA, payload)
    found.add(behind.SerializeToString(deterministic=True))
    return found


def _fields(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(number, start of the key, start of the value, end of the value) of each field; `data` is our own message."""
    position = 0
    while position < len(data):
        key = position
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == _LENGTH:
            length, begin = _varint(data, position)
            position = begin + length
        elif kind == _VARINT:
            begin, position = position, _varint(data, position)[1]
        else:
            begin, position = position, position + {_FIXED32: 4, _FIXED64: 8}[kind]
        yield tag >> 3, key, begin, position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
