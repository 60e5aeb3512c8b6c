"""The layers of a model before and after optimization, side by side, as plain data for the report.

Layers are paired by the name of their node; of several nodes with one name, the first with the first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxcomp.layers import Place
from onnxcomp.node_times import NodeTimes
from onnxcomp.weights import Weight

__all__ = ["Key", "keyed", "layer_table"]

Key = tuple[str, int]  # the name of a node, and how many of that name came before it

_MOST = 1000  # layers in a table
_PIECE = 1 << 22  # elements that are looked at in one go


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
    original_times: NodeTimes,
    optimized_times: NodeTimes,
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


def _side(place: Place | None, times: NodeTimes, zeros: dict[int, float | None]) -> dict[str, Any] | None:
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
