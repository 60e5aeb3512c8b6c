"""fold-constants: compute at build time what does not depend on the inputs. Bit-exact.

What is constant is computed by ONNX Runtime itself, unoptimized, so the results are the very bits that the original
gives. A size budget keeps small files small: an Expand or Tile of a few numbers to megabytes stays a node. Shapes are
followed symbolically: of `Shape -> Gather -> Concat -> Reshape` with a dynamic batch, a Reshape to [-1, 12] remains.
An If with a constant condition becomes the branch that it takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx

from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import Constant, Graph, Model, Node, Variable, producer, sort
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.passes.cleanup import RANDOM, remove_dead
from onnxcomp.passes.shape_values import ShapeValues
from onnxcomp.runtime import open_session
from onnxcomp.shapes import Shapes, infer

__all__ = ["FoldConstants"]

# Not folded though constant: these are the compressed form (quantized weights), or the point of them is to be small.
_KEPT = RANDOM | {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Constant", "Optional", "SequenceEmpty"}
_MAX_ROUNDS = 8


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Fold constant subgraphs. `growth` is how many bytes a folded tensor may be larger than what it is made of."""

    name: ClassVar[str] = "fold-constants"
    effect: ClassVar[Effect] = "exact"

    growth: int = 16384

    def run(self, model: Model, ctx: Context) -> Mapping[str, Any]:
        counts = {"nodes": 0, "shapes": 0, "branches": 0}
        for _ in range(_MAX_ROUNDS):
            shapes = infer(model)
            step = {
                "nodes": sum(_fold_scope(model, scope, shapes, ctx, self.growth) for scope in model.graph.scopes()),
                "shapes": sum(_fold_shapes(model, scope, shapes, ctx) for scope in model.graph.scopes()),
                "branches": sum(_take_branches(model, scope, ctx) for scope in list(model.graph.scopes())),
            }
            for key, count in step.items():
                counts[key] += count
            if not any(step.values()):
                break
            sort(model)
            remove_dead(model, ctx)
        return {key: count for key, count in counts.items() if count}


# --- constants -------------------------------------------------------------------------------------------------


def _fold_scope(model: Model, scope: Graph, shapes: Shapes, ctx: Context, growth: int) -> int:
    """Compute the constant nodes of a scope in one session and put initializers in their place."""
    outputs = set(scope.outputs)
    island = _constant_nodes(model, scope, shapes, growth)
    inside = set(island)
    wanted = [
        o
        for node in island
        for o in node.outputs
        if o.name and o not in outputs and any(consumer not in inside for consumer in o.outputs)
    ]
    if not wanted:
        return 0
    values = _evaluate(model, island, wanted)
    if values is None:  # one node that the runtime cannot compute spoils the session: try them one by one
        values = {}
        for node in island:
            alone = [o for o in node.outputs if o in wanted]
            if all(_known(model, t) for t in node.inputs) and alone:
                values.update(_evaluate(model, [node], alone) or {})
    folded = 0
    for tensor in wanted:
        value = values.get(tensor)
        if value is not None and _affordable(model, producer(tensor), value.nbytes, growth, inside):
            if ctx.allow(f"{tensor.name} is constant"):
                constant = model.constant(scope, tensor.name, value)
                model.redirect(tensor, constant)
                folded += 1
    return folded


def _known(model: Model, tensor: Any) -> bool:
    return not tensor.name or model.weight(tensor) is not None


def _constant_nodes(model: Model, scope: Graph, shapes: Shapes, growth: int) -> list[Node]:
    """Nodes whose inputs are all known, in order; operators that must stay, and results that may be huge, end the chain."""
    found: list[Node] = []
    inside: set[Node] = set()
    for node in scope.nodes:
        if node.domain or node.op in _KEPT or node.bodies() or not node.inputs:
            continue
        if not all(_known(model, t) or producer(t) in inside for t in node.inputs):
            continue
        if any(isinstance(v, onnx.AttributeProto) for v in node.attrs.values()):
            continue
        if any(isinstance(t, Constant) and t.weight.data_type == onnx.TensorProto.STRING for t in node.inputs):
            continue
        if not all(_small_enough(model, node, shapes[o], growth) for o in node.outputs if o.name):
            continue
        found.append(node)
        inside.add(node)
    return found


def _small_enough(model: Model, node: Node, kind: Any, growth: int) -> bool:
    """Judged by inferred shapes before anything is computed; unknown sizes pass only for operators that cannot blow up."""
    if kind.size is None or kind.dtype is None:
        return node.op not in {"Expand", "Tile", "ConstantOfShape", "Range", "Pad", "Resize", "OneHot", "EyeLike", "Upsample"}
    return bool(kind.size * kind.dtype.itemsize <= _input_bytes(model, node) + (1 << 20) + growth)


def _input_bytes(model: Model, node: Node) -> int:
    weights = [model.weight(t) for t in node.inputs if t.name]
    return sum(w.nbytes for w in weights if w is not None)


def _affordable(model: Model, node: Node | None, nbytes: int, growth: int, inside: set[Node]) -> bool:
    """A folded tensor may be `growth` bytes larger than the constants that it is made of, all the way back."""
    sources: dict[int, int] = {}
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        for tensor in current.inputs if current is not None else ():
            weight = model.weight(tensor)
            if weight is not None:
                sources[id(weight)] = weight.nbytes
            before = producer(tensor)
            if before in inside and before not in seen:
                seen.add(before)
                stack.append(before)
    return nbytes <= sum(sources.values()) + growth


