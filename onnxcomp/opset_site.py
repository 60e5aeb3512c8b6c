"""Where a node is rewritten for a newer opset, and what rewriting it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import AttributeRef, Graph, Model, Node, Variable
from onnxcomp.shapes import Shapes

__all__ = ["RefusedError", "UpgradeSite", "keep_first_output", "set_input", "take"]


class RefusedError(Exception):
    """Why a node cannot be rewritten."""


@dataclass
class UpgradeSite:
    """Where a node is rewritten: its scope and the operator version that is being reached."""

    model: Model
    types: Shapes
    scope: Graph
    target: int
    version: int = 0
    inserted: list[tuple[Node, int]] = field(default_factory=list)
    enlarging: set[Node] = field(default_factory=set)  # were Upsample: all scales are at least 1

    def constant(self, wish: str, values: npt.ArrayLike, dtype: Any = np.int64) -> Any:
        with np.errstate(over="ignore"):  # the limits of float become infinite in float16, and bound the same
            array = np.asarray(values, np.float64 if dtype != np.int64 else np.int64).astype(dtype)
        return self.model.constant(self.scope, wish, array)

    def insert(self, op: str, inputs: Sequence[Any], output: Any, attrs: dict[str, Any] | None = None) -> Any:
        """Add a node with the meaning that `op` has in the version being reached. Returns its output."""
        self.inserted.append((self.scope.add(op, inputs, [output], attrs=attrs), self.version))
        return output

    def detach(self, node: Node, wish: str) -> tuple[Any, Any]:
        """Give `node` a new first output. Returns it, and the old one for another node to produce."""
        old = node.outputs[0]
        new = self.model.variable(f"{old.name}_{wish}", old.dtype)
        node.outputs[0] = new
        return new, old

    def dtype(self, tensor: Any) -> Any:
        found = self.types[tensor].dtype or tensor.dtype
        if found is None:
            raise RefusedError(f"the element type of {tensor.name!r} is unknown")
        return found

    def is_read(self, tensor: Any) -> bool:
        return bool(tensor.outputs) or any(output is tensor for output in self.scope.outputs)


def take(node: Node, name: str, default: Any = None) -> Any:
    """Remove an attribute and return its value."""
    value = node.attrs.pop(name, default)
    if isinstance(value, AttributeRef):
        raise RefusedError(f"its attribute {name!r} is set by the caller of the function")
    return value


def set_input(node: Node, position: int, tensor: Any) -> None:
    while len(node.inputs) <= position:
        node.inputs.append(Variable(""))
    node.inputs[position] = tensor


def keep_first_output(node: Node) -> None:
    while len(node.outputs) > 1:
        node.outputs.pop()
