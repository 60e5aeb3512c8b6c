"""From the editable graph to a ModelProto: what was not edited comes from the message that it was read from."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper

from onnxcomp.graph import AttributeRef, Constant, Graph, Model
from onnxcomp.protos import SLOT, STUB_BYTES, attribute_value, value_type, without
from onnxcomp.weights import Weight

__all__ = ["export_model"]


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
            if tensor.info is not None and (value_type(tensor.info)[0] is None or _unchanged(tensor)):
                target.value_info.add().CopyFrom(tensor.info)
        target.value_info.extend(scope.header.value_info)

    def nodes(self, scope: Graph, target: Any, captured: set[Any] | None = None) -> None:
        for node in scope.nodes:
            proto = target.add()
            if node.proto is not None:
                proto.CopyFrom(without(node.proto, "input", "output", "attribute"))
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
        elif before is not None and not before.ref_attr_name and attribute_value(before) == value:
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
    dtype, shape = value_type(tensor.info)
    known = list(tensor.shape) if tensor.shape is not None else None
    return bool(dtype == tensor.dtype and shape == known)


def _write_info(tensor: Any, target: onnx.ValueInfoProto) -> None:
    """The type of a graph input or output: as it was read, or built anew where it was edited or is new."""
    if tensor.info is not None and (value_type(tensor.info)[0] is None or _unchanged(tensor)):
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