def _evaluate(model: Model, nodes: list[Node], wanted: list[Any]) -> dict[Any, np.ndarray[Any, Any]] | None:
    """Run some nodes on constants, bit for bit as the runtime does; None if it cannot."""
    scope = Graph("fold")
    copies: dict[Any, Any] = {}
    for node in nodes:
        for tensor in node.inputs:
            weight = model.weight(tensor) if tensor.name else None
            if weight is not None and tensor not in copies:
                copies[tensor] = Constant(tensor.name, weight)
                scope.initializers.append(copies[tensor])
        for tensor in node.outputs:
            copies[tensor] = Variable(tensor.name)
        inputs = [copies[t] if t.name else Variable("") for t in node.inputs]
        scope.add(node.op, inputs, [copies[t] for t in node.outputs], domain=node.domain or "", attrs=node.attrs)
    scope.outputs = [copies[t] for t in wanted]
    header = onnx.ModelProto(ir_version=model.header.ir_version, opset_import=model.header.opset_import)
    part = Model(header, scope, [])
    part.header.ir_version = max(part.header.ir_version, 4)
    try:
        session = open_session(part, optimize=False)
        return dict(zip(wanted, session.run({}), strict=True))
    except OnnxcompError:
        return None
    except Exception:  # what a kernel raises on constants that it cannot take is ONNX Runtime's own exception
        return None


# --- shapes ----------------------------------------------------------------------------------------------------


def _fold_shapes(model: Model, scope: Graph, shapes: Shapes, ctx: Context) -> int:
    """Shape arithmetic whose result is known, and Reshape targets of which one dimension is not."""
    outputs = set(scope.outputs)
    values = ShapeValues(model, scope, shapes)
    folded = 0
    for node in scope.nodes:
        if node.op == "Reshape" and not node.domain and len(node.inputs) == 2:
            folded += _fold_reshape(model, scope, node, values, shapes, ctx)
        for tensor in node.outputs:
            known = values.array(tensor)
            if known is None or not tensor.outputs or tensor in outputs or _known(model, tensor):
                continue
            if all(n.op == "Shape" or values.array(n.outputs[0]) is not None for n in tensor.outputs):
                continue  # its consumers fold as well: one constant at the end of the chain is enough
            if ctx.allow(f"{tensor.name} is a known shape"):
                model.redirect(tensor, model.constant(scope, tensor.name, known))
                folded += 1
    return folded


def _fold_reshape(
    model: Model, scope: Graph, node: Node, values: ShapeValues, shapes: Shapes, ctx: Context
) -> int:
    target = values[node.inputs[1]]
    if target is None or _known(model, node.inputs[1]) or node.attrs.get("allowzero", 0):
        return 0
    source = shapes[node.inputs[0]].shape
    result: list[int] = []
    for position, dim in enumerate(target):
        if isinstance(dim, int):
            result.append(dim)
        elif source is not None and position < len(source) and isinstance(dim, str) and source[position] == dim:
            result.append(0)  # takes the dimension of the input at the same place
        else:
            result.append(-1)
    unknown = result.count(-1)
    if unknown > 1 or (unknown and any(d == 0 for d in target)):
        return 0
    if not ctx.allow(f"{node.label}: target shape {result}"):
        return 0
    node.inputs[1] = model.constant(scope, f"{node.outputs[0].name}_shape", np.asarray(result, np.int64))
    return 1


# --- If --------------------------------------------------------------------------------------------------------


def _take_branches(model: Model, scope: Graph, ctx: Context) -> int:
    """Put the nodes of the branch that a constant condition takes in the place of the If."""
    taken: list[Node] = []
    for node in list(scope.nodes):
        condition = model.value(node.inputs[0]) if node.op == "If" and not node.domain else None
        if condition is None or condition.size != 1:
            continue
        body = node.attrs["then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"]
        if not isinstance(body, Graph) or not ctx.allow(f"{node.label}: the condition is constant"):
            continue
        _rename_apart(model, scope, body)
        scope.initializers.extend(body.initializers)
        for old, new in zip(node.outputs, body.outputs, strict=True):
            if isinstance(new, Constant) or producer(new) is None or any(o is old for o in scope.outputs):
                scope.add("Identity", [new], [_take_over(scope, old)])
            else:
                model.redirect(old, new)
        moved = list(body.nodes)
        body.nodes.clear()
        place = next(i for i, n in enumerate(scope.nodes) if n is node)
        scope.nodes[place:place] = moved
        taken.append(node)
    scope.remove(taken)
    return len(taken)


def _take_over(scope: Graph, old: Any) -> Variable:
    """A fresh variable in the place of `old`, with its name, its consumers and its role as an output."""
    new = Variable(old.name, dtype=old.dtype, shape=old.shape)
    new.info = old.info
    for consumer in dict.fromkeys(old.outputs):
        for position, tensor in enumerate(consumer.inputs):
            if tensor is old:
                consumer.inputs[position] = new
    scope.outputs = [new if o is old else o for o in scope.outputs]
    old.name += "_replaced"
    return new


def _rename_apart(model: Model, scope: Graph, body: Graph) -> None:
    """Names in a branch may repeat those of the other branch or of another scope; outside they must be unique."""
    taken = {t.name for n in scope.nodes for t in (*n.inputs, *n.outputs)}
    taken |= {t.name for t in (*scope.inputs, *scope.outputs, *scope.initializers)}
    for tensor in [*body.initializers, *(o for n in body.nodes for o in n.outputs)]:
        if tensor.name in taken:
            tensor.name = model.fresh(tensor.name)
