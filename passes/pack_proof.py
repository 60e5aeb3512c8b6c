"""Whether ONNX Runtime decodes packed tensors exactly, and only once: when it loads the model.

Both are found out, not assumed. Constant folding has limits that are not written down as a contract (a node may give
1 GiB, its output shape has to be known), and they change from version to version.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import onnx

from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import Constant, Graph, Model, Node, Variable
from onnxcomp.runtime import open_session, optimized_graph
from onnxcomp.storage import DOMAIN

__all__ = ["inexact", "unfolded"]


def unfolded(model: Model, nodes: Iterable[Node]) -> dict[Node, str]:
    """The calls of decoders of which something is left once ONNX Runtime has loaded the model, with the reason."""
    calls = list(nodes)
    try:
        found = optimized_graph(model)
    except OnnxcompError as error:
        return dict.fromkeys(calls, f"ONNX Runtime does not load the model with it: {error}")
    made: dict[str, str] = {}
    read: dict[str, str] = {}
    for node in _nodes(found.graph):
        kind = f"{node.domain}.{node.op_type}" if node.domain == DOMAIN else node.op_type
        made.update((name, kind) for name in node.output)
        read.update((name, kind) for name in node.input)
    left: dict[Node, str] = {}
    for call in calls:
        value = call.outputs[0].name
        reader = next((read[t.name] for t in call.inputs if t.name in read), None)
        if value in made or reader is not None:
            left[call] = f"ONNX Runtime does not fold its decoder at load: {made.get(value, reader)} remains"
    return left


def inexact(model: Model, call: Node, original: Mapping[str, Any] | bytes) -> str | None:
    """Why the decoder does not give `original` (the bytes of the tensor), None if it does.

    The runtime decodes it alone and unoptimized. Of an element type without numpy type nothing can be read back.
    """
    scope = Graph("decoded")
    streams = [Constant(t.name, weight) for t in call.inputs if (weight := model.weight(t)) is not None]
    scope.initializers.extend(streams)
    value = Variable(call.outputs[0].name, dtype=call.outputs[0].dtype, shape=call.outputs[0].shape)
    scope.add(call.op, streams, [value], domain=DOMAIN, attrs=call.attrs)
    scope.outputs = [value]
    functions = [f for f in model.functions if f.key[:2] == (DOMAIN, call.op)]
    header = onnx.ModelProto(ir_version=model.header.ir_version, opset_import=model.header.opset_import)
    try:
        session = open_session(Model(header, scope, functions), optimize=False)
        if session.outputs[0].dtype is None:
            return None
        decoded = session.run({})[0]
    except OnnxcompError as error:
        return f"ONNX Runtime cannot decode it: {error}"
    return None if decoded.tobytes() == original else "ONNX Runtime decodes it to other values"


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    stack = [graph]
    while stack:
        for node in stack.pop().node:
            yield node
            for attribute in node.attribute:
                stack.extend(attribute.graphs)
                if attribute.HasField("g"):
                    stack.append(attribute.g)
