"""Element types and shapes of values, inferred on the weight-free skeleton.

Recorded value_info is not trusted: exporters and other tools leave it stale. Dimensions are ints where they are known
and strings where they are symbolic; the same string is the same number in every run.
"""

from __future__ import annotations

from collections.abc import Iterator
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

    def __init__(self, types: dict[Any, ValueType]) -> None:
        self._types = types

    def __getitem__(self, tensor: Any) -> ValueType:
        if isinstance(tensor, Constant):
            return ValueType(tensor.weight.data_type, tensor.weight.shape)
        return self._types.get(tensor, _UNKNOWN)


def infer(model: Model) -> Shapes:
    """Infer types of all values in the main graph and its subgraphs (a function's depend on the call: unknown).

    The answer is about the tensors as they are now; a tensor made later is unknown, and rewrites that keep values keep
    it valid. The declared shapes of the model's outputs are not trusted either. Where ONNX's inference gives up (custom
    operators, contradictions in the file) values stay unknown, but a Reshape's rank is the number of its sizes.
    """
    proto, _ = export_model(model)
    for _, graph in _pairs(model.graph, proto.graph):
        del graph.value_info[:]
    for output in proto.graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    types: dict[Any, ValueType] = {}
    try:
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        while _reshapes_ranked(proto.graph):
            proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception:  # native code: RuntimeError, ValueError and InferenceError of several bindings
        return Shapes({t: _value_type(t.info) for t in model.graph.inputs if t.info is not None})
    for scope, graph in _pairs(model.graph, proto.graph):
        found = _infos(graph)
        for tensor in [*scope.inputs, *(o for node in scope.nodes for o in node.outputs)]:
            if tensor.name in found:
                types[tensor] = _value_type(found[tensor.name])
    return Shapes(types)


def _reshapes_ranked(graph: onnx.GraphProto) -> bool:
    """Give each Reshape of the main graph whose shape is unknown its rank, the number of sizes; whether any got one."""
    found, ranked = _infos(graph), False
    for node in graph.node:
        if node.op_type != "Reshape" or node.domain not in ("", "ai.onnx") or len(node.input) < 2:
            continue
        if not {node.input[1], node.output[0]} <= found.keys():
            continue
        sizes, result = (found[name].type.tensor_type.shape.dim for name in (node.input[1], node.output[0]))
        if sizes and sizes[0].dim_value > 0 and not result:
            result.extend(onnx.TensorShapeProto.Dimension() for _ in range(sizes[0].dim_value))
            ranked = True
    return ranked


def _infos(graph: onnx.GraphProto) -> dict[str, onnx.ValueInfoProto]:
    return {info.name: info for part in (graph.input, graph.value_info, graph.output) for info in part}


def _pairs(scope: Graph, graph: onnx.GraphProto) -> Iterator[tuple[Graph, onnx.GraphProto]]:
    """Each scope with the message that it was exported to."""
    found = [(scope, graph)]
    for outer, message in found:
        yield outer, message
        for node, proto in zip(outer.nodes, message.node, strict=True):
            if not node.bodies():
                continue
            for attribute in proto.attribute:
                value = node.attrs[attribute.name]
                if isinstance(value, Graph):
                    found.append((value, attribute.g))
                elif attribute.graphs:
                    found.extend(zip(value, attribute.graphs, strict=True))


def _value_type(info: onnx.ValueInfoProto) -> ValueType:
    if not info.type.HasField("tensor_type"):
        return _UNKNOWN
    tensor = info.type.tensor_type
    if not tensor.HasField("shape"):
        return ValueType(tensor.elem_type, None)
    dims = (d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim)
    return ValueType(tensor.elem_type, tuple(dims))
