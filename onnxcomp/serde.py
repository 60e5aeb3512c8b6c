"""Between ModelProto and the editable graph, without loss.

graphsurgeon's own importer and exporter drop or break some twenty things (metadata, doc strings, overloads, 4-bit
types, empty lists, captured weights, ...), so the product has its own. The rule: what was not edited is exported from
the message that it was read from; only what was edited is built anew.

Payloads never pass through here: a large tensor appears in the exported message as a stub, a TensorProto that is
marked external with location `SLOT` and its index in the list of payloads.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper

from onnxcomp.errors import ModelError, ResourceError
from onnxcomp.graph import AttributeRef, Constant, Function, Graph, Model, Node, Variable
from onnxcomp.weights import Weight

__all__ = ["SLOT", "STUB_BYTES", "export_model", "from_proto", "import_model", "inline", "slots", "to_bytes"]

SLOT = "\x00slot"
STUB_BYTES = 1024  # smaller payloads stay in the message: shape inference needs the values of shape tensors
_MESSAGE_LIMIT = (1 << 31) - 1

Resolver = Callable[[TensorProto], Weight]


def from_proto(proto: onnx.ModelProto) -> Model:
    """The editable form of a ModelProto whose tensors are all inline. The message is copied."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return import_model(copy, Weight.from_proto)


def to_bytes(model: Model) -> bytes:
    """The model as one message with all payloads inline. Raises ResourceError above 2 GB."""
    proto, payloads = export_model(model)
    size = proto.ByteSize() + sum(p.nbytes for p in payloads)
    if size > _MESSAGE_LIMIT:
        raise ResourceError(f"the model has {size:,} bytes, more than the 2 GB of one protobuf message; save it first")
    inline(proto, payloads)
    return bytes(proto.SerializeToString(deterministic=True))


def slots(payloads: list[Weight]) -> Resolver:
    """A resolver for the stubs of `export_model`."""

    def resolve(tensor: TensorProto) -> Weight:
        index = _slot(tensor)
        return Weight.from_proto(tensor) if index is None else payloads[index]

    return resolve


def inline(proto: onnx.ModelProto, payloads: list[Weight]) -> None:
    """Put the payloads into their stubs."""
    for tensor in tensors(proto):
        if (index := _slot(tensor)) is not None:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = b"".join(bytes(c) for c in payloads[index].chunks())


def tensors(proto: onnx.ModelProto) -> Iterable[TensorProto]:
    """Every TensorProto of a model that may hold a large payload: initializers and attributes of all scopes."""
    graphs = [proto.graph]
    node_lists = [f.node for f in proto.functions]
    while graphs or node_lists:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            node_lists.append(graph.node)
        for node in node_lists.pop():
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                if attribute.HasField("g"):
                    graphs.append(attribute.g)
                graphs.extend(attribute.graphs)


def _slot(tensor: TensorProto) -> int | None:
    if tensor.data_location != TensorProto.EXTERNAL or not tensor.external_data:
        return None
    return int(tensor.external_data[1].value) if tensor.external_data[0].value == SLOT else None


# --- reading ---------------------------------------------------------------------------------------------------


def import_model(proto: onnx.ModelProto, resolve: Resolver | list[Weight]) -> Model:
    """The editable form of a message, which belongs to the result afterwards.

    `resolve` gives the payload of each TensorProto (or is the list of payloads from `export_model`).

    Raises ModelError for a value that is read but never produced.
    """
    reader = _Reader(slots(resolve) if isinstance(resolve, list) else resolve, proto.ir_version)
    graph = reader.graph(proto.graph, ChainMap())
    functions = [reader.function(f) for f in proto.functions]
    header = onnx.ModelProto()
    header.CopyFrom(_without(proto, "graph", "functions"))
    return Model(header, graph, functions)


