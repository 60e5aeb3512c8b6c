"""cleanup: take out what does nothing, and what is there twice. Bit-exact.

Rounds of five steps until nothing changes: neutral nodes (Identity, Dropout at inference, Reshape to the same shape,
multiplication by one, ...; see neutral.py), pairs of nodes that one can do (chains.py), equal initializers of any size
and common subexpressions (duplicates.py), dead code (dead.py). Inputs and outputs of the model never change, random
operators are never merged, and a node whose value is an output of a scope keeps that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from onnxcomp.graph import Constant, Model, Node
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.passes.chains import shorter
from onnxcomp.passes.dead import remove_dead
from onnxcomp.passes.duplicates import RANDOM, merge_initializers, merge_nodes
from onnxcomp.passes.neutral import equal_value
from onnxcomp.passes.site import Site

__all__ = ["RANDOM", "Cleanup", "remove_dead"]

_MAX_ROUNDS = 64


@dataclass(frozen=True)
class Cleanup(Pass):
    """Remove dead, neutral and duplicate parts of the graph."""

    name: ClassVar[str] = "cleanup"
    effect: ClassVar[Effect] = "exact"

    def run(self, model: Model, ctx: Context) -> Mapping[str, Any]:
        counts = {"neutral": 0, "pairs": 0, "duplicate initializers": 0, "common subexpressions": 0}
        counts["dead"] = remove_dead(model, ctx)
        counts["constant nodes"] = _constants_to_initializers(model, ctx)
        shapes = ctx.shapes(model)
        for _ in range(_MAX_ROUNDS):
            sites = [Site(model, scope, shapes, opset) for scope, opset in model.versions()]
            step = {
                "neutral": sum(_remove_neutral(site, ctx) for site in sites),
                "pairs": sum(_shorten(site, ctx) for site in sites),
                "duplicate initializers": merge_initializers(model, ctx),
                "common subexpressions": merge_nodes(model, ctx),
                "dead": remove_dead(model, ctx),
            }
            for key, count in step.items():
                counts[key] += count
            if not any(step.values()):
                break
        return {key: count for key, count in counts.items() if count}


def _constants_to_initializers(model: Model, ctx: Context) -> int:
    """Constant nodes become initializers of their scope (function bodies have none and keep theirs); how many."""
    outputs = model.outputs()
    count = 0
    for scope in list(model.graph.scopes()):
        gone = []
        for node in scope.nodes:
            if node.kind != "Constant" or node.outputs[0] in outputs:
                continue
            weight = model.weight(node.outputs[0])
            if weight is not None and ctx.allow(f"constant {node.outputs[0].name}"):
                constant = Constant(node.outputs[0].name, weight)
                scope.initializers.append(constant)
                model.redirect(node.outputs[0], constant)
                gone.append(node)
        scope.remove(gone)
        count += len(gone)
    return count


def _remove_neutral(site: Site, ctx: Context) -> int:
    gone: list[Node] = []
    changed = 0
    model, scope = site.model, site.scope
    outputs, home = set(scope.outputs), set(scope.nodes)
    for node in scope.nodes:
        source = equal_value(site, node)
        if source is None or any(o.outputs or o in outputs for o in node.outputs[1:]):
            continue
        old = node.outputs[0]
        if model.replaceable(scope, old, source, home):
            if ctx.allow(f"{node.label}: {node.op} changes nothing"):
                model.replace(scope, old, source)
                outputs = set(scope.outputs) if old in outputs else outputs
                scope.release(node)
                gone.append(node)
        elif node.kind != "Identity" and ctx.allow(f"{node.label}: {node.op} is an Identity"):
            node.op, node.domain, node.outputs = "Identity", "", [old]
            node.attrs.clear()
            node.inputs = [source]
            changed += 1
    scope.remove(gone)
    return len(gone) + changed


def _shorten(site: Site, ctx: Context) -> int:
    count = 0
    for node in list(site.scope.nodes):
        edit = shorter(site, node)
        if edit is not None and ctx.allow(f"{node.label} reads past {node.op}"):
            edit()
            count += 1
    return count
