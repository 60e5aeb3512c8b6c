"""Residual branches that can be removed whole: y = x + f(x) becomes y = x, and all that only f needs goes.

The exclusive cone of an operand of a sum is every node of which all results end in that operand and nowhere else. With
it go convolutions, attention heads, norms and what they hold; the sum itself becomes an Identity. Whatever lies behind
is solved anew (repair.py), most of all the next branches, which are fitted to the original's sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxcomp.graph import Constant, Model, Node, producer

__all__ = ["Residual", "residuals"]

_WEIGHTED_RANK = 2


@dataclass(frozen=True)
class Residual:
    """`total` is the sum, `gone` the operand that goes with `nodes`, its exclusive cone; `stays` is what y becomes.

    `unit` is the label of the branch as one removable unit.
    """

    unit: int
    total: Node
    gone: Any
    stays: Any
    nodes: frozenset[Node]

    @property
    def name(self) -> str:
        return f"branch into {self.total.label}"


def residuals(
    model: Model, shapes: Mapping[Any, Sequence[int]], varying: frozenset[tuple[Any, int]], first: int
) -> tuple[Residual, ...]:
    """The branches of the main graph, labelled from `first`. Of two branches into one sum the one with more weights."""
    graph = model.graph
    home, outputs = set(graph.nodes), model.outputs()
    found: list[Residual] = []
    for node in graph.nodes:
        if node.kind not in ("Add", "Sum") or len(node.inputs) != 2 or not _same(node.inputs, shapes, varying):
            continue
        cones = [_cone(tensor, node, home, outputs) for tensor in node.inputs]
        sizes = [_weights(cone) for cone in cones]
        place = 0 if sizes[0] > sizes[1] else 1
        if sizes[place]:
            gone, stays = node.inputs[place], node.inputs[1 - place]
            found.append(Residual(first + len(found), node, gone, stays, frozenset(cones[place])))
    return tuple(found)


def _same(
    operands: Sequence[Any], shapes: Mapping[Any, Sequence[int]], varying: frozenset[tuple[Any, int]]
) -> bool:
    """Whether two different computed operands have the same extents, whatever the inputs' are."""
    a, b = operands
    if a is b or any(isinstance(t, Constant) or producer(t) is None or t not in shapes for t in operands):
        return False
    axes = range(len(shapes[a]))
    return tuple(shapes[a]) == tuple(shapes[b]) and all(((a, k) in varying) == ((b, k) in varying) for k in axes)


def _cone(tensor: Any, reader: Node, home: set[Node], outputs: set[Any]) -> set[Node]:
    """Nodes of the main graph that nothing but `reader` needs, by way of `tensor`."""
    if any(node is not reader for node in tensor.outputs) or tensor in outputs:
        return set()
    found: set[Node] = set()
    stack = [producer(tensor)]
    while stack:
        node = stack.pop()
        if node is None or node in found or node not in home or node.bodies():
            continue
        results = [t for t in node.outputs if t.name and t is not tensor]
        if any(t in outputs or any(n not in found for n in t.outputs) for t in results):
            continue  # it comes again when the last of its readers is found
        found.add(node)
        stack.extend(producer(t) for t in node.inputs)
    return found


def _weights(nodes: set[Node]) -> int:
    """Elements of all weights of two axes or more."""
    constants = {t for node in nodes for t in node.inputs if isinstance(t, Constant)}
    return sum(t.weight.size for t in constants if sum(d > 1 for d in t.shape) >= _WEIGHTED_RANK)
