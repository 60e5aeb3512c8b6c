"""Where a rewrite rule looks: one scope of a model with what is known of its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from onnxcomp.graph import Graph, Model, Node, producer
from onnxcomp.shapes import Shapes

__all__ = ["Site"]


@dataclass(frozen=True)
class Site:
    """`opset` is the version of the standard operators in this scope."""

    model: Model
    scope: Graph
    shapes: Shapes
    opset: int

    def before(self, node: Node, op: str, position: int = 0) -> Node | None:
        """The node that computes an input, if it is the standard operator `op` and its attributes have values."""
        found = producer(node.inputs[position]) if len(node.inputs) > position else None
        return found if found is not None and found.kind == op and found.plain else None

    def value(self, node: Node, position: int) -> npt.NDArray[Any] | None:
        """The elements of a constant input; None if it is not constant, or omitted."""
        if len(node.inputs) <= position or not node.inputs[position].name:
            return None
        return self.model.value(node.inputs[position])

    def omitted(self, node: Node, position: int) -> bool:
        return len(node.inputs) <= position or not node.inputs[position].name

    def integers(self, node: Node, position: int, attribute: str) -> list[int] | None:
        """Integers that are an input in new operator versions and an attribute in old ones, None if not constant."""
        if self.omitted(node, position):
            given = node.attrs.get(attribute)
            return None if given is None else [int(v) for v in np.asarray(given).reshape(-1)]
        weight = self.model.weight(node.inputs[position])
        if weight is None or weight.data_type not in (TensorProto.INT32, TensorProto.INT64):
            return None
        return [int(v) for v in weight.load().reshape(-1)]

    def axes(self, node: Node, rank: int | None, position: int = 1) -> list[int] | None:
        """The sorted axes of a node, counted from the front where `rank` is known."""
        axes = self.integers(node, position, "axes")
        if axes is None:
            return None
        return sorted(a + rank if a < 0 and rank is not None else a for a in axes)

    def same_shape(self, a: Any, b: Any) -> bool:
        """Whether two values that hold equally many elements are known to have one shape."""
        first, second = self.shapes[a].shape, self.shapes[b].shape
        if first is None or second is None or len(first) != len(second):
            return False
        known = [x for x, y in zip(first, second, strict=True) if x is not None and x == y]
        # One dimension follows from the others, where these are numbers and not zero.
        missing = len(first) - len(known)
        return missing == 0 or (missing == 1 and all(isinstance(x, int) and x > 0 for x in known))

    def within(self, shape: tuple[int, ...], other: Any) -> bool:
        """Whether a constant of `shape` broadcasts to `other` without changing its shape."""
        dims = self.shapes[other].shape
        if all(d == 1 for d in shape):
            return len(shape) == 0 or (dims is not None and len(shape) <= len(dims))
        if dims is None or len(shape) > len(dims):
            return False
        return all(d in (1, known) for d, known in zip(shape, dims[len(dims) - len(shape) :], strict=True))
