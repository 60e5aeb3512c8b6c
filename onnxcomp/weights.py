"""The payload of a constant tensor, left where it is until somebody reads it.

A weight lies in an array, in a TensorProto, or in a byte range of a file, or is computed when it is read. Reading gives
a read-only numpy array (for a large byte range: a memory map, so that a model larger than memory can be worked on
weight by weight); nothing is cached. Weights are immutable: a pass that changes one makes another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.external import Reference, element_bytes
from onnxcomp.files import CHUNK_BYTES
from onnxcomp.tensors import ELEMENT_BITS

__all__ = ["Weight"]

Array = npt.NDArray[Any]
Buffer = bytes | memoryview

# Element types that ONNX packs below one byte: numpy holds one element per byte, the file several.
_PACKED = frozenset(data_type for data_type, bits in ELEMENT_BITS.items() if bits < 8)


class Weight:
    """An immutable tensor: ONNX element type, shape, and where the elements are."""

    __slots__ = ("_source", "data_type", "shape")

    def __init__(
        self, data_type: int, shape: tuple[int, ...], source: Array | TensorProto | Reference | Callable[[], Array]
    ) -> None:
        self.data_type = data_type
        self.shape = shape
        self._source = source

    @classmethod
    def from_array(cls, array: Array) -> Weight:
        """A weight that holds `array` (not copied: do not write to it afterwards)."""
        array = np.asarray(array)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        return cls(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, array)

    @classmethod
    def computed(cls, dtype: np.dtype[Any], shape: tuple[int, ...], compute: Callable[[], Array]) -> Weight:
        """A weight that `compute` makes anew each time it is read: an array of this type and shape."""
        return cls(helper.np_dtype_to_tensor_dtype(dtype), shape, compute)

    @classmethod
    def from_proto(cls, proto: TensorProto, reference: Reference | None = None) -> Weight:
        """A weight of a TensorProto whose payload is inline, or lies at `reference`."""
        return cls(proto.data_type, tuple(proto.dims), proto if reference is None else reference)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(helper.tensor_dtype_to_np_dtype(self.data_type))

    @property
    def message(self) -> TensorProto | None:
        """The message that holds the payload inline, if one does: it is written as it was read."""
        return self._source if isinstance(self._source, TensorProto) else None

    @property
    def size(self) -> int:
        """Number of elements."""
        count = 1
        for dim in self.shape:
            count *= dim
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the payload as ONNX stores it raw (0 for strings, which are never raw)."""
        return 0 if self.data_type == TensorProto.STRING else element_bytes(self.data_type, self.shape)

    def load(self) -> Array:
        """The elements as a read-only array; packed types come one element per byte."""
        if isinstance(self._source, np.ndarray):
            view = self._source.view()
        elif callable(self._source):
            view = self._source().view()
        elif isinstance(self._source, TensorProto):
            view = numpy_helper.to_array(self._source).view()
        elif self.data_type in _PACKED:
            view = numpy_helper.to_array(self.to_proto("")).view()
        else:
            view = self._source.bytes().view(self.dtype).reshape(self.shape)
        view.flags.writeable = False
        return view

    def to_proto(self, name: str) -> TensorProto:
        """A TensorProto with the payload inline. An inline source comes back field by field as it was."""
        if isinstance(self._source, TensorProto):
            proto = TensorProto()
            proto.CopyFrom(self._source)
        elif not isinstance(self._source, Reference):
            proto = numpy_helper.from_array(np.ascontiguousarray(self.load()).reshape(self.shape))
        else:
            raw = self._source.bytes().tobytes()
            proto = TensorProto(data_type=self.data_type, dims=self.shape, raw_data=raw)
        if proto.name != name:
            proto.name = name
        return proto

    def chunks(self) -> Iterator[Buffer]:
        """The payload as ONNX's raw bytes, in pieces of at most 1 MiB; what lies in a file is read piece by piece."""
        if isinstance(self._source, Reference):
            yield from self._source.chunks()
            return
        if not isinstance(self._source, TensorProto) and self.data_type not in _PACKED:
            raw: Any = np.ascontiguousarray(self.load()).reshape(-1).view(np.uint8).data
        else:
            proto = self.to_proto("")
            raw = proto.raw_data or numpy_helper.from_array(numpy_helper.to_array(proto)).raw_data
        for start in range(0, len(raw), CHUNK_BYTES):
            yield raw[start : start + CHUNK_BYTES]

    def head(self, count: int) -> bytes:
        """The first `count` bytes of the payload, or all of it."""
        if isinstance(self._source, Reference):
            return self._source.file.read(self._source.offset, min(count, self._source.length)).tobytes()
        return bytes(next(self.chunks(), b"")[:count])

    def digest(self) -> bytes:
        """SHA-256 over element type, shape and payload: equal digests mean equal tensors."""
        state = hashlib.sha256(repr((self.data_type, self.shape)).encode())
        if self.data_type == TensorProto.STRING:
            state.update(repr(self.load().tolist()).encode())
        else:
            for chunk in self.chunks():
                state.update(chunk)
        return state.digest()

    def __repr__(self) -> str:
        return f"Weight({onnx.TensorProto.DataType.Name(self.data_type)}, {list(self.shape)})"
