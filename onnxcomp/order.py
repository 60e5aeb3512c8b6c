"""The order of nodes: values are computed before they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnxcomp.errors import ModelError

if TYPE_CHECKING:
    from onnxcomp.graph import Graph, Model, Node

__all__ = ["sort"]


def sort(model: Model) -> None:
    """Put the nodes of every scope in an order in which values are computed before they are read.

    A valid order stays as it is; a node that stands too late moves right before its first reader. Iterative, linear.

    Raises ModelError for a cycle.
    """
    for scope in model.scopes():
        _sort_scope(scope)


def _sort_scope(scope: Graph) -> None:
    home = set(scope.nodes)
    state: dict[Node, int] = {}  # 1: waits for its inputs, 2: placed
    ordered: list[Node] = []
    for root in scope.nodes:
        stack = [(root, iter(_needs(root, home)))] if root not in state else []
        if stack:
            state[root] = 1
        while stack:
            node, needs = stack[-1]
            for need in needs:
                if need not in state:
                    state[need] = 1
                    stack.append((need, iter(_needs(need, home))))
                    break
                if state[need] == 1:
                    raise ModelError(f"the graph has a cycle through node {need.label!r}; ONNX graphs must be acyclic")
            else:
                state[node] = 2
                ordered.append(node)
                stack.pop()
    scope.nodes[:] = ordered


def _needs(node: Node, home: set[Node]) -> list[Node]:
    """Nodes of the same scope that must come first, including those whose values a subgraph captures."""
    return [p for t in node.reads() for p in t.inputs if p in home and p is not node] + [
        node for t in node.inputs for p in t.inputs if p is node
    ]
