"""Whether ONNX Runtime decodes packed tensors exactly, and only once: when it loads the model.

Both are found out, not assumed. Constant folding has limits that are not written down as a contract (a node may give
1 GiB, its output shape has to be known), and they change from version to version.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx

from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import Constant, Graph, Model, Node, Variable
from onnxcomp.passes.codec import Form
from onnxcomp.profiling import optimized_graph
from onnxcomp.runtime import open_session
from onnxcomp.storage import DOMAIN
from onnxcomp.weights import Weight

__all__ = ["inexact", "unfolded"]


def unfolded(model: Model, nodes: Iterable[Node]) -> dict[Node, str]:
    """The calls of decoders of which something is left once ONNX Runtime has loaded the model, with the reason."""
    calls = list(nodes)
    try:
        found = optimized_graph(model)
    except OnnxcompError as error:
        return dict.fromkeys(calls, f"ONNX Runtime does not load the model with it: {error}")
    made = {name: node.op_type for node in _nodes(found.graph) for name in node.output if name}
    read = {name: node.op_type for node in _nodes(found.graph) for name in node.input if name}
    inlined = {node for f in model.functions for scope in f.body.scopes() for node in scope.nodes}
    left: dict[Node, str] = {}
    for call in calls:
        found_in = [_find(made, call.outputs[0].name, call in inlined)]
        found_in += [_find(read, t.name, call in inlined) for t in call.inputs]
        remains = next(filter(None, found_in), None)
        if remains is not None:
            left[call] = f"ONNX Runtime does not fold its decoder when it loads the model: {remains} remains"
    return left


def _find(names: Mapping[str, str], name: str, inlined: bool) -> str | None:
    """The entry of a value; what was in the body of a function is renamed when it is inlined."""
    if not inlined:
        return names.get(name)
    return next((v for n, v in names.items() if n.startswith("_inlfunc_") and n.endswith(f"_{name}")), None)


def inexact(model: Model, call: Node, form: Form, original: Weight) -> str | None:
    """Why the decoder does not give the bits of the original, None if it does.

    The runtime decodes it alone and unoptimized. Of an element type without numpy type nothing can be read back.
    """
    scope = Graph("decoded")
    held = zip(form.streams, call.inputs, strict=False)
    streams = [Constant(letter, weight) for letter, tensor in held if (weight := model.weight(tensor)) is not None]
    if form.rows:
        streams.append(Constant("i", np.arange(original.shape[0])))
    scope.initializers.extend(streams)
    value = Variable("y", dtype=original.dtype, shape=list(original.shape))
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
    return None if decoded.tobytes() == original.load().tobytes() else "ONNX Runtime decodes it to other values"


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    stack = [graph]
    while stack:
        for node in stack.pop().node:
            yield node
            for attribute in node.attribute:
                stack.extend(attribute.graphs)
                if attribute.HasField("g"):
                    stack.append(attribute.g)
