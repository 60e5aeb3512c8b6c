"""What each node of a model takes of the time of a run, from ONNX Runtime's profile.

Kernels are followed by name: what ONNX Runtime fuses runs under the name of the first of them, and changes of layout
that it adds belong to no node of the model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from onnxcomp.graph import Model, Node, producer
from onnxcomp.runtime import execution

__all__ = ["node_times"]

_BLOCKED = "_nchwc"
_RUNS = 30


def node_times(model: Model, feeds: Mapping[str, npt.NDArray[Any]], *, threads: int = 1) -> dict[Node, float]:
    """Median microseconds of one run in each node of the main graph that a kernel ran under the name of."""
    copy = model.copy()
    for number, node in enumerate(copy.graph.nodes):
        node.name = f"n{number}"
    found: dict[Node, float] = defaultdict(float)
    for ran in execution(copy, feeds, threads=threads, runs=_RUNS).runs:
        known = _node(model.graph.nodes, ran.name, ran.op)
        if known is not None:
            found[known] += ran.microseconds
    return dict(found)


def _node(nodes: Sequence[Node], name: str, op: str) -> Node | None:
    """The node that a kernel stands for. In the blocked layout it is named by its output, that of the activation if
    one is fused into it.
    """
    if re.fullmatch(r"n\d+", name):
        return nodes[int(name[1:])]
    if not name.endswith(_BLOCKED):
        return None
    made = name.removesuffix(_BLOCKED)
    node = next((n for n in nodes if any(y.name == made for y in n.outputs)), None)
    while node is not None and node.op != op:
        node = next((n for t in node.inputs if (n := producer(t)) is not None), None)
    return node