class _Reader:
    def __init__(self, resolve: Resolver, ir_version: int) -> None:
        self.resolve = resolve
        # Before IR 4 every initializer had to be listed as an input, and nobody could override it.
        self.overridable = ir_version >= 4

    def graph(self, proto: onnx.GraphProto, outer: ChainMap[str, Any]) -> Graph:
        scope = Graph(proto.name)
        scope.doc_string = proto.doc_string
        scope.header.CopyFrom(
            _without(proto, "node", "initializer", "sparse_initializer", "input", "output", "value_info")
        )
        known: dict[str, Any] = {}
        infos = {v.name: v for v in [*proto.value_info, *proto.output, *proto.input]}
        listed = {v.name for v in proto.input}
        for tensor in proto.initializer:
            if self.overridable and tensor.name in listed:
                variable = _variable(tensor.name, infos)
                variable.default, variable.default_proto = self.resolve(tensor), tensor
                known[tensor.name] = variable
            else:
                known[tensor.name] = self.constant(tensor, infos)
            scope.initializers.append(known[tensor.name])
        for sparse in proto.sparse_initializer:
            constant = Constant(sparse.values.name, _dense(sparse))
            constant.sparse = sparse
            known[constant.name] = constant
            scope.initializers.append(constant)
        for value in proto.input:
            if value.name not in known:
                known[value.name] = _variable(value.name, infos)
        _produce(proto.node, known, infos, scope.name)
        visible = ChainMap(known, *outer.maps)
        self.nodes(scope, proto.node, visible)
        scope.inputs = [known[v.name] for v in proto.input if not isinstance(known[v.name], Constant)]
        scope.outputs = [
            known[v.name] if v.name in known else self.captured_output(scope, v.name, visible) for v in proto.output
        ]
        for output in scope.outputs:
            if output.info is None and isinstance(output, Variable):
                _describe(output, infos)
        scope.header.value_info.extend(v for v in proto.value_info if v.name not in known)
        for field in scope.listed:
            scope.listed[field] = {v.name: i for i, v in enumerate(getattr(proto, field))}
        return scope

    def captured_output(self, scope: Graph, name: str, visible: ChainMap[str, Any]) -> Variable:
        """A subgraph that returns a value of an outer scope gets a node that does: ONNX Runtime requires one."""
        outer = self.lookup(name, visible, "graph output", scope.name)
        inner = Variable(f"{name}_{scope.name}_out")
        scope.add("Identity", [outer], [inner])
        return inner

    def function(self, proto: onnx.FunctionProto) -> Function:
        scope = Graph(proto.name)
        infos = {v.name: v for v in getattr(proto, "value_info", ())}
        known: dict[str, Any] = {name: _variable(name, infos) for name in proto.input}
        _produce(proto.node, known, infos, proto.name)
        self.nodes(scope, proto.node, ChainMap(known))
        scope.inputs = [known[name] for name in proto.input]
        scope.outputs = [self.lookup(name, known, "function output", proto.name) for name in proto.output]
        header = onnx.FunctionProto()
        header.CopyFrom(_without(proto, "node"))
        return Function(header, scope)

    def nodes(self, scope: Graph, protos: Iterable[onnx.NodeProto], visible: ChainMap[str, Any]) -> None:
        for proto in protos:
            attrs = {a.name: self.attribute(a, visible) for a in proto.attribute}
            where = f"node {proto.name or proto.op_type!r}"
            node = Node(
                proto.op_type,
                name=proto.name,
                attrs=attrs,
                inputs=[self.lookup(n, visible, where, scope.name) if n else Variable("") for n in proto.input],
                outputs=[visible[n] if n else Variable("") for n in proto.output],
                domain=proto.domain,
            )
            node.proto = proto
            scope.nodes.append(node)

    def constant(self, tensor: TensorProto, infos: Mapping[str, onnx.ValueInfoProto]) -> Constant:
        constant = Constant(tensor.name, self.resolve(tensor))
        constant.proto = tensor
        constant.info = infos.get(tensor.name)
        return constant

    def attribute(self, proto: AttributeProto, visible: ChainMap[str, Any]) -> Any:
        if proto.ref_attr_name:
            return AttributeRef(proto.ref_attr_name, proto.type)
        if proto.type == AttributeProto.TENSOR:
            return self.constant(proto.t, {})
        if proto.type == AttributeProto.GRAPH:
            return self.graph(proto.g, visible)
        if proto.type == AttributeProto.GRAPHS:
            return [self.graph(g, visible) for g in proto.graphs]
        return _plain(proto)

    def lookup(self, name: str, visible: Mapping[str, Any], where: str, graph: str) -> Any:
        try:
            return visible[name]
        except KeyError:
            raise ModelError(
                f"{where} in graph {graph!r} uses the value {name!r}, which no node, input or initializer provides"
            ) from None


