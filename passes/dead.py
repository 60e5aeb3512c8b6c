"""What no output depends on: nodes, optional outputs, initializers, outputs of If, Loop and Scan, functions."""

from __future__ import annotations

from typing import Any

import onnx

from onnxcomp.graph import Constant, Graph, Model, Node, Variable
from onnxcomp.manager import Context

__all__ = ["remove_dead"]


def remove_dead(model: Model, ctx: Context) -> int:
    """Remove what no output depends on, in all scopes. Returns how many things there were."""
    removed = _drop_outputs(model, ctx)
    for scope in reversed(list(model.scopes())):
        live = _live(scope)
        # Readers go before what they read, so that the graph is whole after each step.
        dead = [n for n in reversed(scope.nodes) if n not in live]
        dead = [n for n in dead if ctx.allow(f"{n.label} is not used")]
        scope.remove(dead)
        removed += len(dead)
    removed += _blank_outputs(model, ctx)
    outputs, pinned = model.outputs(), _pinned(model)
    for scope in model.scopes():
        unused = {i for i in scope.initializers if isinstance(i, Constant) and not i.outputs and i not in outputs}
        unused = {i for i in unused if i.name not in pinned and ctx.allow(f"{i.name} is not used")}
        if unused:
            scope.initializers = [i for i in scope.initializers if i not in unused]
        del scope.header.value_info[:]
        removed += len(unused)
    return removed + _remove_functions(model, ctx)


def _live(scope: Graph) -> set[Node]:
    """Nodes of a scope that its outputs depend on, through subgraphs as well."""
    home = set(scope.nodes)
    stack = [p for o in scope.outputs for p in o.inputs if p in home]
    live: set[Node] = set()
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack.extend(p for t in node.reads() for p in t.inputs if p in home)
    return live


def _blank_outputs(model: Model, ctx: Context) -> int:
    """Optional outputs that nobody reads get no name, so that nobody computes them: masks, indices, last states."""
    outputs, blanked = model.outputs(), 0
    for scope, opset in model.versions():
        for node in scope.nodes:
            if len(node.outputs) < 2 or node.kind != node.op:
                continue
            for place in reversed(range(len(node.outputs))):
                output = node.outputs[place]
                unused = output.name and not output.outputs and output not in outputs
                if unused and _is_optional(node, place, opset) and ctx.allow(f"{output.name} is not used"):
                    node.outputs[place] = Variable("")
                    blanked += 1
            while not node.outputs[-1].name and len(node.outputs) > 1:
                node.outputs.pop()
    return blanked


def _is_optional(node: Node, place: int, opset: int) -> bool:
    """Whether leaving an output out changes nothing else."""
    if node.op == "BatchNormalization" and (opset < 14 or node.attrs.get("training_mode", 0)):
        return False  # before opset 14 the number of outputs says whether it is training
    try:
        declared = onnx.defs.get_schema(node.op, opset, "").outputs
    except onnx.defs.SchemaError:
        return False
    return place < len(declared) and declared[place].option == onnx.defs.OpSchema.FormalParameterOption.Optional


def _pinned(model: Model) -> set[str]:
    """Initializers that are named where no node reads them: scales of annotations, weights of a training step."""
    names = {
        p.value
        for s in model.scopes()
        for a in s.header.quantization_annotation
        for p in a.quant_parameter_tensor_names
    }
    for training in model.header.training_info:
        names.update(p.key for p in (*training.initialization_binding, *training.update_binding))
    return names


def _drop_outputs(model: Model, ctx: Context) -> int:
    """An output of an If, and one that a Loop or Scan collects, goes with what computes it if nobody reads it."""
    outputs = model.outputs()
    dropped = 0
    for node in [n for n in model.nodes() if n.kind in ("If", "Loop", "Scan")]:
        bodies = node.bodies()
        shift, carried = _carried(node)
        unused = [i for i, o in enumerate(node.outputs) if i >= carried and not o.outputs and o not in outputs]
        if len(unused) == len(node.outputs) or any(len(b.outputs) != len(node.outputs) + shift for b in bodies):
            continue
        for place in reversed(unused):
            if ctx.allow(f"output {place} of {node.label} is not used"):
                kept: list[Any] = [o for i, o in enumerate(node.outputs) if i != place]
                node.outputs = kept
                for body in bodies:
                    del body.outputs[place + shift]
                dropped += 1
    return dropped


def _carried(node: Node) -> tuple[int, int]:
    """How many outputs a body has in front of the node's, and how many of the node's are needed for the next step."""
    if node.op == "If":
        return 0, 0
    if node.op == "Loop":
        return 1, len(node.inputs) - 2
    # The axes and directions of a Scan's outputs are listed in attributes: such a node stays as it is.
    listed = "scan_output_axes" in node.attrs or "scan_output_directions" in node.attrs
    return 0, len(node.outputs) if listed else len(node.inputs) - int(node.attrs.get("num_scan_inputs", 0))


def _remove_functions(model: Model, ctx: Context) -> int:
    """Functions that no node calls, directly or from another function."""
    known = {f.key: f for f in model.functions}
    stack = list(model.graph.scopes())
    used: set[tuple[str, str, str]] = set()
    while stack:
        for node in stack.pop().nodes:
            overload = "" if node.proto is None else getattr(node.proto, "overload", "")
            key = (node.domain or "", node.op, overload)
            if key in known and key not in used:
                used.add(key)
                stack.extend(known[key].body.scopes())
    unused = [f for f in model.functions if f.key not in used]
    unused = [f for f in unused if ctx.allow(f"function {f.header.domain}.{f.header.name} is not used")]
    model.functions = [f for f in model.functions if f not in unused]
    return len(unused)
