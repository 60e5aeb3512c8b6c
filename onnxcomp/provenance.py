"""Which value of the original a value of the optimized model stands for, kept in the model itself.

Values keep their names through rewiring, so an equal name means an equal value unless something is noted here: that
slices are gone, or that channels are scaled. A dequantized value stands for what was quantized, which the graph shows.
Notes are a property of the model's metadata: they travel through copies, passes and files.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Model

__all__ = ["KEY", "Origin", "forget", "note", "origins"]

Array = npt.NDArray[Any]
KEY = "onnxcomp.provenance"
_MOST_BYTES = 16384  # of text in the file; beyond it nothing is kept but the names


@dataclass(frozen=True)
class Origin:
    """value = scale * original, without the slices that are gone.

    `keep` has the indices that stay per axis of the original, `scale` an axis and a factor for each of its indices that
    stay. `name` is empty where nothing in the original corresponds.
    """

    name: str
    keep: tuple[tuple[int, tuple[int, ...]], ...] = ()
    scale: tuple[int, tuple[float, ...]] | None = None

    def apply(self, original: Array) -> Array:
        """The value that should stand here. Raises IndexError or ValueError where the shapes do not fit."""
        value = original
        for axis, indices in self.keep:
            value = np.take(value, np.asarray(indices, np.int64), axis=axis)
        if self.scale is not None:
            axis, factors = self.scale
            shape = [1] * value.ndim
            shape[axis] = -1
            value = value * np.asarray(factors, value.dtype).reshape(shape)
        return value

    def then(self, later: Origin) -> Origin:
        """This origin, and on top of it what a later pass did; `later.name` is the value itself."""
        if not (self.name and later.name):
            return Origin("")
        keep, scale = dict(self.keep), self.scale
        for axis, indices in later.keep:
            keep[axis] = tuple(keep[axis][i] for i in indices) if axis in keep else indices
            if scale is not None and scale[0] == axis:
                scale = (axis, tuple(scale[1][i] for i in indices))
        if later.scale is not None:
            if scale is not None and scale[0] != later.scale[0]:
                return Origin("")
            before = scale[1] if scale is not None else (1.0,) * len(later.scale[1])
            scale = (later.scale[0], tuple(a * b for a, b in zip(before, later.scale[1], strict=True)))
        return Origin(self.name, tuple(sorted(keep.items())), scale)


def note(model: Model, changes: Mapping[str, Origin]) -> None:
    """Write down how values differ from what they were before; `Origin.name` is then the value's own name."""
    known = origins(model)
    for name, change in changes.items():
        known[name] = known[name].then(change) if name in known else change
    forget(model)
    if known:
        text = _encoded(known)
        if len(text) <= _MOST_BYTES:
            model.header.metadata_props.add(key=KEY, value=text)


def origins(model: Model) -> dict[str, Origin]:
    """What is written down, by the name of the value; nothing if it was never written or cannot be read."""
    text = next((p.value for p in model.header.metadata_props if p.key == KEY), "")
    try:
        return _decoded(text) if text else {}
    except (ValueError, KeyError, TypeError, zlib.error):
        return {}


def forget(model: Model) -> None:
    """Remove all notes: from here on this model is an original."""
    kept = [p for p in model.header.metadata_props if p.key != KEY]
    del model.header.metadata_props[:]
    model.header.metadata_props.extend(kept)


def _encoded(known: Mapping[str, Origin]) -> str:
    """Compressed JSON: equal index lists and factors are written once."""
    tables: dict[str, int] = {}

    def place(values: Sequence[int] | Sequence[float]) -> int:
        return tables.setdefault(json.dumps(values), len(tables))

    values = {
        name: [o.name, [[axis, place(kept)] for axis, kept in o.keep]]
        + ([[o.scale[0], place([float(f"{f:.7g}") for f in o.scale[1]])]] if o.scale is not None else [])
        for name, o in known.items()
    }
    packed = zlib.compress(json.dumps({"tables": [json.loads(t) for t in tables], "values": values}).encode(), 9)
    return base64.b64encode(packed).decode()


def _decoded(text: str) -> dict[str, Origin]:
    unpacker = zlib.decompressobj()
    data = json.loads(unpacker.decompress(base64.b64decode(text), 1 << 24))
    tables = [tuple(t) for t in data["tables"]]
    found = {}
    for name, (origin, keep, *scale) in data["values"].items():
        factors = (int(scale[0][0]), tables[scale[0][1]]) if scale else None
        found[name] = Origin(str(origin), tuple((int(a), tables[t]) for a, t in keep), factors)
    return found
