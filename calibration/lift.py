"""Values inside If and Loop as outputs of the main graph.

A value of a branch becomes an output of the branch and so of the If; the other branch gives an empty array in its
place. A value of a loop body becomes a scan output: the values of all iterations, stacked along a new first axis.
Through nested bodies a value is lifted level by level. Bodies of local functions have to be expanded first
(concrete.py): a function's value exists once per call, under other names.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import AttributeProto, TensorProto, helper

__all__ = ["lift"]


def lift(graph: onnx.GraphProto, names: Iterable[str]) -> None:
    """Change the nodes of an exported graph so that it computes the named values that its subgraphs compute."""
    missing = set(names) - _computed(graph)
    if missing:
        _lift(graph, missing)


def _lift(graph: onnx.GraphProto, missing: set[str]) -> None:
    known = _computed(graph)
    for node in graph.node:
        if node.op_type not in ("If", "Loop") or node.domain not in ("", "ai.onnx"):
            continue
        bodies = [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]
        for body in bodies:
            _lift(body, missing)
            for name in sorted((missing & _computed(body)) - known):
                known.add(name)
                node.output.append(name)
                body.output.append(onnx.ValueInfoProto(name=_alias(body, name)))
                for other in bodies:
                    if other is not body:
                        other.output.append(onnx.ValueInfoProto(name=_empty(other, name)))


def _computed(graph: onnx.GraphProto) -> set[str]:
    return {name for node in graph.node for name in node.output if name}


def _alias(body: onnx.GraphProto, name: str) -> str:
    """The value under a name of its own: ONNX Runtime refuses one that is an output twice, or inside and outside."""
    inner = f"{name}/inner"
    body.node.append(helper.make_node("Identity", [name], [inner]))
    return inner


def _empty(body: onnx.GraphProto, name: str) -> str:
    inner = f"{name}/absent"
    value = helper.make_tensor("", TensorProto.FLOAT, [0], [])
    body.node.append(helper.make_node("Constant", [], [inner], value=value))
    return inner
