"""A packed tensor in a model: one node that calls the decoder, its streams as initializers, and the way back.

The streams stand in the list of initializers where the tensor was, so that it can go back there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from onnxcomp.errors import ModelError
from onnxcomp.graph import Constant, Function, Graph, Model, Node, Variable
from onnxcomp.passes.codec import Encoded, Form, Plan, decode, encode
from onnxcomp.passes.codec_functions import decoder, form_of
from onnxcomp.passes.pack_versions import LOWEST_IR
from onnxcomp.protos import without
from onnxcomp.serde import STUB_BYTES, export_model, from_proto
from onnxcomp.storage import DOMAIN, VERSION
from onnxcomp.weights import Weight

__all__ = [
    "add_decoders",
    "forms",
    "plain_proto",
    "restore",
    "store",
    "store_node",
    "store_rows",
    "swap",
]

Array = npt.NDArray[Any]
_TYPED = "typed"  # attribute: the values were listed one by one, in the field for their type
_TABLE = "table"  # attribute: the name of the table of which rows are looked up
_DOMAIN = "domain"  # attribute: the domain that the node named
_ORIGIN = "constant"  # attribute: the tensor was in a Constant node, under this name


# --- tensors ---------------------------------------------------------------------------------------------------


def store(model: Model, scope: Graph, constant: Constant, plan: Plan, number: int, *, lazy: bool) -> Node:
    """Put a call of the decoder in the place of a constant; the list of initializers is left to `swap`.

    `lazy`: encode anew when a stream is read, instead of keeping it.
    """
    value = Variable(constant.name, dtype=constant.dtype, shape=list(constant.shape))
    value.info = constant.info
    model.redirect(constant, value)
    node = Node("", outputs=[value])
    scope.nodes.append(node)
    _call(model, node, constant.weight, plan, number, lazy=lazy)
    if constant.proto is not None:
        before = constant.proto
        node.proto = onnx.NodeProto(doc_string=before.doc_string or None, metadata_props=before.metadata_props)
    return node


def store_node(model: Model, scope: Graph, node: Node, plan: Plan, number: int, *, lazy: bool) -> None:
    """Make a Constant node a call of the decoder. The streams are initializers, in functions Constant nodes."""
    constant = node.attrs["value"]
    node.attrs.clear()
    _note_domain(node)
    _call(model, node, constant.weight, plan, number, lazy=lazy)
    node.attrs[_ORIGIN] = constant.name
    scope.initializers.extend(node.inputs)


def store_rows(model: Model, constant: Constant, plan: Plan, number: int, *, lazy: bool) -> None:
    """Make the Gather nodes that read a table calls of a decoder of rows; `swap` puts the streams in its place."""
    readers = list(constant.outputs)
    streams, _ = _streams_of(model, constant.weight, plan, number, lazy=lazy)
    for node in readers:
        _note_domain(node)
        node.op, node.domain, node.inputs = plan.form.name, DOMAIN, [*streams, node.inputs[1]]
        node.attrs[_TABLE] = constant.name


def _call(model: Model, node: Node, weight: Weight, plan: Plan, number: int, *, lazy: bool) -> None:
    streams, attributes = _streams_of(model, weight, plan, number, lazy=lazy)
    node.op, node.domain, node.inputs = plan.form.name, DOMAIN, streams
    node.attrs.update(attributes)
    if plain_proto(weight) == _TYPED:
        node.attrs[_TYPED] = 1


def _streams_of(
    model: Model, weight: Weight, plan: Plan, number: int, *, lazy: bool
) -> tuple[list[Constant], dict[str, list[int]]]:
    """The streams as constants with free names, and the attributes of a call."""
    streams = []
    encoded = encode(weight.load(), plan)
    for letter, shape in plan.shapes.items():
        if lazy:
            dtype = encoded.streams[letter].dtype
            held = Weight.computed(dtype, shape, functools.partial(_stream, weight, plan, letter))
        else:
            held = Weight.from_array(encoded.streams[letter])
        streams.append(Constant(model.fresh(f"{letter}{number}"), held))
    return streams, encoded.attributes


def _stream(weight: Weight, plan: Plan, letter: str) -> Array:
    return encode(weight.load(), plan).streams[letter]


def restore(model: Model, scope: Graph, calls: Mapping[Node, Form], *, lazy: bool) -> None:
    """Put constants in the places of calls of decoders, and take out streams that nobody reads any more.

    `lazy`: decode anew when a constant is read. Raises ModelError if a call does not fit its form.
    """
    places: dict[Any, list[Constant]] = {}
    changed: dict[Node, Constant] = {}  # what was a node before it was a call
    tables: dict[Any, Constant] = {}
    listed = set(scope.initializers)
    for node, form in calls.items():
        constant = tables.get(node.inputs[0]) or _constant(model, node, form, lazy=lazy)
        streams = list(dict.fromkeys(node.inputs[: len(form.streams)]))
        free = [t for t in streams if all(reader in calls for reader in t.outputs)]
        for stream in free:
            places.setdefault(stream, [])
        if _ORIGIN in node.attrs or form.rows:
            changed[node] = constant
        else:
            model.redirect(node.outputs[0], constant)
        if _ORIGIN in node.attrs or node.inputs[0] in tables:
            continue
        if form.rows:
            tables[node.inputs[0]] = constant
        first = next((t for t in free if t in listed), None)
        if first is None:
            scope.initializers.append(constant)
        else:
            places[first].append(constant)
    scope.remove([n for n in calls if n not in changed])
    for node, constant in changed.items():
        _change_back(node, constant)
    scope.remove([producer for stream in places for producer in stream.inputs])
    swap(scope, places)


def _note_domain(node: Node) -> None:
    """Note a domain that is there and empty: it takes two bytes of the file."""
    if node.proto is not None and node.proto.HasField("domain"):
        node.attrs[_DOMAIN] = node.domain or ""


def _change_back(node: Node, constant: Constant) -> None:
    """Make a call the Constant node, or the Gather of a table, that it was."""
    domain = node.attrs.pop(_DOMAIN, None)
    if node.proto is not None:
        proto = onnx.NodeProto()
        proto.CopyFrom(without(node.proto, "domain", "input", "output", "attribute"))
        if domain is not None:
            proto.domain = str(domain)
        node.proto = proto
    if _TABLE in node.attrs:
        node.op, node.inputs = "Gather", [constant, node.inputs[-1]]
        del node.attrs[_TABLE]
    else:
        node.op, node.inputs = "Constant", []
        node.attrs.clear()
        node.attrs["value"] = constant
    node.domain = "" if domain is None else str(domain)


def _constant(model: Model, node: Node, form: Form, *, lazy: bool) -> Constant:
    """The constant that a call stands for."""
    value = node.outputs[0]
    streams, attributes = _streams(model, node, form), _attributes(node, form)

    def values() -> Array:
        return _decode(Encoded(form, {n: w.load() for n, w in streams.items()}, attributes), value.name)

    if lazy:
        shape = form.shape(attributes, streams["c"].shape if form.width else ())
        weight = Weight.computed(streams["t"].dtype, shape, values)
    else:
        weight = Weight.from_array(values())
    if node.attrs.get(_TYPED):
        weight = Weight.from_proto(_typed_proto(weight))
    constant = Constant(value.name, weight)
    constant.info = value.info
    if form.rows:
        constant = Constant(str(node.attrs.get(_TABLE)) if _TABLE in node.attrs else value.name, weight)
    elif _ORIGIN in node.attrs:
        constant.name = str(node.attrs[_ORIGIN])
    elif node.proto is not None and (node.proto.doc_string or node.proto.metadata_props):
        before = node.proto
        constant.proto = onnx.TensorProto(doc_string=before.doc_string or None, metadata_props=before.metadata_props)
    return constant


def swap(scope: Graph, old: Mapping[Any, list[Constant]]) -> None:
    """Put other constants in the places of some in the list of initializers; an empty list removes one."""
    scope.initializers = [new for item in scope.initializers for new in old.get(item, [item])]


def plain_proto(weight: Weight) -> str | None:
    """How a tensor is written: "raw", or "typed" if its values are listed in the field for their type.

    None if it is written in a way that neither form brings back bit for bit.
    """
    if weight.message is None or weight.nbytes >= STUB_BYTES:
        return "raw"
    found = weight.to_proto("")
    for field in ("name", "doc_string", "metadata_props"):
        found.ClearField(field)
    written = found.SerializeToString(deterministic=True)
    if written == numpy_helper.from_array(weight.load()).SerializeToString(deterministic=True):
        return "raw"
    return _TYPED if written == _typed_proto(weight).SerializeToString(deterministic=True) else None


def _typed_proto(weight: Weight) -> onnx.TensorProto:
    values = weight.load()
    proto = helper.make_tensor("", weight.data_type, list(weight.shape), values.reshape(-1))
    proto.ClearField("name")
    return proto


def _streams(model: Model, node: Node, form: Form) -> dict[str, Weight]:
    """The streams of a call by letter. Raises ModelError if they are not what the form needs."""
    where = f"the packed tensor {node.outputs[0].name!r}"
    if len(node.inputs) != len(form.inputs):
        raise ModelError(f"{where} has {len(node.inputs)} streams, its form {form.name} has {len(form.inputs)}")
    found: dict[str, Weight] = {}
    for letter, tensor in zip(form.streams, node.inputs, strict=False):
        weight = model.weight(tensor)
        if weight is None:
            raise ModelError(f"{where} is made from {tensor.name!r}, which is no constant, so it cannot be unpacked")
        if letter != "t" and weight.data_type != onnx.TensorProto.UINT8:
            raise ModelError(f"{where} is made from {tensor.name!r} of type {weight.dtype}, not uint8")
        found[letter] = weight
    if form.rows and len(found["c"].shape) != 3:
        raise ModelError(f"{where} has codes of shape {list(found['c'].shape)}, not [rows, groups, bytes]")
    return found


def _attributes(node: Node, form: Form) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name in form.attributes:
        value = node.attrs.get(name)
        if not isinstance(value, list) or not all(isinstance(v, int) and v >= 0 for v in value):
            raise ModelError(f"node {node.label!r} has no list of numbers {name!r}, which {form.name} needs")
        found[name] = value
    return found


def _decode(encoded: Encoded, name: str) -> Array:
    try:
        return decode(encoded)
    except (ValueError, IndexError) as error:
        raise ModelError(f"the packed tensor {name!r} is damaged: {error}") from error


# --- decoders --------------------------------------------------------------------------------------------------


def forms(model: Model) -> dict[str, Form]:
    """The forms of the decoders in a model, by name. Raises ModelError for a function that is none of ours."""
    imported = {o.version for o in model.header.opset_import if o.domain == DOMAIN}
    found: dict[str, Form] = {}
    for function in model.functions:
        if function.header.domain != DOMAIN:
            continue
        proto = export_model(Model(onnx.ModelProto(ir_version=LOWEST_IR), Graph(), [function]))[0].functions[0]
        form = form_of(proto) if imported <= {VERSION} else None
        if form is None:
            raise ModelError(
                f"function {function.header.name!r} of domain {DOMAIN} is not known to this version of onnxcomp, "
                "so the model cannot be unpacked; use the version that packed it"
            )
        found[form.name] = form
    return found


def add_decoders(model: Model, needed: set[Form], scopes: set[Graph]) -> None:
    """Give a model the functions that it needs and lacks, and let them be called in some scopes."""
    for function in model.functions:
        inside = any(scope in scopes for scope in function.body.scopes())
        if inside and all(o.domain != DOMAIN for o in function.header.opset_import):
            function.header.opset_import.add(domain=DOMAIN, version=VERSION)
    there = {f.header.name for f in model.functions if f.header.domain == DOMAIN}
    model.import_domain(DOMAIN, VERSION)
    protos = [decoder(form, model.opset) for form in sorted(needed, key=lambda f: f.name) if form.name not in there]
    model.functions += [_function(proto) for proto in protos]


def _function(proto: onnx.FunctionProto) -> Function:
    return from_proto(onnx.ModelProto(ir_version=LOWEST_IR, functions=[proto])).functions[0]