def _produce(
    nodes: Iterable[onnx.NodeProto], known: dict[str, Any], infos: Mapping[str, onnx.ValueInfoProto], graph: str
) -> None:
    """Add a variable for each output of the nodes; graphs are in SSA form, so each name is new."""
    for node in nodes:
        for name in node.output:
            if name in known:
                where = f"node {node.name or node.op_type!r} in graph {graph!r}"
                raise ModelError(f"{where} computes {name!r}, which is there already; each value has one origin")
            if name:
                known[name] = _variable(name, infos)


def _plain(proto: AttributeProto) -> Any:
    """The Python value of an attribute without tensors and graphs; kinds without one stay AttributeProto."""
    if proto.type == AttributeProto.FLOAT:
        return proto.f
    if proto.type == AttributeProto.INT:
        return proto.i
    if proto.type == AttributeProto.STRING:
        return _text(proto.s)
    if proto.type == AttributeProto.FLOATS:
        return list(proto.floats)
    if proto.type == AttributeProto.INTS:
        return list(proto.ints)
    if proto.type == AttributeProto.STRINGS:
        return [_text(s) for s in proto.strings]
    return proto


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _variable(name: str, infos: Mapping[str, onnx.ValueInfoProto]) -> Variable:
    variable = Variable(name)
    _describe(variable, infos)
    return variable


def _describe(variable: Variable, infos: Mapping[str, onnx.ValueInfoProto]) -> None:
    info = infos.get(variable.name)
    if info is not None:
        variable.info = info
        variable.dtype, variable.shape = _type(info)


def _type(info: onnx.ValueInfoProto) -> tuple[Any, list[Any] | None]:
    """Element type (numpy, or None where unknown or not a tensor) and shape (None where the rank is unknown)."""
    tensor = info.type.tensor_type
    if not info.type.HasField("tensor_type") or not tensor.elem_type:
        return None, None
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except (KeyError, TypeError, ValueError):
        return None, None
    if not tensor.HasField("shape"):
        return dtype, None
    return dtype, [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim]


