"""Float islands: units that cost much accuracy and little time go back to float.

The first and the last layers of a network often decide its error and hold few of its multiplications. Each small unit
is tried in float on its own, then the best are taken together, greedily, while they help and stay within the budget:
a share of the multiplications of all weighted units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from onnxcomp.graph import Model
from onnxcomp.passes.candidate import Candidate, Decisions
from onnxcomp.passes.placement import Unit
from onnxcomp.shapes import infer

__all__ = ["find_islands"]

_TRIALS = 12  # units that are tried, the cheapest first
_WORTH = 0.2  # dB that an island has to bring


def find_islands(
    best: Candidate,
    build: Callable[[Decisions], Candidate],
    keep_better: Callable[[str, Candidate, Candidate], Candidate],
    model: Model,
    budget: float,
    progress: Callable[[float, str], None],
) -> Candidate:
    """The best candidate with some units in float. `budget` is the share of multiplications that may go back."""
    costs = _shares(best, model)
    cheap = [key for key in sorted(costs, key=lambda k: costs[k]) if costs[key] <= budget][:_TRIALS]
    labels = {u.key: u.label for u in best.units}
    gains: dict[str, float] = {}
    for number, key in enumerate(cheap):
        progress(number / max(len(cheap), 1), "looking for float islands")
        tried = build(replace(best.decisions, skip=best.decisions.skip | {labels[key]}))
        gains[key] = tried.score - best.score
    spent = 0.0
    for key in sorted(gains, key=lambda k: -gains[k]):
        if gains[key] < _WORTH or spent + costs[key] > budget:
            continue
        tried = build(replace(best.decisions, skip=best.decisions.skip | {labels[key]}))
        kept = keep_better(f"{labels[key]} in float", best, tried)
        if kept is tried and tried.score - best.score >= _WORTH:
            best, spent = tried, spent + costs[key]
    return best


def _shares(best: Candidate, model: Model) -> dict[str, float]:
    """Share of the multiplications of each weighted unit, by weight size and output positions."""
    shapes = infer(model)
    sizes = {n.outputs[0].name: shapes[n.outputs[0]].shape for n in model.graph.nodes}
    macs = {u.key: _macs(u, sizes.get(u.key)) for u in best.units if u.view is not None}
    total = sum(macs.values()) or 1.0
    return {key: value / total for key, value in macs.items()}


def _macs(unit: Unit, shape: tuple[int | str | None, ...] | None) -> float:
    assert unit.view is not None
    count = float(np.prod(unit.view.weight.shape))
    if unit.view.op == "Conv" and shape is not None:
        for dim in shape[2:]:
            count *= dim if isinstance(dim, int) else 1
    return count
