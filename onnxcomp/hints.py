"""What a graph says about the values of its inputs.

Table sizes bound indices, quantizers and normalizations give ranges, constants that an input is compared with
are the values that branches wait for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx

__all__ = ["Hint", "read_hints"]

_MAX_STEPS = 32  # nodes walked from an input; what is further away says nothing about it
_MAX_CONSTANT = 65536  # elements; a longer constant is a table, not a set of values
_KEEPS_VALUES = {
    "Cast", "Expand", "Flatten", "Identity", "Pad", "Reshape", "Slice", "Squeeze", "Tile", "Transpose",
    "Unsqueeze",
}  # fmt: skip
# Inputs that are a shape or a count, by operator and position, with a value that works for any data.
_SHAPE_LIKE = {
    ("Expand", 1): 1, ("Tile", 1): 1, ("ConstantOfShape", 0): 1, ("TopK", 1): 1, ("Reshape", 1): 0,
    ("Slice", 1): 0, ("Slice", 2): np.iinfo(np.int32).max, ("Slice", 4): 1, ("Pad", 1): 0,
}  # fmt: skip


@dataclass
class Hint:
    """What the graph says about the values of one input; None where it says nothing."""

    bound: int | None = None  # indices are in [0, bound)
    values: npt.NDArray[np.float64] | None = None  # constants that the input is compared with
    low: float | None = None
    high: float | None = None
    mean: npt.NDArray[np.float64] | None = None  # per channel (axis 1)
    std: npt.NDArray[np.float64] | None = None
    fill: int | None = None
    words: tuple[str, ...] = ()


def read_hints(proto: onnx.ModelProto, names: Sequence[str]) -> dict[str, Hint]:
    """Hints for the inputs called `names`."""
    graph = _GraphView(proto)
    return {name: graph.hint(name) for name in names}


class _GraphView:
    """Consumers and constants of a model by tensor name, subgraphs included."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.tensors: dict[str, onnx.TensorProto] = {}
        self.producers: dict[str, onnx.NodeProto] = {}
        self.consumers: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
        pending = [proto.graph]
        while pending:
            graph = pending.pop()
            self.tensors.update((tensor.name, tensor) for tensor in graph.initializer)
            for node in graph.node:
                self.producers.update((name, node) for name in node.output)
                for position, name in enumerate(node.input):
                    self.consumers[name].append((node, position))
                for attribute in node.attribute:
                    pending += [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
                    if node.op_type == "Constant" and attribute.name == "value":
                        self.tensors[node.output[0]] = attribute.t

    def hint(self, name: str) -> Hint:
        """Walk forward from an input over operators that keep its values, and read what they lead to."""
        hint, seen, pending = Hint(), {name}, [name]
        while pending and len(seen) < _MAX_STEPS:
            for node, position in self.consumers.get(pending.pop(0), []):
                self._read(node, position, hint)
                if node.op_type in _KEEPS_VALUES and position == 0 and node.output[0] not in seen:
                    seen.add(node.output[0])
                    pending.append(node.output[0])
        return hint

    def _read(self, node: onnx.NodeProto, position: int, hint: Hint) -> None:
        attributes = {a.name: a for a in node.attribute}
        if node.op_type == "Gather" and position == 1:
            dims = self._dims(node.input[0])
            axis = attributes["axis"].i if "axis" in attributes else 0
            if dims and -len(dims) <= axis < len(dims):
                hint.bound = min(hint.bound or dims[axis], dims[axis])
        elif node.op_type == "OneHot" and position == 0:
            depth = self._constant(node.input[1])
            hint.bound = int(depth.flat[0]) if depth is not None and depth.size else hint.bound
        elif node.op_type == "Equal":
            compared = self._constant(node.input[1 - position])
            if compared is not None:
                before = hint.values if hint.values is not None else np.empty(0)
                hint.values = np.unique(np.append(before, compared))
        elif node.op_type == "QuantizeLinear" and position == 0:
            self._read_quantizer(node, hint)
        elif node.op_type == "BatchNormalization" and position == 0:
            mean, variance = self._constant(node.input[3]), self._constant(node.input[4])
            if mean is not None and variance is not None:
                hint.mean, hint.std = mean, np.sqrt(np.maximum(variance, 0))
        elif node.op_type == "ImageScaler":
            hint.low, hint.high = 0.0, 255.0
        elif (node.op_type, position) in _SHAPE_LIKE:
            hint.fill = _SHAPE_LIKE[node.op_type, position]
        words = [
            w.decode()
            for k in ("keys_strings", "cats_strings")
            if k in attributes
            for w in attributes[k].strings
        ]
        hint.words += tuple(words)

    def _read_quantizer(self, node: onnx.NodeProto, hint: Hint) -> None:
        from onnx import TensorProto

        scale = self._constant(node.input[1])
        zero_name = node.input[2] if len(node.input) > 2 else ""
        zero = self._constant(zero_name)
        if scale is None or scale.size != 1 or (zero_name and zero is None):
            return
        stored = self.tensors[zero_name].data_type if zero_name else TensorProto.UINT8
        if stored not in (TensorProto.UINT8, TensorProto.INT8):
            return
        origin = float(zero.flat[0]) if zero is not None else 0.0
        lowest = -128.0 if stored == TensorProto.INT8 else 0.0
        hint.low = float(scale.flat[0]) * (lowest - origin)
        hint.high = float(scale.flat[0]) * (lowest + 255.0 - origin)

    def _dims(self, name: str) -> tuple[int, ...]:
        """Shape of a stored table, also behind the operators that decode one."""
        while name not in self.tensors:
            producer = self.producers.get(name)
            if producer is None or producer.op_type not in ("DequantizeLinear", "Cast", "Identity"):
                return ()
            name = producer.input[0]
        return tuple(self.tensors[name].dims)

    def _constant(self, name: str) -> npt.NDArray[np.float64] | None:
        from onnx import TensorProto, numpy_helper

        tensor = self.tensors.get(name)
        if (
            tensor is None
            or tensor.data_location == TensorProto.EXTERNAL
            or tensor.data_type == TensorProto.STRING
        ):
            return None
        if np.prod(tensor.dims, dtype=np.float64) > _MAX_CONSTANT:
            return None
        return numpy_helper.to_array(tensor).astype(np.float64)
