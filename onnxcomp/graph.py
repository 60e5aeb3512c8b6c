"""The model while it is edited: a tree of scopes with nodes and tensors (elements.py), and the rewiring of these.

Scopes are the main graph, the bodies of If / Loop / Scan, and the bodies of local functions. A tensor captured from an
outer scope is the same object inside and outside.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxcomp.elements import AttributeRef, Constant, Graph, Node, Tensor, Variable, producer
from onnxcomp.order import sort
from onnxcomp.weights import Weight

__all__ = ["AttributeRef", "Constant", "Graph", "Model", "Node", "Tensor", "Variable", "producer", "sort"]

Array = npt.NDArray[Any]
_CONSTANT_FORMS: dict[str, type[Any]] = {
    "value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64,
    "value_string": np.object_, "value_strings": np.object_,
}  # fmt: skip


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
            self._names = {t.name for scope in self.scopes() for t in scope.tensors_here()}
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
