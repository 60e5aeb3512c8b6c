"""Float islands: units that stay in float because their rounding costs more than their time is worth.

Three uses. The classifier at the end of a network holds few of its multiplications and its output is float anyway, so
it may stay in float for little (its weight keeps its int8 form in the file only if it is quantized). So may the branch
of an output that hardly any calibration sample has a signal in, such as a detector's confidence: the ranges seen there
tell little about those to come, and what they cut off is what the output is about. And where rounding breaks the
budget, the run of consecutive units whose return to float helps most goes back, again and again, until the quality is
within the budget; whole runs, because each border between int8 and float costs a conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np

from onnxcomp.graph import Model
from onnxcomp.macs import count_macs
from onnxcomp.passes.candidate import Candidate, Decisions
from onnxcomp.passes.placement import Unit

__all__ = ["heads_in_float", "rescue", "tail_in_float"]

_RUNS = 6  # consecutive runs that are tried in each round of a rescue
_ROUNDS = 4
_WORTH = 0.3  # dB that an island has to bring

Build = Callable[[Decisions], Candidate]
Progress = Callable[[float, str], None]


def tail_in_float(best: Candidate, build: Build, model: Model, budget: float) -> Candidate:
    """Try the last weighted unit in float, if it holds at most the share `budget` of all multiplications."""
    units = [u for u in best.units if u.view is not None]
    costs = _shares(units, model)
    if len(units) < 2 or units[-1].node.op == "Conv" or costs[units[-1].key] > budget:
        return best
    tried = build(_with_float(best, [units[-1]]))
    return tried if tried.score >= best.score + _WORTH else best


def heads_in_float(best: Candidate, build: Build, model: Model, outputs: Collection[str], budget: float) -> Candidate:
    """Try in float what serves one of the named outputs alone, if it holds at most the share `budget` of all
    multiplications.
    """
    units = [u for u in best.units if u.view is not None]
    served = _served(model)
    heads = [u for u in units if len(served.get(u.key, ())) == 1 and served[u.key] <= set(outputs)]
    if not heads or len(heads) == len(units):
        return best
    costs = _shares(units, model)
    if sum(costs[u.key] for u in heads) > budget:
        return best
    tried = build(_with_float(best, heads))
    return tried if tried.score >= best.score else best


def _served(model: Model) -> dict[str, frozenset[str]]:
    """Names of the graph outputs that each value of the main graph leads to."""
    found: dict[str, frozenset[str]] = {o.name: frozenset({o.name}) for o in model.graph.outputs}
    for node in reversed(model.graph.nodes):
        reached = frozenset[str]().union(*(found.get(o.name, frozenset()) for o in node.outputs))
        for tensor in node.reads():
            found[tensor.name] = found.get(tensor.name, frozenset()) | reached
    return found


def rescue(best: Candidate, build: Build, max_drop: float, progress: Progress) -> Candidate:
    """Give back runs of units to float, the most helpful first, until the drop is at most `max_drop`.

    The result may hold no quantized unit; then nothing less helped.
    """
    for number in range(_ROUNDS):
        if best.drop <= max_drop:
            break
        units = [u for u in best.units if u.view is not None]
        if not units:
            break
        runs = [list(r) for r in np.array_split(np.array(units, dtype=object), min(_RUNS, len(units)))]
        tried = []
        for position, run in enumerate(runs):
            progress((number * len(runs) + position) / (_ROUNDS * len(runs)), "looking for layers to keep in float")
            tried.append(build(_with_float(best, run)))
        best = min(tried, key=lambda c: (max(c.drop, max_drop), -c.score))
    return best


def _with_float(best: Candidate, units: list[Unit]) -> Decisions:
    return replace(best.decisions, skip=best.decisions.skip | {u.key for u in units})


def _shares(units: list[Unit], model: Model) -> dict[str, float]:
    """Share of the multiplications of each weighted unit; 1 where they are not known."""
    counted = {node.outputs[0].name: macs for node, macs in count_macs(model).nodes.items()}
    total = sum(counted.get(u.key, 0) for u in units) or 1
    return {u.key: counted.get(u.key, total) / total for u in units}
