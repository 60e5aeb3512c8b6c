"""Which node of a model each kernel of a profile stands for, and so what each node takes of the time of a run.

ONNX Runtime's optimizer renames and merges nodes, and adds changes of layout that belong to none. What it leaves of a
name is a trace: the name of a node or of a value, with something behind it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from onnxcomp.graph import Model, Node, producer
from onnxcomp.placement import KernelRun
from onnxcomp.profiling import execution

__all__ = ["NodeTimes", "attributed", "node_times"]

_REACH = 8  # nodes that one kernel may have swallowed between the one it stands for and its own output
# What ONNX Runtime's layout, int8 and scale fusions, and copies of shared nodes, append to the name of a node.
_ADDED = re.compile(r"(_nchwc|_nhwc|_quant|_token_\d+|/duplicated|/\w+Fusion/?)+$")
_NUMBERED = re.compile(r"(.+)_(\d+)")


@dataclass(frozen=True)
class NodeTimes:
    """Microseconds per run by node, and of everything that ran, found in the model or not."""

    by_node: Mapping[Node, float]
    total: float


def node_times(model: Model, feeds: Mapping[str, npt.NDArray[Any]], *, threads: int, runs: int) -> NodeTimes:
    """Profile `runs` runs on the CPU: median microseconds of one run, by node of the main graph.

    Errors are those of `open_session`.
    """
    copy = model.copy()
    for number, node in enumerate(copy.graph.nodes):  # names that are there, and only once
        node.name = node.outputs[0].name or f"node {number}"
    found = attributed(copy, copy.graph.nodes, execution(copy, feeds, threads=threads, runs=runs).runs)
    twins = dict(zip(copy.graph.nodes, model.graph.nodes, strict=True))
    return NodeTimes({twins[node]: us for node, us in found.by_node.items()}, found.total)


def attributed(model: Model, nodes: Collection[Node], runs: Sequence[KernelRun]) -> NodeTimes:
    """The time of each of `nodes`, as far as the kernels that ran can be told to stand for one of them.

    A kernel belongs to the node of its name and kind of operator; failing that to the one of its kind before it, up to
    8 nodes away, as a fused kernel is called after the last of its parts or after its output; else to its name alone.
    Of nodes without names, fused ones keep only a number that grows in the order of the graph: if there are as many as
    nodes of their kind are left, they are these.
    """
    wanted = set(nodes)
    by_name: dict[str, Node] = {}
    for scope in model.graph.scopes():
        for node in scope.nodes:
            for name in filter(None, (node.name, *(o.name for o in node.outputs))):
                by_name.setdefault(name, node)
    found: dict[Node, float] = {}
    nameless: dict[str, list[KernelRun]] = {}
    for ran in runs:
        own = _behind(ran, _named(ran, by_name, model), wanted)
        if own is not None:
            found[own] = found.get(own, 0.0) + ran.microseconds
        elif not _ADDED.sub("", ran.name):
            nameless.setdefault(ran.op, []).append(ran)
    for op, unnamed in nameless.items():
        left = [n for n in nodes if not n.name and n.op in op and n not in found]
        if len(left) == len(unnamed):
            ordered = sorted(unnamed, key=lambda r: _number_in(r.name))
            found.update((node, ran.microseconds) for node, ran in zip(left, ordered, strict=True))
    return NodeTimes(found, sum(ran.microseconds for ran in runs))


def _named(ran: KernelRun, by_name: Mapping[str, Node], model: Model) -> Node | None:
    for name in (ran.name, _ADDED.sub("", ran.name)):
        if name in by_name:
            return by_name[name]
    match = _NUMBERED.fullmatch(name)  # a node without a name is called after its operator and its place
    if match is None or int(match[2]) >= len(model.graph.nodes):
        return None
    node = model.graph.nodes[int(match[2])]
    return node if not node.name and node.op == match[1] else None


def _number_in(name: str) -> int:
    match = re.search(r"_token_(\d+)", name)
    return int(match[1]) if match else 0


def _behind(ran: KernelRun, node: Node | None, wanted: set[Node]) -> Node | None:
    front, seen = [] if node is None else [node], {node}
    for _ in range(_REACH):
        for candidate in front:
            if candidate in wanted and candidate.op in ran.op:
                return candidate
        front = [p for n in front for t in n.inputs if (p := producer(t)) is not None and p not in seen]
        seen.update(front)
    return node if node in wanted else None
