"""From a ModelProto to the editable graph. Each part remembers the message that it was read from."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto

from onnxcomp.errors import ModelError
from onnxcomp.graph import AttributeRef, Constant, Function, Graph, Model, Node, Variable
from onnxcomp.protos import Resolver, attribute_value, slots, value_type, without
from onnxcomp.weights import Weight

__all__ = ["import_model"]


def import_model(proto: onnx.ModelProto, resolve: Resolver | list[Weight]) -> Model:
    """The editable form of a message, which belongs to the result afterwards.

    `resolve` gives the payload of each TensorProto (or is the list of payloads from `export_model`).

    Raises ModelError for a value that is read but never produced.
    """
    reader = _Reader(slots(resolve) if isinstance(resolve, list) else resolve, proto.ir_version)
    graph = reader.graph(proto.graph, ChainMap())
    functions = [reader.function(f) for f in proto.functions]
    header = onnx.ModelProto()
    header.CopyFrom(without(proto, "graph", "functions"))
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
            without(proto, "node", "initializer", "sparse_initializer", "input", "output", "value_info")
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
        header.CopyFrom(without(proto, "node"))
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
        return attribute_value(proto)

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


def _variable(name: str, infos: Mapping[str, onnx.ValueInfoProto]) -> Variable:
    variable = Variable(name)
    _describe(variable, infos)
    return variable


def _describe(variable: Variable, infos: Mapping[str, onnx.ValueInfoProto]) -> None:
    info = infos.get(variable.name)
    if info is not None:
        variable.info = info
        variable.dtype, variable.shape = value_type(info)


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
