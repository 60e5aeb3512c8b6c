"""Activations that exporters spell out in arithmetic become the operator that ONNX Runtime fuses into the Conv before.

    Clip(x + b, 0, c) / c      =  HardSigmoid(x; alpha = 1/c, beta = b/c)
    y * Clip(x + b, 0, c) / c  =  y * HardSigmoid(x; alpha = 1/c, beta = b/c)       (hard swish: y = x, b = 3, c = 6)

The quotient may also be a product with 1/c, and come before or after the product with y. Same function up to rounding.
"""

from __future__ import annotations

from typing import Any

from onnxcomp.graph import Graph, Model, Node, producer
from onnxcomp.manager import Context
from onnxcomp.passes.pairs import absorb_output
from onnxcomp.shapes import Shapes

__all__ = ["fuse_hard_sigmoid"]

_FLOAT = 1  # the CPU provider has no other HardSigmoid
_SAME = 1e-6  # relative difference of 1/c and its value in float32


def fuse_hard_sigmoid(model: Model, scope: Graph, shapes: Shapes, ctx: Context) -> int:
    """Rewrite the spelled-out forms of a scope, in place; returns how many."""
    if model.opset < 6:
        return 0
    home, count = set(scope.nodes), 0
    for clip in list(scope.nodes):
        bound = _upper_bound(model, clip)
        add = producer(clip.inputs[0]) if bound is not None else None
        if bound is None or add is None or add.kind != "Add" or not add.plain:
            continue
        if add not in home or _reader(scope, home, add) != clip:
            continue
        x, offset = _operand_and_scalar(model, add, shapes)
        if offset is None or shapes[x].elem != _FLOAT:
            continue
        product, quotient = _behind(model, scope, home, shapes, clip)
        if quotient is None or not _divides(model, shapes, quotient, (product or clip).outputs[0], bound):
            continue
        if not ctx.allow(f"{clip.label} and what is around it to HardSigmoid"):
            continue
        add.op, add.inputs, add.attrs = "HardSigmoid", [x], {"alpha": 1 / bound, "beta": offset / bound}
        if product is not None:
            product.inputs = [add.outputs[0] if t is clip.outputs[0] else t for t in product.inputs]
        absorb_output(product or add, quotient)
        scope.remove({clip, quotient})
        count += 1
    return count


def _behind(
    model: Model, scope: Graph, home: set[Node], shapes: Shapes, clip: Node
) -> tuple[Node | None, Node | None]:
    """(the product with another value, if there is one, and what alone reads its result or that of the Clip)."""
    node = _reader(scope, home, clip)
    if node is not None and node.kind == "Mul" and _operand_and_scalar(model, node, shapes)[1] is None:
        return node, _reader(scope, home, node)
    return None, node


def _divides(model: Model, shapes: Shapes, node: Node, value: Any, bound: float) -> bool:
    """Whether a node divides `value` by `bound`."""
    if node.kind not in ("Mul", "Div") or not node.plain:
        return False
    x, scalar = _operand_and_scalar(model, node, shapes)
    if scalar is None or x is not value or (node.kind == "Div" and node.inputs[0] is not value):
        return False
    return abs((scalar / bound if node.kind == "Div" else scalar * bound) - 1) < _SAME


def _upper_bound(model: Model, clip: Node) -> float | None:
    """c of a Clip from 0 to c > 0, else None."""
    if clip.kind != "Clip" or not clip.plain:
        return None
    if model.opset < 11:
        low, high = clip.attrs.get("min"), clip.attrs.get("max")
    else:
        values = [model.value(t) if t.name else None for t in clip.inputs[1:3]]
        if len(values) < 2 or any(v is None or v.size != 1 for v in values):
            return None
        low, high = (float(v.reshape(())) for v in values if v is not None)
    return float(high) if low == 0 and high is not None and high > 0 else None


def _operand_and_scalar(model: Model, node: Node, shapes: Shapes) -> tuple[Any, float | None]:
    """(operand, number) of arithmetic with one constant number that adds no axis; (first operand, None) if there is
    none.
    """
    for constant, other in ((node.inputs[1], node.inputs[0]), (node.inputs[0], node.inputs[1])):
        value, rank = model.value(constant), shapes[other].rank
        if value is not None and value.size == 1 and rank is not None and value.ndim <= rank:
            return other, float(value.reshape(()))
    return node.inputs[0], None


def _reader(scope: Graph, home: set[Node], node: Node) -> Node | None:
    """What alone reads the output of a node, in the same scope."""
    value = node.outputs[0]
    if len(value.outputs) != 1 or any(o is value for o in scope.outputs):
        return None
    reader: Node = value.outputs[0]
    return reader if reader in home else None