def _dense(sparse: onnx.SparseTensorProto) -> np.ndarray[Any, Any]:
    values, indices = onnx.numpy_helper.to_array(sparse.values), onnx.numpy_helper.to_array(sparse.indices)
    shape = tuple(sparse.dims)
    if np.prod([int(d) for d in shape], dtype=object) > 1 << 28:
        raise ModelError(f"sparse initializer {sparse.values.name!r} has shape {list(shape)}, too large to make dense")
    dense = np.zeros(shape, values.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return dense


def _without(message: Any, *fields: str) -> Any:
    """A shallow copy of a message without some fields; the fields' contents are not copied on the way."""
    bare = type(message)()
    for descriptor, value in message.ListFields():
        if descriptor.name in fields:
            continue
        target = getattr(bare, descriptor.name)
        if hasattr(target, "MergeFrom") and hasattr(value, "__len__") and not isinstance(value, (str, bytes)):
            target.MergeFrom(value)
        elif hasattr(target, "CopyFrom"):
            target.CopyFrom(value)
        else:
            setattr(bare, descriptor.name, value)
    return bare


# --- writing ---------------------------------------------------------------------------------------------------


def export_model(model: Model) -> tuple[onnx.ModelProto, list[Weight]]:
    """The model as a message with stubs, and the payloads that belong into them."""
    writer = _Writer()
    proto = onnx.ModelProto()
    proto.CopyFrom(model.header)
    _separate(model, model.graph)
    writer.graph(model.graph, proto.graph, captured=set())
    if model.header.ir_version < 4:
        _list_initializers(model.graph, proto.graph)
    for function in model.functions:
        _separate(model, function.body)
        target = proto.functions.add()
        target.CopyFrom(function.header)
        writer.function(function.body, target)
    return proto, writer.payloads


def _separate(model: Model, root: Graph) -> None:
    """Rename values of subgraphs that would hide a value of an outer scope which is read there."""
    stack: list[tuple[Graph, ChainMap[str, Any]]] = [(root, ChainMap())]
    while stack:
        scope, outer = stack.pop()
        bodies = [body for node in scope.nodes for body in node.bodies()]
        if not bodies and not outer:
            continue
        local = [*scope.inputs, *scope.initializers, *(t for node in scope.nodes for t in node.outputs if t.name)]
        clashes = [(t, outer[t.name]) for t in local if outer.get(t.name, t) is not t]
        read = {t for s in scope.scopes() for node in s.nodes for t in node.inputs} if clashes else set()
        for tensor, hidden in clashes:
            if hidden in read:
                tensor.name = model.fresh(tensor.name)
        visible = outer.new_child({t.name: t for t in local})
        stack.extend((body, visible) for body in bodies)


def _list_initializers(scope: Graph, target: onnx.GraphProto) -> None:
    """Before IR 4 the inputs of the main graph list the initializers as well."""
    order = scope.listed["input"]
    present = {v.name for v in target.input}
    values = [i for i in scope.initializers if isinstance(i, Constant) and (i.proto is None or i.name in order)]
    infos = {v.name: v for v in target.input}
    for value in values:
        if value.name not in present:
            _write_info(value, infos.setdefault(value.name, onnx.ValueInfoProto()))
    del target.input[:]
    target.input.extend(sorted(infos.values(), key=lambda v: order.get(v.name, len(order))))


class _Writer:
    def __init__(self) -> None:
        self.payloads: list[Weight] = []
        self.index: dict[int, int] = {}

    def graph(self, scope: Graph, target: onnx.GraphProto, captured: set[Any]) -> None:
        target.CopyFrom(scope.header)
        target.ClearField("value_info")
        initializers = _initializers(scope, captured)
        self.nodes(scope, target.node, captured | set(initializers))
        for item in initializers:
            if isinstance(item, Constant) and item.sparse is not None:
                target.sparse_initializer.add().CopyFrom(item.sparse)
            elif isinstance(item, Constant):
                self.tensor(item.name, item.weight, item.proto, target.initializer.add())
            else:
                self.tensor(item.name, item.default, item.default_proto, target.initializer.add())
        for value in _in_file_order(scope.inputs, scope.listed["input"]):
            _write_info(value, target.input.add())
        for value in scope.outputs:
            _write_info(value, target.output.add())
        self.value_info(scope, target, initializers)

    def function(self, scope: Graph, target: onnx.FunctionProto) -> None:
        """The body of a function has no initializers: Constant nodes hold what passes made."""
        constants = _initializers(scope, set())
        for constant in constants:
            node = target.node.add(op_type="Constant", output=[constant.name])
            attribute = node.attribute.add(name="value", type=AttributeProto.TENSOR)
            self.tensor("", constant.weight, None, attribute.t)
        self.nodes(scope, target.node, set(constants))

    def value_info(self, scope: Graph, target: onnx.GraphProto, initializers: list[Any]) -> None:
        order = scope.listed["value_info"]
        values = [*initializers, *(t for n in scope.nodes for t in n.outputs), *scope.inputs, *scope.outputs]
        for tensor in _in_file_order([v for v in dict.fromkeys(values) if v.name in order], order):
            if tensor.info is not None and (_type(tensor.info)[0] is None or _unchanged(tensor)):
                target.value_info.add().CopyFrom(tensor.info)
        target.value_info.extend(scope.header.value_info)

    def nodes(self, scope: Graph, target: Any, captured: set[Any] | None = None) -> None:
        for node in scope.nodes:
            proto = target.add()
            if node.proto is not None:
                proto.CopyFrom(_without(node.proto, "input", "output", "attribute"))
            # Only what differs: an empty name may be there or absent, and stays as it was read.
            for field, text in (("op_type", node.op), ("name", node.name or ""), ("domain", node.domain or "")):
                if getattr(proto, field) != text:
                    setattr(proto, field, text)
            proto.input.extend(t.name for t in node.inputs)
            proto.output.extend(t.name for t in node.outputs)
            before = {} if node.proto is None else {a.name: a for a in node.proto.attribute}
            for name in [*(n for n in before if n in node.attrs), *(n for n in node.attrs if n not in before)]:
                self.attribute(name, node.attrs[name], before.get(name), proto.attribute.add(), captured or set())

    def attribute(
        self, name: str, value: Any, before: AttributeProto | None, target: AttributeProto, captured: set[Any]
    ) -> None:
        if isinstance(value, AttributeProto):
            target.CopyFrom(value)
        elif isinstance(value, AttributeRef):
            target.name, target.ref_attr_name, target.type = name, value.name, value.type
        elif isinstance(value, Constant):
            target.name, target.type = name, AttributeProto.TENSOR
            self.tensor(value.name, value.weight, value.proto, target.t)
        elif isinstance(value, Graph):
            target.name, target.type = name, AttributeProto.GRAPH
            self.graph(value, target.g, captured)
        elif isinstance(value, list) and value and isinstance(value[0], Graph):
            target.name, target.type = name, AttributeProto.GRAPHS
            for body in value:
                self.graph(body, target.graphs.add(), captured)
        elif before is not None and not before.ref_attr_name and _plain(before) == value:
            target.CopyFrom(before)
        else:
            target.CopyFrom(_new_attribute(name, value))
        if before is not None and before.doc_string:
            target.doc_string = before.doc_string

    def tensor(self, name: str, weight: Weight, before: TensorProto | None, target: TensorProto) -> None:
        if weight.nbytes < STUB_BYTES:
            target.CopyFrom(weight.to_proto(name))
        else:
            target.name, target.data_type = name, weight.data_type
            target.dims.extend(weight.shape)
            target.data_location = TensorProto.EXTERNAL
            index = self.index.setdefault(id(weight), len(self.payloads))
            if index == len(self.payloads):
                self.payloads.append(weight)
            target.external_data.add(key="location", value=SLOT)
            target.external_data.add(key="offset", value=str(index))
        if before is not None:
            target.ClearField("doc_string")
            if before.HasField("doc_string"):
                target.doc_string = before.doc_string
            target.ClearField("metadata_props")
            target.metadata_props.extend(before.metadata_props)


def _initializers(scope: Graph, captured: set[Any]) -> list[Any]:
    """The scope's initializers in order, and behind them constants that nodes use but nobody listed."""
    found = dict.fromkeys(scope.initializers)
    for tensor in [*(t for n in scope.nodes for t in n.inputs), *scope.outputs]:
        if isinstance(tensor, Constant) and tensor not in captured:
            found.setdefault(tensor)
    return list(found)


def _in_file_order(values: list[Any], order: Mapping[str, int]) -> list[Any]:
    """As the file listed them; what is new comes behind, in the order given."""
    return sorted(values, key=lambda v: order.get(v.name, len(order)))


def _unchanged(tensor: Any) -> bool:
    dtype, shape = _type(tensor.info)
    known = list(tensor.shape) if tensor.shape is not None else None
    return bool(dtype == tensor.dtype and shape == known)


def _write_info(tensor: Any, target: onnx.ValueInfoProto) -> None:
    """The type of a graph input or output: as it was read, or built anew where it was edited or is new."""
    if tensor.info is not None and (_type(tensor.info)[0] is None or _unchanged(tensor)):
        target.CopyFrom(tensor.info)
        target.name = tensor.name
    elif tensor.dtype is not None:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
        target.CopyFrom(helper.make_tensor_value_info(tensor.name, kind, tensor.shape))
    else:
        target.name = tensor.name


def _new_attribute(name: str, value: Any) -> AttributeProto:
    if isinstance(value, np.ndarray):
        return helper.make_attribute(name, onnx.numpy_helper.from_array(value))
    if isinstance(value, list) and not value:
        return helper.make_attribute(name, value, attr_type=AttributeProto.INTS)
    if isinstance(value, np.generic):
        value = value.item()
    return helper.make_attribute(name, value)
