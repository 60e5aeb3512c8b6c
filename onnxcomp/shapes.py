"""Element types and shapes of values, inferred on the weight-free skeleton.

Recorded value_info is not trusted: exporters and other tools leave it stale. Dimensions are ints where they are known
and strings where they are symbolic; the same string is the same number in every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnxcomp.graph import Constant, Graph, Model
from onnxcomp.serde import export_model

__all__ = ["Shapes", "ValueType", "infer"]


@dataclass(frozen=True)
class ValueType:
    """`elem` is the ONNX element type (0: unknown or no tensor); `shape` is None when the rank is unknown."""

    elem: int
    shape: tuple[int | str | None, ...] | None

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any] | None:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self.elem)) if self.elem else None

    @property
    def size(self) -> int | None:
        """Number of elements, None unless every dimension is known."""
        count = 1
        for dim in self.shape if self.shape is not None else (None,):
            if not isinstance(dim, int):
                return None
            count *= dim
        return count


_UNKNOWN = ValueType(0, None)


class Shapes:
    """Types of values by tensor: `shapes[tensor]` never fails, it says unknown."""

    def __init__(self, types: dict[str, ValueType]) -> None:
        self._types = types

    def __getitem__(self, tensor: Any) -> ValueType:
        if isinstance(tensor, Constant):
            return ValueType(tensor.weight.data_type, tensor.weight.shape)
        return self._types.get(tensor.name, _UNKNOWN)


def infer(model: Model) -> Shapes:
    """Infer types of all values in all scopes; a name that two scopes use differently counts as unknown.

    Where ONNX's inference gives up (custom operators, contradictions in the file) values stay unknown.
    """
    proto, _ = export_model(model)
    for graph in _graphs(proto):
        del graph.value_info[:]
    try:
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception:  # native code: RuntimeError, ValueError and InferenceError of several bindings
        return Shapes(_declared(model.graph))
    types: dict[str, ValueType] = {}
    clashes: set[str] = set()
    for graph in _graphs(proto):
        for info in [*graph.input, *graph.value_info, *graph.output]:
            found = _value_type(info)
            if types.setdefault(info.name, found) != found:
                clashes.add(info.name)
    for name in clashes:
        del types[name]
    return Shapes(types)


def _declared(graph: Graph) -> dict[str, ValueType]:
    return {t.name: _value_type(t.info) for t in [*graph.inputs, *graph.outputs] if t.info is not None}


def _graphs(proto: onnx.ModelProto) -> list[onnx.GraphProto]:
    found = [proto.graph]
    for graph in found:
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    found.append(attribute.g)
                found.extend(attribute.graphs)
    return found


def _value_type(info: onnx.ValueInfoProto) -> ValueType:
    if not info.type.HasField("tensor_type"):
        return _UNKNOWN
    tensor = info.type.tensor_type
    if not tensor.HasField("shape"):
        return ValueType(tensor.elem_type, None)
    dims = (d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim)
    return ValueType(tensor.elem_type, tuple(dims))
