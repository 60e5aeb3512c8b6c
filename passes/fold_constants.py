"""fold-constants: compute at build time what does not depend on the inputs. Bit-exact.

What is constant is computed by ONNX Runtime itself, unoptimized, so the results are the very bits that the original
gives. A size budget keeps small files small: an Expand or Tile of a few numbers to megabytes stays a node. Shapes are
followed symbolically (fold_shapes.py): of `Shape -> Gather -> Concat -> Reshape` with a dynamic batch, a Reshape to
[-1, 12] remains. An If with a constant condition becomes the branch that it takes (branches.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx

from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import Constant, Graph, Model, Node, Variable, producer, sort
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.passes.branches import take_branches
from onnxcomp.passes.dead import remove_dead
from onnxcomp.passes.duplicates import RANDOM
from onnxcomp.passes.fold_shapes import fold_shapes
from onnxcomp.passes.site import Site
from onnxcomp.runtime import open_session
from onnxcomp.shapes import ValueType

__all__ = ["FoldConstants"]

# Not folded though constant: quantized weights (they are the compressed form), and what gives no tensor.
_KEPT = RANDOM | {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Constant", "Dropout",
    "Optional", "OptionalGetElement", "SequenceEmpty", "SequenceConstruct", "SequenceInsert", "SequenceErase",
    "SplitToSequence",
}  # fmt: skip
_GROWING = frozenset({
    "Expand", "Tile", "ConstantOfShape", "Range", "Pad", "Resize", "OneHot", "EyeLike", "Upsample", "CenterCropPad",
    "Where",
})  # fmt: skip
_SLACK = 1 << 20  # bytes that an intermediate value may have beyond its inputs while constants are computed
_MAX_ROUNDS = 16


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Fold constant subgraphs. `growth` is how many bytes a folded tensor may be larger than what it is made of."""

    name: ClassVar[str] = "fold-constants"
    effect: ClassVar[Effect] = "exact"

    growth: int = 16384

    def run(self, model: Model, ctx: Context) -> Mapping[str, Any]:
        counts = {"nodes": 0, "shapes": 0, "branches": 0}
        sort(model)
        for _ in range(_MAX_ROUNDS):
            shapes = ctx.shapes(model)
            sites = [Site(model, scope, shapes, opset) for scope, opset in model.versions()]
            imports = _imports(model)
            step = {
                "nodes": sum(_fold(site, imports[site.scope], ctx, self.growth) for site in sites),
                "shapes": sum(fold_shapes(site, ctx) for site in sites),
                "branches": sum(take_branches(model, site.scope, ctx) for site in sites),
            }
            for key, count in step.items():
                counts[key] += count
            if not any(step.values()):
                break
            sort(model)
            remove_dead(model, ctx)
        return {key: count for key, count in counts.items() if count}


def _imports(model: Model) -> dict[Graph, Any]:
    """The operator sets that each scope imports."""
    found = dict.fromkeys(model.graph.scopes(), model.header.opset_import)
    for function in model.functions:
        found.update(dict.fromkeys(function.body.scopes(), function.header.opset_import))
    return found


def _fold(site: Site, imports: Any, ctx: Context, growth: int) -> int:
    """Compute the constant nodes of a scope in one session and put initializers in their place."""
    model = site.model
    island = _constant_nodes(site, growth)
    while island:
        inside = set(island)
        wanted = _wanted(site.scope, island, inside)
        values = _compute(model, imports, island, wanted)
        large = {
            producer(t) for t, v in values.items() if not _affordable(model, producer(t), v.nbytes, growth, inside)
        }
        if not large:
            break
        island = _without(island, large)
    else:
        return 0
    folded = 0
    for tensor, value in values.items():
        if ctx.allow(f"{tensor.name} is constant"):
            model.redirect(tensor, model.constant(site.scope, tensor.name, value))
            folded += 1
    return folded


