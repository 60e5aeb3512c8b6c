"""The layers of a model before and after optimization, side by side, as plain data for the report.

Layers are paired by the name of their node; of several nodes with one name, the first with the first. Times come from
a profile of ONNX Runtime, whose optimizer renames and merges nodes: `layer_times` finds the layer behind each.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcomp.graph import Model, Node, producer
from onnxcomp.layers import Place
from onnxcomp.placement import KernelRun
from onnxcomp.weights import Weight

__all__ = ["Key", "LayerTimes", "keyed", "layer_table", "layer_times"]

Key = tuple[str, int]  # the name of a node, and how many of that name came before it

_MOST = 1000  # layers in a table
_REACH = 8  # nodes that one kernel may have swallowed between a layer and its own output
_PIECE = 1 << 22  # elements that are looked at in one go
# What ONNX Runtime's layout, int8 and scale fusions append to the name of a node.
_ADDED = re.compile(r"(_nchwc|_nhwc|_quant|_token_\d+|/\w+Fusion/?)+$")
_NUMBERED = re.compile(r"(.+)_(\d+)")


@dataclass(frozen=True)
class LayerTimes:
    """Microseconds per run by layer, and of everything that ran, layers or not."""

    by_node: Mapping[Node, float]
    total: float


def keyed(places: Sequence[Place]) -> dict[Key, Place]:
    """Layers by name, in file order."""
    seen: Counter[str] = Counter()
    found = {}
    for place in places:
        name = place.layer.node
        found[name, seen[name]] = place
        seen[name] += 1
    return found


def layer_table(
    original: Sequence[Place],
    optimized: Sequence[Place],
    *,
    original_times: LayerTimes,
    optimized_times: LayerTimes,
    errors: Mapping[str, float],
) -> tuple[list[dict[str, Any]], int]:
    """One object per layer of either model, and how many layers were left out because there are more than 1,000.

    `errors` maps names of layers to the noise power of their output in the optimized
    model relative to its signal power: sum (x - y)² / sum x².
    """
    before, after = keyed(original), keyed(optimized)
    keys = list(dict.fromkeys([*before, *after]))
    if len(keys) > _MOST:
        weight = {k: max(_cost(before.get(k)), _cost(after.get(k))) for k in keys}
        kept = set(sorted(keys, key=lambda k: weight[k], reverse=True)[:_MOST])
        chosen = [k for k in keys if k in kept]
    else:
        chosen = keys
    zeros: dict[int, float | None] = {}
    rows = [
        {
            "name": key[0],
            "original": _side(before.get(key), original_times, zeros),
            "optimized": _side(after.get(key), optimized_times, zeros),
            **_error(errors.get(key[0]) if key[1] == 0 else None),
        }
        for key in chosen
    ]
    return rows, len(keys) - len(chosen)


def _cost(place: Place | None) -> tuple[int, int]:
    return (0, 0) if place is None else (place.layer.macs or 0, place.layer.bytes)


def _side(place: Place | None, times: LayerTimes, zeros: dict[int, float | None]) -> dict[str, Any] | None:
    if place is None:
        return None
    layer, us = place.layer, times.by_node.get(place.node)
    if place.weight is not None and id(place.weight) not in zeros:  # tied weights are read once
        zeros[id(place.weight)] = _sparsity(place.weight)
    return {
        "op": layer.op,
        "weight_shape": None if layer.weight_shape is None else list(layer.weight_shape),
        "dtype": layer.dtype,
        "parameters": layer.parameters,
        "bytes": layer.bytes,
        "bits_per_weight": layer.bits_per_weight,
        "sparsity": None if place.weight is None else zeros[id(place.weight)],
        "macs": layer.macs,
        "us": us,
        "time_share": None if us is None or not times.total else us / times.total,
    }


def _sparsity(weight: Weight) -> float | None:
    """Share of the stored elements that are zero."""
    if not weight.size or weight.dtype.kind not in "fiu":
        return None
    flat = weight.load().reshape(-1)
    nonzero = sum(int(np.count_nonzero(flat[i : i + _PIECE])) for i in range(0, flat.size, _PIECE))
    return 1 - nonzero / weight.size


def _error(error: float | None) -> dict[str, float | None]:
    known = error is not None and math.isfinite(error)
    return {
        "error": error if known else None,
        "sqnr_db": -10 * math.log10(error) if known and error else None,
    }


def layer_times(model: Model, places: Sequence[Place], nodes: Sequence[KernelRun]) -> LayerTimes:
    """The time of each layer, as far as the nodes that ran can be told to be layers of the model.

    A node belongs to the layer of its name and kind of operator; failing that to the layer of its kind before it, up to
    8 nodes away, since a fused node is called after the last of its parts or after its output; else to its name alone.
    Of nodes without names, fused ones keep only a number that grows in the order of the graph: if there are as many as
    layers of their kind are left, they are these.
    """
    layers = {place.node for place in places}
    by_name: dict[str, Node] = {}
    for scope in model.graph.scopes():
        for node in scope.nodes:
            for name in filter(None, (node.name, *(o.name for o in node.outputs))):
                by_name.setdefault(name, node)
    found: dict[Node, float] = {}
    nameless: dict[str, list[KernelRun]] = {}
    for ran in nodes:
        layer = _layer_of(ran, _named(ran, by_name, model), layers)
        if layer is not None:
            found[layer] = found.get(layer, 0.0) + ran.microseconds
        elif not _ADDED.sub("", ran.name):
            nameless.setdefault(ran.op, []).append(ran)
    for op, unnamed in nameless.items():
        left = [p.node for p in places if not p.node.name and p.node.op in op and p.node not in found]
        if len(left) == len(unnamed):
            ordered = sorted(unnamed, key=lambda r: _number_in(r.name))
            found.update((node, ran.microseconds) for node, ran in zip(left, ordered, strict=True))
    return LayerTimes(found, sum(n.microseconds for n in nodes))


def _named(ran: KernelRun, by_name: Mapping[str, Node], model: Model) -> Node | None:
    stem = _ADDED.sub("", ran.name)
    if stem in by_name:
        return by_name[stem]
    match = _NUMBERED.fullmatch(stem)  # a node without a name is called after its operator and its place
    if match is None or int(match[2]) >= len(model.graph.nodes):
        return None
    node = model.graph.nodes[int(match[2])]
    return node if not node.name and node.op == match[1] else None


def _number_in(name: str) -> int:
    match = re.search(r"_token_(\d+)", name)
    return int(match[1]) if match else 0


def _layer_of(ran: KernelRun, node: Node | None, layers: set[Node]) -> Node | None:
    front, seen = [] if node is None else [node], {node}
    for _ in range(_REACH):
        for candidate in front:
            if candidate in layers and candidate.op in ran.op:
                return candidate
        front = [p for n in front for t in n.inputs if (p := producer(t)) is not None and p not in seen]
        seen.update(front)
    return node if node in layers else None
