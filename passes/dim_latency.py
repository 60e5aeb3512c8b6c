"""What each node of a model takes of the time of a run, from ONNX Runtime's profile.

Kernels are followed by name: what ONNX Runtime fuses runs under the name of the first of them, and changes of layout
that it adds belong to no node of the model.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Model, Node, producer
from onnxcomp.runtime import open_session

__all__ = ["node_times"]

_BLOCKED = "_nchwc"
_SECONDS, _LEAST_RUNS = 0.4, 10


def node_times(model: Model, feeds: Mapping[str, npt.NDArray[Any]], *, threads: int = 1) -> dict[Node, float]:
    """Median microseconds of one run in each node of the main graph that a kernel ran under the name of."""
    copy = model.copy()
    for number, node in enumerate(copy.graph.nodes):
        node.name = f"n{number}"
    with tempfile.TemporaryDirectory(prefix="onnxcomp-times-") as folder:
        session = open_session(copy, threads=threads, profile=os.path.join(folder, "run"))
        session.run(feeds)
        end, runs = time.perf_counter() + _SECONDS, 0
        while runs < _LEAST_RUNS or time.perf_counter() < end:
            session.run(feeds)
            runs += 1
        events = json.loads(Path(session.native.end_profiling()).read_text(encoding="utf-8"))
    found: dict[Node, list[float]] = defaultdict(list)
    nodes = model.graph.nodes
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            node = _node(nodes, event["name"].removesuffix("_kernel_time"), event["args"]["op_name"])
            if node is not None:
                found[node].append(event["dur"])
    # A node inside a loop runs several times: the median of one times how often.
    return {node: float(np.median(times)) * len(times) / (runs + 1) for node, times in found.items()}


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
