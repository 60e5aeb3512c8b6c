"""Nodes, tensors and scopes of onnx-graphsurgeon, with what graphsurgeon breaks repaired.

No other module imports onnx-graphsurgeon. The classes here are its own, changed in three ways: they compare and hash by
identity (graphsurgeon compares deeply, which makes rewiring quadratic and dictionaries impossible), constants read
their payload lazily and never cache it, and each remembers the protobuf message that it came from, so that exporting an
untouched part gives back what was read (see serde.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from onnxcomp.weights import Weight

__all__ = ["AttributeRef", "Constant", "Graph", "Node", "Tensor", "Variable", "producer"]

Array = npt.NDArray[Any]
AttributeRef = gs.Node.AttributeRef
Tensor = gs.Tensor


class Node(gs.Node):
    """A node. `proto` is the NodeProto that it was read from, None for a new node."""

    proto: onnx.NodeProto | None = None
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def kind(self) -> str:
        """Operator with its domain in front unless it is a standard one: "Conv", "com.microsoft.Gelu"."""
        return self.op if (self.domain or "") in ("", "ai.onnx") else f"{self.domain}.{self.op}"

    @property
    def label(self) -> str:
        """What people see: the node's name, or its operator and first output where it has none."""
        return self.name or f"{self.op}({next((o.name for o in self.outputs if o.name), '')})"

    @property
    def plain(self) -> bool:
        """Whether all attributes have values; in a function some may refer to attributes of the call."""
        return not any(isinstance(v, (AttributeRef, onnx.AttributeProto)) for v in self.attrs.values())

    def reads(self) -> list[Any]:
        """The tensors that this node needs: its inputs, and whatever its subgraphs read."""
        tensors = list(self.inputs)
        for body in self.bodies():
            for scope in body.scopes():
                tensors.extend(scope.outputs)
                tensors.extend(t for node in scope.nodes for t in node.inputs)
        return tensors

    def bodies(self) -> list[Graph]:
        """The subgraphs in this node's attributes."""
        found: list[Graph] = []
        for value in self.attrs.values():
            kind = type(value)
            if kind is Graph:
                found.append(value)
            elif kind is list:
                found.extend(v for v in value if type(v) is Graph)
        return found


class Variable(gs.Variable):
    """A value known at run time only. `info` is its ValueInfoProto, `default` what a caller may override."""

    info: onnx.ValueInfoProto | None = None
    default: Weight | None = None
    default_proto: onnx.TensorProto | None = None
    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Constant(gs.Constant):
    """An initializer. `values` reads the payload anew each time; assigning an array replaces it."""

    info: onnx.ValueInfoProto | None = None
    proto: onnx.TensorProto | None = None
    sparse: onnx.SparseTensorProto | None = None
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(self, name: str, values: Array | Weight) -> None:
        weight = values if isinstance(values, Weight) else Weight.from_array(values)
        # graphsurgeon insists on an array here; the property below takes the weight.
        super().__init__(name, np.empty(0, np.float32))
        self.weight = weight

    @property
    def values(self) -> Array:
        return self.weight.load()

    @values.setter
    def values(self, values: Array | Weight) -> None:
        self.weight = values if isinstance(values, Weight) else Weight.from_array(values)
        self.sparse = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.weight.dtype


class Graph(gs.Graph):
    """One scope. `initializers` lists its constants (used or not) in file order, `header` what else the file said."""

    def __init__(self, name: str = "") -> None:
        super().__init__(nodes=[], inputs=[], outputs=[], name=name)
        self.initializers: list[Any] = []
        self.header = onnx.GraphProto(name=name)
        # Position of each name in the file's own lists, so that an untouched graph is written as it was read.
        self.listed: dict[str, dict[str, int]] = {"input": {}, "value_info": {}}

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def tensors_here(self) -> Iterator[Any]:
        """Every tensor of this scope, nested ones left out; one as often as it is named."""
        yield from self.inputs
        yield from self.outputs
        yield from self.initializers
        for node in self.nodes:
            yield from node.inputs
            yield from node.outputs

    def scopes(self) -> Iterator[Graph]:
        """This scope and all scopes nested in it, outer before inner."""
        stack = [self]
        while stack:
            scope = stack.pop()
            yield scope
            inner = [body for node in scope.nodes if node.attrs for body in node.bodies()]
            stack.extend(reversed(inner))

    def add(
        self,
        op: str,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        *,
        name: str = "",
        domain: str = "",
        attrs: dict[str, Any] | None = None,
    ) -> Node:
        """Append a node; `sort` moves it before its first consumer."""
        node = Node(op, name=name, attrs=dict(attrs or {}), inputs=list(inputs), outputs=list(outputs), domain=domain)
        self.nodes.append(node)
        return node

    def release(self, node: Node) -> None:
        """Let a node that is about to be removed read nothing: chains of removals would pile up dead readers."""
        for tensor in node.inputs:
            list.remove(tensor.outputs, node)
        list.clear(node.inputs)

    def remove(self, nodes: Iterable[Node]) -> None:
        """Take nodes out and disconnect them, in time linear in the graph however many there are."""
        gone = set(nodes)
        if not gone:
            return
        gone.update([n for node in gone for body in node.bodies() for s in body.scopes() for n in s.nodes])
        touched = {id(t): t for node in gone for t in node.inputs}
        for tensor in touched.values():
            _set(tensor.outputs, [n for n in tensor.outputs if n not in gone])
        for node in gone:
            list.clear(node.inputs)
            for output in node.outputs:
                _set(output.inputs, [n for n in output.inputs if n not in gone])
            list.clear(node.outputs)
        self.nodes[:] = [n for n in self.nodes if n not in gone]


def producer(tensor: Any) -> Node | None:
    """The node that computes a tensor, None for inputs, initializers and omitted tensors."""
    return tensor.inputs[0] if tensor.inputs else None


def _set(synchronized: list[Any], items: list[Any]) -> None:
    """Overwrite one side of graphsurgeon's two-sided lists without its search in the other side."""
    list.clear(synchronized)
    list.extend(synchronized, items)
