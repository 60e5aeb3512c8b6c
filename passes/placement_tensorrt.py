"""Which values become 8-bit for TensorRT: Q/DQ on what it fuses into int8 kernels, nothing else.

TensorRT reads Q/DQ pairs as instructions and moves them through the graph by itself; the rules are those of its
documentation ("Explicit Quantization") and of what slows engines down in practice:

* Q/DQ on the input of weighted operators, never on their output: the next operator's input says what the epilogue
  writes, and an extra pair in between would split a fusion.
* Of a residual sum only the skip branch has Q/DQ: the other one stays inside the convolution that adds it up.
* What meets in a Concat whose result is 8-bit shares one scale, so that the Concat only copies.
* Average pooling behind an 8-bit operator takes 8-bit input; max pooling and layout operators need nothing, as Q moves
  through them.
* Products of a matrix with a vector, and operators with fewer than 16 channels on a side, run faster in fp16 (int8
  tensor cores work on multiples of 16); a convolution that reads a picture is the exception.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from onnxcomp.graph import Constant, Graph, Model, Node, producer
from onnxcomp.linear import LINEAR_OPS, Linear, linear
from onnxcomp.manager import Context
from onnxcomp.passes.placement import Placement, Unit, addend_of, why_no_weight
from onnxcomp.shapes import Shapes

__all__ = ["place_for_tensorrt"]

_ALIGNMENT = 16  # channels that an int8 tensor-core instruction takes at least
_PICTURE = 4  # channels up to which a first convolution has kernels of its own
_POOLS = frozenset({"AveragePool", "GlobalAveragePool"})
# Between an operator and what reads its result, these keep an 8-bit kernel in one piece.
_FUSED = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "MaxPool", "BatchNormalization"})


def place_for_tensorrt(
    model: Model, scope: Graph, shapes: Shapes, ctx: Context, *, keep_float: Iterable[str] = (), ops: Iterable[str] = ()
) -> Placement:
    """Choose units and the edges that carry Q/DQ; arguments as for `onnxcomp.passes.placement.place`."""
    kept, wanted = set(keep_float), set(ops) or set(LINEAR_OPS)
    outputs, home = set(scope.outputs), set(scope.nodes)
    plan = Placement(edges={})
    depth = _depths(scope)
    eight: set[Node] = set()  # nodes that TensorRT can run in int8, as placed so far
    for node in scope.nodes:
        if node.domain or not node.outputs or kept & {node.label, node.outputs[0].name}:
            continue
        if node.op in wanted:
            view = linear(model, node)
            reason = why_no_weight(node) if view is None else _unfit(view, shapes)
            if view is None or reason is not None:
                ctx.refuse(node.label, reason or "")
                continue
            addend = addend_of(view, outputs, home) if view.op == "MatMul" else None
            _enter(plan, Unit(node, view, None, False, node.outputs[0].name, addend), [node.inputs[0]])
            eight.add(node)
        elif node.op == "Add":
            skip = _skip_branch(node, eight, outputs, depth)
            if skip is not None and shapes[skip].elem == 1:
                _enter(plan, Unit(node, None, None, False, node.outputs[0].name), [skip])
                eight.add(node)
        elif node.op in _POOLS and _behind(node.inputs[0]) in eight:
            _enter(plan, Unit(node, None, None, False, node.outputs[0].name), [node.inputs[0]])
    _share_in_concats(scope, plan)
    return plan


def _enter(plan: Placement, unit: Unit, values: list[Any]) -> None:
    plan.units.append(unit)
    assert plan.edges is not None
    for value in values:
        plan.quantized.setdefault(value)
        plan.edges.setdefault(value, []).append(unit.node)


def _unfit(view: Linear, shapes: Shapes) -> str | None:
    if shapes[view.node.inputs[0]].elem not in (0, 1) or view.weight.weight.data_type != 1:
        return "its values are not float32"
    if isinstance(view.node.inputs[0], Constant):
        return "its input is constant"
    if view.op in ("Gemm", "MatMul"):
        rows = shapes[view.node.outputs[0]].shape
        if rows is not None and all(isinstance(d, int) and d == 1 for d in rows[:-1]):
            return "a matrix times a vector is faster in fp16 on TensorRT"
    if view.depthwise:
        return None
    inputs, outputs = view.inputs // view.groups, view.outputs // view.groups
    picture = view.op == "Conv" and inputs <= _PICTURE and max(view.weight.shape[2:]) > 1
    if outputs < _ALIGNMENT or (inputs < _ALIGNMENT and not picture):
        return f"{inputs} to {outputs} channels: below {_ALIGNMENT}, fp16 is faster on TensorRT"
    return None


def _skip_branch(node: Node, eight: set[Node], outputs: set[Any], depth: dict[Node, int]) -> Any | None:
    """The operand of a residual sum that is not the result of the convolution which can add it up, else None.

    Where both are such results, the one that fewer nodes led to is the skip branch.
    """
    if len(node.inputs) != 2 or node.inputs[0] is node.inputs[1]:
        return None
    if any(isinstance(t, Constant) for t in node.inputs):
        return None
    fusing = []
    for position, value in enumerate(node.inputs):
        source = producer(value)
        alone = len(value.outputs) == 1 and value not in outputs
        if alone and source in eight and source is not None and source.op in ("Conv", "ConvTranspose"):
            fusing.append((depth[source], position))
    return node.inputs[1 - max(fusing)[1]] if fusing else None


def _behind(value: Any) -> Node | None:
    """The node that computes a value, activations and the like passed over."""
    node = producer(value)
    while node is not None and node.op in _FUSED and node.inputs:
        node = producer(node.inputs[0])
    return node


def _depths(scope: Graph) -> dict[Node, int]:
    """Nodes on the longest way from an input to each node of a sorted scope."""
    depth: dict[Node, int] = {}
    for node in scope.nodes:
        depth[node] = 1 + max((depth.get(p, 0) for t in node.inputs for p in t.inputs), default=0)
    return depth


def _share_in_concats(scope: Graph, plan: Placement) -> None:
    """Give what meets in an 8-bit Concat Q/DQ of the scale of the result; inner ones after outer ones."""
    for node in reversed(scope.nodes):
        if node.op != "Concat" or node.domain or node.outputs[0] not in plan.quantized:
            continue
        values = [t for t in node.inputs if not isinstance(t, Constant)]
        if len(values) < len(node.inputs):
            continue
        _enter(plan, Unit(node, None, None, False, node.outputs[0].name), list(dict.fromkeys(values)))
        for value in values:
            if value not in plan.same and plan.root(node.outputs[0]) is not value:
                plan.same[value] = node.outputs[0]
