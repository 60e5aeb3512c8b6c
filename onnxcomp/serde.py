"""Between ModelProto and the editable graph, without loss.

graphsurgeon's own importer and exporter drop or break some twenty things (metadata, doc strings, overloads, 4-bit
types, empty lists, captured weights, ...), so the product has its own. The rule: what was not edited is exported from
the message that it was read from; only what was edited is built anew.

Payloads never pass through here: a large tensor appears in the exported message as a stub, a TensorProto that is
marked external with location `SLOT` and its index in the list of payloads.
"""

from __future__ import annotations

import onnx

from onnxcomp.errors import ResourceError
from onnxcomp.graph import Model
from onnxcomp.protos import SLOT, STUB_BYTES, Resolver, inline, slots
from onnxcomp.reading import import_model
from onnxcomp.weights import Weight
from onnxcomp.writing import export_model

__all__ = [
    "SLOT",
    "STUB_BYTES",
    "Resolver",
    "export_model",
    "from_proto",
    "import_model",
    "inline",
    "slots",
    "stored_bytes",
    "to_bytes",
]

_MESSAGE_LIMIT = (1 << 31) - 1


def from_proto(proto: onnx.ModelProto) -> Model:
    """The editable form of a ModelProto whose tensors are all inline. The message is copied."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return import_model(copy, Weight.from_proto)


def stored_bytes(model: Model) -> int:
    """Bytes of the model's file, without writing it."""
    proto, payloads = export_model(model)
    return int(proto.ByteSize()) + sum(p.nbytes for p in payloads)


def to_bytes(model: Model) -> bytes:
    """The model as one message with all payloads inline. Raises ResourceError above 2 GB."""
    proto, payloads = export_model(model)
    size = proto.ByteSize() + sum(p.nbytes for p in payloads)
    if size > _MESSAGE_LIMIT:
        raise ResourceError(f"the model has {size:,} bytes, more than the 2 GB of one protobuf message; save it first")
    inline(proto, payloads)
    return bytes(proto.SerializeToString(deterministic=True))
