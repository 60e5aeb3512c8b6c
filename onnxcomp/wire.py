"""Reads a model file without its weights, in pure Python, before any native code sees it.

An ONNX file is one protobuf message. `read_skeleton` maps the file, walks the keys and lengths of its fields,
and copies everything except the payload of large tensors. Such a payload stays in the file and is described
like external data, with the location `SELF`, which no file can bring along:

    raw_data = <n bytes at position p of the file>
    ->  data_location = EXTERNAL, external_data = {location: SELF, offset: p, length: n}

`float_data` and `double_data`, which old exporters write, have the same bytes and are treated alike.

Only messages of at least `CUT_BYTES` can hold a payload of that size, so all smaller ones are copied unread.
The cost is linear in the number of fields that are read and does not depend on the size of the payloads.

Wire format: https://protobuf.dev/programming-guides/encoding. Field numbers: the installed onnx.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    TrainingInfoProto,
)

from onnxcomp.errors import ModelError
from onnxcomp.files import OpenFile
from onnxcomp.limits import Limits
from onnxcomp.sniff import other_format
from onnxcomp.tensors import tensors

__all__ = ["CUT_BYTES", "SELF", "Limits", "Reading", "encode_varint", "holders", "read_skeleton"]

SELF = "\x00"
CUT_BYTES = 1024

# Message types that can hold a tensor; all others are copied unread.
_HOLDERS = frozenset(
    message.DESCRIPTOR.full_name
    for message in (
        ModelProto,
        GraphProto,
        NodeProto,
        AttributeProto,
        TensorProto,
        FunctionProto,
        SparseTensorProto,
        TrainingInfoProto,
    )
)
# Data types whose typed field, packed, has the same bytes as `raw_data`: little-endian values in a row.
_PACKED = {
    TensorProto.FLOAT: TensorProto.FLOAT_DATA_FIELD_NUMBER,
    TensorProto.COMPLEX64: TensorProto.FLOAT_DATA_FIELD_NUMBER,
    TensorProto.DOUBLE: TensorProto.DOUBLE_DATA_FIELD_NUMBER,
    TensorProto.COMPLEX128: TensorProto.DOUBLE_DATA_FIELD_NUMBER,
}
# Every encoding of a one-byte string field 2 that holds a NUL: the `value` of an external_data entry.
_SELF_VALUE = re.compile(rb"(?:\x12|\x92\x80*\x00)(?:\x01|\x81\x80*\x00)\x00")
_LIMITED = {"onnx.NodeProto": "nodes", "onnx.TensorProto": "initializers", "onnx.FunctionProto": "functions"}
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_RAW_DATA = TensorProto.RAW_DATA_FIELD_NUMBER
_DATA_TYPE = TensorProto.DATA_TYPE_FIELD_NUMBER
_EXTERNAL_DATA = TensorProto.EXTERNAL_DATA_FIELD_NUMBER
_DATA_LOCATION = TensorProto.DATA_LOCATION_FIELD_NUMBER


@dataclass(frozen=True)
class Reading:
    """A model without the payloads of its large tensors, the size of its file, and how much was not ONNX.

    `unknown_bytes` is the size of fields that the installed onnx does not know; they are not in `proto`.
    """

    proto: ModelProto
    size: int
    unknown_bytes: int


def read_skeleton(source: OpenFile | Path | bytes, limits: Limits | None = None) -> Reading:
    """Read the model in a file without the payloads of its tensors, or a serialized model with them.

    From a file, every payload of at least `CUT_BYTES`, anywhere in the model, becomes a reference into the
    file itself; `onnxcomp.external.Storage` finds it there. Bytes are checked in the same way and kept whole.
    Raises ModelError if the file cannot be read, is of another format, is damaged, or exceeds a limit.
    """
    limits = limits or Limits()
    if isinstance(source, bytes):
        return _read(source, len(source), "the model", limits, cut=False)
    file = source if isinstance(source, OpenFile) else OpenFile(source, "model")
    if file.size == 0:
        raise ModelError(f"{file.path} is empty; the download or the export did not finish")
    with file.map_all() as data:
        return _read(data, len(data), str(file.path), limits, cut=True)


def _read(data: Any, size: int, name: str, limits: Limits, *, cut: bool) -> Reading:
    other = other_format(bytes(data[:1024]))
    if other is not None:
        raise ModelError(f"{name} is not an ONNX model: it is {other}")
    if size > limits.proto_bytes:
        raise ModelError(
            f"{name} has {size} bytes, more than the {limits.proto_bytes} that protobuf can hold; "
            "export it with external data"
        )
    walk = _Walk(data, size, name, limits, cut)
    walk.message(0, size, ModelProto.DESCRIPTOR, 1)
    skeleton = b"".join(walk.chunks)
    proto = ModelProto()
    try:
        proto.ParseFromString(skeleton)
    except DecodeError as error:
        raise ModelError(
            f"{name} is damaged or not an ONNX model, or nests more than {limits.depth} messages: {error}"
        ) from error
    if not proto.HasField("graph"):
        raise ModelError(f"{name} holds no graph: it is not an ONNX model, or it was cut off")
    known = proto.ByteSize()
    proto.DiscardUnknownFields()  # what hides in messages that were copied unread
    unknown = walk.unknown_bytes + known - proto.ByteSize()
    if len(_SELF_VALUE.findall(skeleton)) != walk.cuts and _self_references(proto) != walk.cuts:
        raise ModelError(f"{name} names the reserved location {SELF!r} for external data; it is not followed")
    return Reading(proto, size, unknown)


def _self_references(proto: ModelProto) -> int:
    return sum(entry.value == SELF for _, tensor in tensors(proto) for entry in tensor.external_data)


@cache
def holders(descriptor: Any) -> dict[int, Any]:
    """Field number -> message type, of the fields of a message type in which a tensor can be."""
    return {number: child for number, (child, _, _) in _fields(descriptor).items() if child is not None}


@cache
def _fields(descriptor: Any) -> dict[int, tuple[Any, bool, bool]]:
    """Field number -> (message type in it that can hold tensors or None, is it repeated, is it a message)."""
    return {
        field.number: (_holder(field.message_type), field.is_repeated, field.message_type is not None)
        for field in descriptor.fields
    }


def _holder(message_type: Any) -> Any:
    return message_type if message_type is not None and message_type.full_name in _HOLDERS else None


class _Walk:
    """One pass over the bytes of a model: `chunks` joined are the skeleton."""

    def __init__(self, data: Any, size: int, name: str, limits: Limits, cut: bool) -> None:
        self.data, self.size, self.name, self.limits, self.cut = data, size, name, limits, cut
        self.chunks: list[bytes] = []
        self.kept = 0  # bytes in chunks
        self.leaves = 0  # bytes of long strings and number lists among them
        self.most = limits.skeleton_bytes if cut else limits.proto_bytes
        self.cuts = 0
        self.unknown_bytes = 0
        self.read = 0  # fields
        self.counts = dict.fromkeys(_LIMITED, 0)

    def message(self, start: int, end: int, descriptor: Any, depth: int) -> int:
        """Copy the message at [start, end) to `chunks`; returns its new length."""
        if depth > self.limits.depth:
            raise self.error(start, f"nests more than {self.limits.depth} messages")
        known, before, seen, pending = _fields(descriptor), self.kept, set(), start
        for number, wire_type, key, begin, stop in self.fields(start, end):
            if number not in known:
                self.keep(pending, key)
                pending = stop
                self.drop(key, stop)
                continue
            child, repeated, message = known[number]
            if child is None:
                self.leaves += 0 if message or stop - begin < CUT_BYTES else stop - begin
                continue
            if number in seen and not repeated:
                raise self.error(key, f"has field {number} of {descriptor.name} twice instead of once")
            seen.add(number)
            if repeated:
                self.count(child, key)
            if wire_type == _LENGTH and stop - begin >= CUT_BYTES:
                self.keep(pending, key)
                pending = stop
                self.nested(number, begin, stop, child, depth)
        self.keep(pending, end)
        return self.kept - before

    def nested(self, number: int, begin: int, stop: int, descriptor: Any, depth: int) -> None:
        """Copy a field that is a message: its length is known only afterwards."""
        slot = len(self.chunks)
        self.chunks.append(b"")
        if descriptor is TensorProto.DESCRIPTOR:
            length = self.tensor(begin, stop)
        else:
            length = self.message(begin, stop, descriptor, depth + 1)
        self.chunks[slot] = encode_varint(number << 3 | _LENGTH) + encode_varint(length)
        self.kept += len(self.chunks[slot])

    def tensor(self, start: int, end: int) -> int:
        """Copy a TensorProto, its payload replaced by where it lies; returns its new length."""
        data, known, before, pending = self.data, _fields(TensorProto.DESCRIPTOR), self.kept, start
        external, payload, values = False, None, _RAW_DATA
        for number, wire_type, key, begin, stop in self.fields(start, end):
            drop = number not in known
            if drop:
                self.drop(key, stop)
            elif number == _EXTERNAL_DATA:
                external = True
            elif number == _DATA_LOCATION and wire_type == _VARINT:
                external = external or data[begin] == TensorProto.EXTERNAL
            elif number == _DATA_TYPE and wire_type == _VARINT:
                values = _PACKED.get(data[begin], _RAW_DATA)
            elif number in (_RAW_DATA, values) and wire_type == _LENGTH:
                if payload is not None:
                    raise self.error(key, "has a tensor with two payloads")
                payload = (begin, stop - begin)
                drop = self.cut and stop - begin >= CUT_BYTES
                self.leaves += stop - begin if not self.cut else 0
            elif stop - begin >= CUT_BYTES:
                self.leaves += stop - begin
            if drop:
                self.keep(pending, key)
                pending = stop
        self.keep(pending, end)
        if payload is not None and payload[1] >= CUT_BYTES and external:
            raise self.error(payload[0], "has a tensor with both a payload and external data")
        if payload is not None and payload[1] >= CUT_BYTES and self.cut:
            self.cuts += 1
            self.add(_reference(*payload))
        return self.kept - before

    def fields(self, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
        """Yield (field number, wire type, start of the key, start of the value, end of the value)."""
        data, position = self.data, start
        while position < end:
            key_start, key = position, data[position]
            position += 1
            if key >= 0x80:
                key, position = self.varint(key_start, end)
            wire_type = key & 7
            if wire_type == _LENGTH:
                length, value = self.varint(position, end)
                stop = value + length
            elif wire_type == _VARINT:
                value = position
                stop = self.varint(position, end)[1]
            elif wire_type in (_FIXED32, _FIXED64):
                value, stop = position, position + (4 if wire_type == _FIXED32 else 8)
            else:
                raise self.error(key_start, "is not ONNX from there on")
            if key >> 3 == 0:
                raise self.error(key_start, "is not ONNX from there on")
            if stop > end:
                raise self.beyond(key_start, stop, end)
            yield key >> 3, wire_type, key_start, value, stop
            position = stop
            self.read += 1
            if self.read > self.limits.fields:
                raise self.error(key_start, f"has more than {self.limits.fields} fields")

    def varint(self, position: int, end: int) -> tuple[int, int]:
        """The number at `position` and where it ends."""
        data, value, shift = self.data, 0, 0
        while position < end and shift < 70:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7
        if position >= end:
            raise self.beyond(position, position + 1, end)
        raise self.error(position, "is not ONNX from there on")

    def count(self, child: Any, position: int) -> None:
        name = child.full_name
        if name in self.counts:
            self.counts[name] += 1
            limit = getattr(self.limits, _LIMITED[name])
            if self.counts[name] > limit:
                raise self.error(position, f"has more than {limit} {_LIMITED[name]}")

    def keep(self, start: int, stop: int) -> None:
        """Copy bytes as they are."""
        size = self.kept + stop - start
        if size > self.most or size - self.leaves > self.limits.structure_bytes:
            limit = self.most if size > self.most else self.limits.structure_bytes
            raise self.error(start, f"needs more than {limit} bytes without its weights")
        if stop > start:
            self.add(self.data[start:stop])

    def drop(self, start: int, stop: int) -> None:
        self.unknown_bytes += stop - start
        if self.unknown_bytes > self.limits.unknown_bytes:
            raise self.error(start, f"has more than {self.limits.unknown_bytes} bytes that are not ONNX")

    def add(self, chunk: bytes) -> None:
        self.chunks.append(chunk)
        self.kept += len(chunk)

    def beyond(self, position: int, stop: int, end: int) -> ModelError:
        if end == self.size:
            return self.error(position, f"is cut off or damaged: {stop - end} bytes are missing at the end")
        return self.error(position, f"is damaged: a field ends {stop - end} bytes after its message")

    def error(self, position: int, problem: str) -> ModelError:
        return ModelError(f"{self.name} {problem} (at byte {position} of {self.size})")


def _reference(offset: int, length: int) -> bytes:
    tensor = TensorProto(data_location=TensorProto.EXTERNAL)
    for key, value in (("location", SELF), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return bytes(tensor.SerializeToString())


def encode_varint(value: int) -> bytes:
    """A number in protobuf's form of variable length."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))