def _wanted(scope: Graph, island: list[Node], inside: set[Node]) -> list[Any]:
    """The values that something outside of the island reads."""
    outputs = set(scope.outputs)
    return [
        o
        for node in island
        for o in node.outputs
        if o.name and o not in outputs and any(reader not in inside for reader in o.outputs)
    ]


def _without(island: list[Node], large: set[Node | None]) -> list[Node]:
    """The island without some nodes and without what depends on them: these stay nodes."""
    gone = set(large)
    for node in island:
        if any(producer(t) in gone for t in node.inputs if t.inputs):
            gone.add(node)
    return [node for node in island if node not in gone]


def _constant_nodes(site: Site, growth: int) -> list[Node]:
    """Nodes whose inputs are all known, in order; what must stay, and what may be huge, ends the chain."""
    found: list[Node] = []
    inside: set[Node] = set()
    for node in site.scope.nodes:
        if node.kind != node.op or node.op in _KEPT or node.bodies() or not node.inputs or not node.plain:
            continue
        if not all(not t.name or producer(t) in inside or site.model.weight(t) is not None for t in node.inputs):
            continue
        if all(_small_enough(site, node, site.shapes[o], growth) for o in node.outputs if o.name):
            found.append(node)
            inside.add(node)
    return found


def _small_enough(site: Site, node: Node, kind: ValueType, growth: int) -> bool:
    """Judged before anything is computed; unknown sizes pass only for operators that cannot blow up."""
    if kind.size is None or kind.dtype is None:
        return node.op not in _GROWING
    weights = [site.model.weight(t) for t in node.inputs if t.name]
    return kind.size * kind.dtype.itemsize <= sum(w.nbytes for w in weights if w is not None) + _SLACK + growth


def _affordable(model: Model, node: Node | None, nbytes: int, growth: int, inside: set[Node]) -> bool:
    """A folded tensor may be `growth` bytes larger than the constants that it is made of, all the way back."""
    sources: dict[Any, int] = {}
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        for tensor in current.inputs if current is not None else ():
            weight = model.weight(tensor)
            if weight is not None:
                sources[tensor] = weight.nbytes
            before = producer(tensor)
            if before in inside and before not in seen:
                seen.add(before)
                stack.append(before)
    return nbytes <= sum(sources.values()) + growth


def _compute(model: Model, imports: Any, island: list[Node], wanted: list[Any]) -> dict[Any, np.ndarray[Any, Any]]:
    """The values that the runtime can compute."""
    if not wanted:
        return {}
    values = _evaluate(model, imports, island, wanted)
    if values is not None:
        return values
    outputs = model.outputs()
    values = {}  # one node that the runtime cannot compute spoils the session: try them one by one
    for node in island:
        alone = [o for o in node.outputs if o.name]
        if all(not t.name or model.weight(t) is not None for t in node.inputs):
            found = _evaluate(model, imports, [node], alone) or {}
            values.update((t, v) for t, v in found.items() if t in wanted or (t.outputs and t not in outputs))
    return values


def _evaluate(
    model: Model, imports: Any, nodes: Iterable[Node], wanted: list[Any]
) -> dict[Any, np.ndarray[Any, Any]] | None:
    """Run some nodes on constants, bit for bit as the runtime does; None if it cannot.

    A result of a type that numpy lacks is left out.
    """
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
        scope.add(node.op, inputs, [copies[t] for t in node.outputs], attrs=node.attrs)
    scope.outputs = [copies[t] for t in wanted]
    header = onnx.ModelProto(ir_version=max(model.header.ir_version, 4), opset_import=imports)
    try:
        session = open_session(Model(header, scope, []), optimize=False)
        plain = [spec.name for spec in session.outputs if spec.dtype is not None]
        results = dict(zip(plain, session.run({}, plain), strict=True)) if plain else {}
    except OnnxcompError:
        return None
    except Exception:  # what a kernel raises on constants that it cannot take is ONNX Runtime's own exception
        return None
    return {t: results[t.name] for t in wanted if t.name in results}
