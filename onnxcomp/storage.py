"""Packed models: weights that are stored as packed initializers and decoded by local functions of one domain.

What is stored how is the business of the passes `pack` and `unpack`; here is what the rest of the package has to know.
"""

from __future__ import annotations

import math

from onnxcomp.errors import ModelError
from onnxcomp.graph import Model
from onnxcomp.manager import Context, run_pass
from onnxcomp.registry import load_pass

__all__ = ["DOMAIN", "OPSET", "VERSION", "decoded_bytes", "is_packed", "note", "plain"]

DOMAIN = "onnxcomp.storage"
VERSION = 1  # of the domain: the meaning of its functions
OPSET = 12  # the oldest version of the standard operators that decoders are written in: Constant with value_ints
_WIDEST = 8  # bytes of an element, at most


def is_packed(model: Model) -> bool:
    """Whether some weight of a model is packed."""
    return any(f.header.domain == DOMAIN for f in model.functions)


def plain(model: Model) -> Model:
    """The model with its weights as plain initializers: itself if it has no others, or none that are known here."""
    if not is_packed(model):
        return model
    copy = model.copy()
    try:
        run_pass(load_pass("unpack")(), copy, Context())
    except ModelError:
        return model
    return copy


def decoded_bytes(model: Model) -> int:
    """Most bytes that the packed weights of a model can have when they are decoded."""
    shapes = [n.attrs.get("shape") for n in model.nodes() if n.domain == DOMAIN]
    return sum(math.prod(s) * _WIDEST for s in shapes if isinstance(s, list) and all(isinstance(d, int) for d in s))


def note(packed: Model, unpacked: Model) -> str | None:
    """A remark on how much of a model is packed, None for a plain one; `unpacked` is its plain form."""
    calls = [n for n in packed.nodes() if n.domain == DOMAIN]
    streams = {t: w.nbytes for n in calls for t in n.inputs if (w := packed.weight(t)) is not None}
    if not calls:
        return None
    text = f"{len(calls)} weights are packed in {sum(streams.values()):,} bytes"
    if unpacked is packed:
        return f"{text}, in a way that this version of onnxcomp does not know: parameters are those that are stored"
    return f"{text}; the rest of these figures is that of the plain model"
