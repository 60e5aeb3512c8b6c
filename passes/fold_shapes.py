"""Shape arithmetic: what is known becomes a constant, what is the same becomes one value. Bit-exact."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from onnxcomp.graph import Node
from onnxcomp.manager import Context
from onnxcomp.passes.shape_values import ShapeValues
from onnxcomp.passes.site import Site

__all__ = ["fold_shapes"]


def fold_shapes(site: Site, ctx: Context) -> int:
    """Rewrite the shape arithmetic of a scope; returns the number of rewrites."""
    outputs = set(site.scope.outputs)
    values = ShapeValues(site.model, site.scope, site.shapes)
    first: dict[Hashable, Any] = {}
    folded = _read_from_inputs(site, values, ctx)
    for node in site.scope.nodes:
        if node.kind == "Reshape" and len(node.inputs) == 2:
            folded += _reshape(site, node, values, ctx)
        elif node.kind == "Expand" and len(node.inputs) == 2 and node.outputs[0] not in outputs:
            folded += _expand(site, node, values, ctx)
        for tensor in node.outputs:
            if not tensor.outputs or tensor in outputs or site.model.weight(tensor) is not None:
                continue
            known = values.array(tensor)
            if known is not None:
                if not _fold_later(tensor, values) and ctx.allow(f"{tensor.name} is a known shape"):
                    site.model.redirect(tensor, site.model.constant(site.scope, tensor.name, known))
                    folded += 1
                continue
            key = values.key(tensor)
            same = first.setdefault(key, tensor) if key is not None else tensor
            if same is not tensor and ctx.allow(f"{tensor.name} is the same shape as {same.name}"):
                site.model.redirect(tensor, same)
                folded += 1
    return folded


def _fold_later(tensor: Any, values: ShapeValues) -> bool:
    """Whether all readers fold as well: one constant at the end of the chain is enough."""
    return all(n.op == "Shape" or (n.outputs and values.array(n.outputs[0]) is not None) for n in tensor.outputs)


def _reshape(site: Site, node: Node, values: ShapeValues, ctx: Context) -> int:
    """Give a Reshape a constant target if at most one of its dimensions is not known."""
    target = values[node.inputs[1]]
    if target is None or site.model.weight(node.inputs[1]) is not None or node.attrs.get("allowzero", 0):
        return 0
    source = site.shapes[node.inputs[0]].shape
    result: list[int] = []
    free = 0
    for position, dim in enumerate(target):
        if isinstance(dim, int):
            result.append(dim)
        elif source is not None and position < len(source) and isinstance(dim, str) and source[position] == dim:
            result.append(0)  # takes the dimension of the input at the same place
        else:
            result.append(-1)
            free += 1
    # What was not -1 may be -1 now; beside a zero it could not be found for an input without elements.
    if result.count(-1) > 1 or (free and 0 in result):
        return 0
    if not ctx.allow(f"{node.label}: target shape {result}"):
        return 0
    node.inputs[1] = site.model.constant(site.scope, f"{node.outputs[0].name}_shape", np.asarray(result, np.int64))
    return 1


def _expand(site: Site, node: Node, values: ShapeValues, ctx: Context) -> int:
    """Take out an Expand to dimensions that are there already, symbolic ones included."""
    target, dims = values[node.inputs[1]], site.shapes[node.inputs[0]].shape
    if target is None or dims is None or len(target) > len(dims):
        return 0
    if not all(t is not None and t in (1, d) for t, d in zip(target, dims[len(dims) - len(target) :], strict=True)):
        return 0
    if not node.outputs[0].outputs or not ctx.allow(f"{node.label}: Expand changes nothing"):
        return 0
    site.model.redirect(node.outputs[0], node.inputs[0])
    return 1


def _read_from_inputs(site: Site, values: ShapeValues, ctx: Context) -> int:
    """Take a symbolic dimension from the input that has it, not from a value deep in the graph.

    Every reader of the Shape node must pick dimensions of one input: then no node is added.
    """
    if site.scope is not site.model.graph:
        return 0
    places = {
        d: (t, k)
        for t in reversed(site.scope.inputs)
        for k, d in enumerate(site.shapes[t].shape or ())
        if isinstance(d, str)
    }
    shapes = {n.inputs[0]: n.outputs[0] for n in site.scope.nodes if n.kind == "Shape" and not n.attrs}
    outputs = set(site.scope.outputs)
    moved = 0
    for node in [n for n in site.scope.nodes if n.kind == "Shape" and n.inputs[0] not in site.scope.inputs]:
        readers = list(node.outputs[0].outputs)
        picks = [_picked(reader, node.outputs[0], values) for reader in readers]
        found = [places.get(d) if isinstance(d, str) else None for pick in picks for d in pick or [None]]
        sources = {place[0] for place in found if place is not None}
        if not readers or None in found or len(sources) != 1 or node.outputs[0] in outputs or not node.plain:
            continue
        if not ctx.allow(f"{node.label}: its dimensions are those of an input"):
            continue
        source = sources.pop()
        if source not in shapes:
            shapes[source] = site.model.variable(f"{source.name}_shape")
            site.scope.add("Shape", [source], [shapes[source]])
        for reader, pick in zip(readers, picks, strict=True):
            axes = np.asarray([places[d][1] for d in pick or () if isinstance(d, str)], np.int64)
            scalar = reader.op == "Gather" and values.scalar(reader.inputs[1])
            index = site.model.constant(site.scope, f"{reader.outputs[0].name}_axis", axes[0] if scalar else axes)
            reader.op = "Gather"
            reader.attrs.clear()
            reader.inputs = [shapes[source], index]
        moved += 1
    return moved


def _picked(node: Node, shape: Any, values: ShapeValues) -> list[Any] | None:
    """The dimensions that a Gather or Slice takes out of a shape, None if that is not known."""
    if node.kind not in ("Gather", "Slice") or node.inputs[0] is not shape or not node.plain:
        return None
    if any(t is shape for t in node.inputs[1:]):
        return None
    return values[node.outputs[0]] or None
