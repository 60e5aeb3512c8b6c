"""The model while it is edited: graphs of onnx-graphsurgeon, with what graphsurgeon breaks repaired here.

No other module imports onnx-graphsurgeon. Nodes and tensors are its classes, changed in three ways: they compare and
hash by identity (graphsurgeon compares deeply, which makes rewiring quadratic and dictionaries impossible), constants
read their payload lazily and never cache it, and each remembers the protobuf message that it came from, so that
exporting an untouched part gives back what was read (see serde.py).

A model is a tree of scopes: the main graph, the bodies of If / Loop / Scan, and the bodies of local functions. A
tensor captured from an outer scope is the same object inside and outside.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from onnxcomp.order import sort
from onnxcomp.weights import Weight

__all__ = ["AttributeRef", "Constant", "Graph", "Model", "Node", "Tensor", "Variable", "producer", "sort"]

Array = npt.NDArray[Any]
AttributeRef = gs.Node.AttributeRef
_CONSTANT_FORMS: dict[str, type[Any]] = {
    "value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64,
    "value_string": np.object_, "value_strings": np.object_,
}  # fmt: skip
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


class Function:
    """A model-local function: its body as a scope, and the rest of its FunctionProto."""

    def __init__(self, header: onnx.FunctionProto, body: Graph) -> None:
        self.header = header
        self.body = body

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.header.domain, self.header.name, getattr(self.header, "overload", ""))


class Model:
    """An ONNX model: main graph, local functions, and `header`, the ModelProto without these."""

    def __init__(self, header: onnx.ModelProto, graph: Graph, functions: list[Function]) -> None:
        self.header = header
        self.graph = graph
        self.functions = functions
        self._names: set[str] | None = None

    def scopes(self) -> Iterator[Graph]:
        """All scopes: main graph, subgraphs, function bodies."""
        yield from self.graph.scopes()
        for function in self.functions:
            yield from function.body.scopes()

    def versions(self) -> Iterator[tuple[Graph, int]]:
        """All scopes, each with the version of the standard operators in it: functions import their own."""
        yield from ((scope, self.opset) for scope in self.graph.scopes())
        for function in self.functions:
            version = _standard_version(function.header.opset_import)
            yield from ((scope, version) for scope in function.body.scopes())

    def nodes(self) -> Iterator[Node]:
        """All nodes of all scopes."""
        for scope in self.scopes():
            yield from scope.nodes

    @property
    def opset(self) -> int:
        """Version of the standard operator set, 1 if none is imported."""
        return _standard_version(self.header.opset_import)

    def import_domain(self, domain: str, version: int) -> None:
        """Make operators of `domain` usable, in at least `version`; the IR version follows where it must."""
        for entry in self.header.opset_import:
            if entry.domain == domain:
                entry.version = max(entry.version, version)
                break
        else:
            self.header.opset_import.add(domain=domain, version=version)
        if domain in ("", "ai.onnx"):
            lowest = onnx.helper.find_min_ir_version_for(self.header.opset_import, ignore_unknown=True)
            self.header.ir_version = max(self.header.ir_version, lowest)

    def outputs(self) -> set[Any]:
        """The tensors that are an output of some scope."""
        return {output for scope in self.scopes() for output in scope.outputs}

    def fresh(self, wish: str) -> str:
        """A value name that no scope uses yet: `wish`, or `wish` with a number behind it."""
        if self._names is None:
            self._names = {t.name for scope in self.scopes() for t in _tensors(scope)}
        name = next(
            n for n in itertools.chain([wish], (f"{wish}_{i}" for i in itertools.count(1))) if n not in self._names
        )
        self._names.add(name)
        return name

    def variable(self, wish: str, dtype: Any = None, shape: Sequence[int | str] | None = None) -> Variable:
        """A new value with a free name."""
        return Variable(self.fresh(wish), dtype=dtype, shape=None if shape is None else list(shape))

    def constant(self, scope: Graph, wish: str, values: Array | Weight) -> Constant:
        """A new initializer of `scope` with a free name (in the body of a function: exported as a Constant node)."""
        constant = Constant(self.fresh(wish), values)
        scope.initializers.append(constant)
        return constant

    def redirect(self, old: Any, new: Any) -> None:
        """Let every node that reads `old` read `new` instead, in all scopes; scope outputs keep `old`.

        Linear in the number of consumers.
        """
        consumers = list(old.outputs)
        for node in dict.fromkeys(consumers):
            for position, tensor in enumerate(node.inputs):
                if tensor is old:
                    list.__setitem__(node.inputs, position, new)
        list.clear(old.outputs)
        list.extend(new.outputs, consumers)

    def replaceable(self, scope: Graph, old: Any, new: Any, home: Collection[Node] | None = None) -> bool:
        """Whether everything that uses `old`, a value of `scope`, can use `new` instead.

        An output of the scope keeps its name: the producer of `new` takes it over. That is impossible where `new` is
        itself an output, an input or a constant, or comes from another scope. `home` are the nodes of the scope, as a
        set for those who ask often.
        """
        if not any(output is old for output in scope.outputs):
            return True
        source = producer(new)
        if source is None or any(output is new for output in scope.outputs):
            return False
        return source in (scope.nodes if home is None else home)

    def replace(self, scope: Graph, old: Any, new: Any) -> None:
        """Let everything that uses `old`, outputs of the scope included, use `new`: see `replaceable`."""
        self.redirect(old, new)
        places = [i for i, output in enumerate(scope.outputs) if output is old]
        if places:
            old.name, new.name = new.name, old.name
            new.info, new.dtype, new.shape = old.info, old.dtype, old.shape
            old.info = None
        for place in places:
            scope.outputs[place] = new

    def value(self, tensor: Any) -> Array | None:
        """The elements of a constant tensor (initializer or output of a Constant node), else None."""
        weight = self.weight(tensor)
        return None if weight is None else weight.load()

    def weight(self, tensor: Any) -> Weight | None:
        """The payload behind a constant tensor, else None. An initializer that a caller may override is none."""
        if isinstance(tensor, Constant):
            return tensor.weight
        node = producer(tensor)
        return _constant_node(node) if node is not None and node.kind == "Constant" else None

    def to_bytes(self) -> bytes:
        """The model as one serialized message. Raises ResourceError above 2 GB."""
        from onnxcomp.serde import to_bytes

        return to_bytes(self)

    def become(self, other: Model) -> None:
        """Take over everything of another model, which is not to be used afterwards."""
        self.header, self.graph, self.functions = other.header, other.graph, other.functions
        self._names = None

    def copy(self) -> Model:
        """An independent copy; weights are shared, as they are immutable."""
        from onnxcomp.serde import export_model, import_model

        return import_model(*export_model(self))


def _standard_version(imports: Iterable[onnx.OperatorSetIdProto]) -> int:
    return next((o.version for o in imports if o.domain in ("", "ai.onnx")), 1)


def _constant_node(node: Node) -> Weight | None:
    """What a Constant node holds, with the element type that the specification gives each form."""
    for name, value in node.attrs.items():
        if name == "value" and isinstance(value, Constant):
            return value.weight
        if name in _CONSTANT_FORMS and not isinstance(value, (AttributeRef, onnx.AttributeProto)):
            return Weight.from_array(np.asarray(value, _CONSTANT_FORMS[name]))
    return None


def producer(tensor: Any) -> Node | None:
    """The node that computes a tensor, None for inputs, initializers and omitted tensors."""
    return tensor.inputs[0] if tensor.inputs else None


def _tensors(scope: Graph) -> Iterator[Any]:
    yield from scope.inputs
    yield from scope.outputs
    yield from scope.initializers
    for node in scope.nodes:
        yield from node.inputs
        yield from node.outputs


def _set(synchronized: list[Any], items: list[Any]) -> None:
    """Overwrite one side of graphsurgeon's two-sided lists without its search in the other side."""
    list.clear(synchronized)
    list.extend(synchronized, items)
