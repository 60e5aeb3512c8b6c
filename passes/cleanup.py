"""cleanup: take out what does nothing, and what is there twice. Bit-exact.

Rounds of four steps until nothing changes: neutral nodes (Identity, Dropout at inference, Cast to the same type,
Transpose that moves nothing, multiplication by one, ...) and pairs that undo each other; equal initializers of any
size; common subexpressions; dead code. Inputs and outputs of the model never change, random operators are never
merged, and a node whose value is an output of a scope keeps that name.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx

from onnxcomp.graph import Constant, Graph, Model, Node, producer
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.shapes import Shapes, infer

__all__ = ["RANDOM", "Cleanup", "remove_dead"]

# Two runs, or two equal nodes, give different values.
RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
_MAX_ROUNDS = 16


@dataclass(frozen=True)
class Cleanup(Pass):
    """Remove dead, neutral and duplicate parts of the graph."""

    name: ClassVar[str] = "cleanup"
    effect: ClassVar[Effect] = "exact"

    def run(self, model: Model, ctx: Context) -> Mapping[str, Any]:
        counts = {"neutral": 0, "duplicate initializers": 0, "common subexpressions": 0, "dead": 0}
        _constants_to_initializers(model, ctx)
        for _ in range(_MAX_ROUNDS):
            shapes = infer(model)
            step = {
                "neutral": sum(_remove_neutral(model, scope, shapes, ctx) for scope in list(model.scopes())),
                "duplicate initializers": _merge_initializers(model, ctx),
                "common subexpressions": sum(_merge_nodes(model, scope, ctx) for scope in list(model.scopes())),
                "dead": remove_dead(model, ctx),
            }
            for key, count in step.items():
                counts[key] += count
            if not any(step.values()):
                break
        return {key: count for key, count in counts.items() if count}


def _constants_to_initializers(model: Model, ctx: Context) -> None:
    """Constant nodes become initializers of their scope (function bodies have none and keep theirs)."""
    for scope in list(model.graph.scopes()):
        outputs = model.outputs()
        gone = []
        for node in scope.nodes:
            if node.op != "Constant" or node.domain or node.outputs[0] in outputs:
                continue
            values = _constant_values(node)
            if values is not None and ctx.allow(f"constant {node.outputs[0].name}"):
                constant = Constant(node.outputs[0].name, values)
                scope.initializers.append(constant)
                model.redirect(node.outputs[0], constant)
                gone.append(node)
        scope.remove(gone)


def _constant_values(node: Node) -> Any:
    """What a Constant node holds, with the element type that the specification gives each form."""
    attrs = node.attrs
    if isinstance(attrs.get("value"), Constant):
        return attrs["value"].weight
    for key, dtype in (("value_float", np.float32), ("value_int", np.int64)):
        if isinstance(attrs.get(key), (int, float)):
            return np.asarray(attrs[key], dtype)
    for key, dtype in (("value_floats", np.float32), ("value_ints", np.int64)):
        if isinstance(attrs.get(key), list):
            return np.asarray(attrs[key], dtype)
    return None


# --- neutral nodes ---------------------------------------------------------------------------------------------


def _remove_neutral(model: Model, scope: Graph, shapes: Shapes, ctx: Context) -> int:
    gone: list[Node] = []
    outputs = set(scope.outputs)
    for node in scope.nodes:
        rule = _NEUTRAL.get(node.op) if not node.domain else None
        if rule is None or any(o.outputs or o in outputs for o in node.outputs[1:]) or not node.inputs:
            continue
        source, old = rule(model, node, shapes), node.outputs[0]
        if source is None or not model.replaceable(scope, old, source):
            continue
        if ctx.allow(f"{node.label}: {node.op} changes nothing"):
            model.replace(scope, old, source)
            outputs = set(scope.outputs) if old in outputs else outputs
            gone.append(node)
    scope.remove(gone)
    return len(gone)


def _identity(model: Model, node: Node, shapes: Shapes) -> Any:
    return node.inputs[0]


def _dropout(model: Model, node: Node, shapes: Shapes) -> Any:
    if model.opset < 7:
        return node.inputs[0] if node.attrs.get("is_test", 0) else None
    if len(node.inputs) > 2 and node.inputs[2].name:
        training = model.value(node.inputs[2])
        return node.inputs[0] if training is not None and not training.any() else None
    return node.inputs[0]


def _cast(model: Model, node: Node, shapes: Shapes) -> Any:
    return node.inputs[0] if shapes[node.inputs[0]].elem == node.attrs.get("to") else None


def _transpose(model: Model, node: Node, shapes: Shapes) -> Any:
    perm = node.attrs.get("perm")
    if perm is None:
        return None
    if list(perm) == list(range(len(perm))):
        return node.inputs[0]
    before = producer(node.inputs[0])
    if before is not None and before.op == "Transpose" and not before.domain and before.attrs.get("perm"):
        both = [before.attrs["perm"][p] for p in perm]
        if both == list(range(len(both))):
            return before.inputs[0]
    return None


def _inverse(other: str) -> Callable[[Model, Node, Shapes], Any]:
    """A node that undoes `other` with the same axes."""

    def rule(model: Model, node: Node, shapes: Shapes) -> Any:
        before = producer(node.inputs[0])
        if before is None or before.op != other or before.domain:
            return None
        axes, axes_before = _axes(model, node), _axes(model, before)
        if axes is None or axes != axes_before or any(a < 0 for a in axes):
            return None
        return before.inputs[0]

    return rule


def _axes(model: Model, node: Node) -> list[int] | None:
    if len(node.inputs) > 1 and node.inputs[1].name:
        values = model.value(node.inputs[1])
        return None if values is None else [int(v) for v in values.reshape(-1)]
    axes = node.attrs.get("axes")
    return None if axes is None else list(axes)


def _single_concat(model: Model, node: Node, shapes: Shapes) -> Any:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _pad(model: Model, node: Node, shapes: Shapes) -> Any:
    pads = model.value(node.inputs[1]) if len(node.inputs) > 1 else np.asarray(node.attrs.get("pads", [1]))
    return node.inputs[0] if pads is not None and not pads.any() else None


def _neutral_element(value: float, sides: tuple[int, ...]) -> Callable[[Model, Node, Shapes], Any]:
    """Arithmetic with a constant that changes nothing and does not broadcast the other side to more axes."""

    def rule(model: Model, node: Node, shapes: Shapes) -> Any:
        for side in sides:
            constant = model.weight(node.inputs[side])
            other = node.inputs[1 - side]
            if constant is None or constant.size != 1 or constant.data_type == onnx.TensorProto.STRING:
                continue
            rank = shapes[other].rank
            fits = len(constant.shape) == 0 or (rank is not None and len(constant.shape) <= rank)
            if fits and constant.load().reshape(-1)[0] == value:
                return other
        return None

    return rule


_NEUTRAL: dict[str, Callable[[Model, Node, Shapes], Any]] = {
    "Identity": _identity,
    "Dropout": _dropout,
    "Cast": _cast,
    "Transpose": _transpose,
    "Squeeze": _inverse("Unsqueeze"),
    "Concat": _single_concat,
    "Pad": _pad,
    "Mul": _neutral_element(1, (0, 1)),
    "Div": _neutral_element(1, (1,)),
    "Sub": _neutral_element(0, (1,)),
}


# --- duplicates ------------------------------------------------------------------------------------------------


def _merge_initializers(model: Model, ctx: Context) -> int:
    """Equal initializers of one scope become one: same type, same shape, same bytes."""
    merged = 0
    outputs = model.outputs()
    for scope in model.graph.scopes():
        groups: dict[Hashable, list[Constant]] = {}
        for item in scope.initializers:
            if isinstance(item, Constant) and item.sparse is None and item not in outputs:
                groups.setdefault((item.weight.data_type, item.weight.shape), []).append(item)
        gone: set[Constant] = set()
        for group in groups.values():
            seen: dict[bytes, Constant] = {}
            for item in group if len(group) > 1 else ():
                first = seen.setdefault(item.weight.digest(), item)
                if first is not item and ctx.allow(f"{item.name} equals {first.name}"):
                    model.redirect(item, first)
                    gone.add(item)
        scope.initializers = [i for i in scope.initializers if i not in gone]
        merged += len(gone)
    return merged


def _merge_nodes(model: Model, scope: Graph, ctx: Context) -> int:
    """Nodes that compute the same from the same become one."""
    outputs = model.outputs()
    seen: dict[Hashable, Node] = {}
    gone: list[Node] = []
    for node in scope.nodes:
        key = _key(node)
        if key is None:
            continue
        first = seen.setdefault(key, node)
        if first is node or any(o in outputs for o in node.outputs):
            continue
        if any(b.name and not a.name for a, b in zip(first.outputs, node.outputs, strict=False)):
            continue
        if len(first.outputs) >= len(node.outputs) and ctx.allow(f"{node.label} repeats {first.label}"):
            for old, new in zip(node.outputs, first.outputs, strict=False):
                model.redirect(old, new)
            gone.append(node)
    scope.remove(gone)
    return len(gone)


def _key(node: Node) -> Hashable:
    """Equal keys: equal results. None where that cannot be known."""
    if node.op in RANDOM or node.bodies() or (node.op == "Dropout" and len(node.inputs) > 2):
        return None
    attrs: list[Hashable] = []
    for name in sorted(node.attrs):
        value = node.attrs[name]
        if isinstance(value, Constant):
            attrs.append((name, value.weight.digest()))
        elif isinstance(value, list):
            attrs.append((name, tuple(value)))
        elif isinstance(value, (int, float, str, bytes)):
            attrs.append((name, type(value).__name__, value))
        else:
            return None
    inputs = tuple(id(t) if t.name else None for t in node.inputs)
    return (node.domain or "", node.op, inputs, tuple(attrs))


# --- dead code -------------------------------------------------------------------------------------------------


def remove_dead(model: Model, ctx: Context) -> int:
    """Remove nodes and initializers that no output depends on, in all scopes. Returns how many there were."""
    removed = 0
    for scope in reversed(list(model.scopes())):
        live = _live(scope)
        dead = [n for n in scope.nodes if n not in live]
        dead = [n for n in dead if ctx.allow(f"{n.label} is not used")]
        scope.remove(dead)
        removed += len(dead)
    outputs = model.outputs()
    for scope in model.scopes():
        unused = {
            i
            for i in scope.initializers
            if isinstance(i, Constant) and not i.outputs and i not in outputs and ctx.allow(f"{i.name} is not used")
        }
        scope.initializers = [i for i in scope.initializers if i not in unused]
        del scope.header.value_info[:]
        removed += len(unused)
    return removed


def _live(scope: Graph) -> set[Node]:
    """Nodes of a scope that its outputs depend on, through subgraphs as well."""
    home = set(scope.nodes)
    stack = [p for o in scope.outputs for p in o.inputs if p in home]
    live: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in live:
            continue
        live.add(node)
        tensors = list(node.inputs)
        for body in node.bodies():
            for inner in body.scopes():
                tensors.extend(inner.outputs)
                tensors.extend(t for n in inner.nodes for t in n.inputs)
        stack.extend(p for t in tensors for p in t.inputs if p in home)
    return live
