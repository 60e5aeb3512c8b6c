"""Float islands: units that stay in float because their rounding costs more than their time is worth.

Four uses. The first layer holds few of the multiplications, reads float values anyway, and all others pass on what
rounding does to its input: in float it costs ResNet-20 2 % of its time and brings 1 dB. The classifier at the end holds
few as well and its output is float anyway (its weight keeps its int8 form in the file only if it is quantized). So may
the branch of an output that hardly any calibration sample has a signal in, such as a detector's confidence: the ranges
seen there tell little about those to come, and what they cut off is what the output is about. And where rounding breaks
the budget, the runs of consecutive units whose return to float helps most for their work go back, until the quality is
within the budget; whole runs, because each border between int8 and float costs a conversion.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxcomp.graph import Model
from onnxcomp.passes.candidate import Build, Candidate, Decisions
from onnxcomp.passes.placement import Unit

__all__ = ["Finish", "Price", "first_in_float", "heads_in_float", "rescue", "tail_in_float"]

_RUNS = 8  # consecutive runs of units that a rescue gives back as wholes
_LITTLE = 0.02  # share of the multiplications that is left in float unasked
_ROUNDS = 4
_ABREAST = 4  # units that no other comes before, at most; more are the branches of a model without a beginning
_WORTH = 0.3  # dB that an island has to bring
_PER_PERCENT = 0.2  # dB that it has to bring in addition for each percent of the run time
_LOSS = 1.0  # dB that an island may cost where it saves time
_MOST = 3.0  # percent of the run time that islands for a little more accuracy may take together

Finish = Callable[[Candidate], Candidate]
Tried = Callable[[list[list[Unit]]], Candidate | None]
Progress = Callable[[float, str], None]
Enough = Callable[[Candidate], bool]
Slowdown = Callable[[Candidate, Candidate], float]


@dataclass
class Price:
    """What units cost in float: a share of the multiplications, whose number `work` has by unit, at most `budget`; or,
    with `slowdown`, the run time of the second of two candidates relative to the first, as measured. `spent` percent of
    it are used up.
    """

    work: Mapping[str, int]
    budget: float
    slowdown: Slowdown | None = None
    spent: float = 0.0

    def affordable(self, best: Candidate, unit: Unit) -> bool:
        """Whether a unit of `best` may stay in float as far as that is known without a measurement."""
        return self.slowdown is not None or _shares(_weighted(best), self.work)[unit.key] <= self.budget

    def buys(self, old: Candidate, new: Candidate) -> bool:
        """Whether `new` is so much closer that it may take so much longer, or so much faster for what it loses.

        If so, the time is spent.
        """
        gain = new.score - old.score
        if self.slowdown is None or gain < -_LOSS:
            return gain >= _WORTH
        percent = 100 * (self.slowdown(old, new) - 1)
        if self.spent + percent > _MOST or gain < _WORTH + _PER_PERCENT * percent:
            return False
        self.spent += max(percent, 0.0)
        return True


def first_in_float(best: Candidate, build: Build, price: Price) -> Candidate:
    """Try in float, one by one, the units that no other comes before, as long as all of them are worth their price.

    They read float values anyway, mostly the model's inputs, and all layers pass on what rounding does to those. After
    one that stays in float come those that it fed.
    """
    start = best
    for _ in range(_ROUNDS):
        tried = [build(_with_float(best, [u])) for u in _first(best)[:_ABREAST] if price.affordable(start, u)]
        better = max(tried, key=lambda c: c.score, default=best)
        if better is best or not _weighted(better) or not price.buys(best, better):
            break
        best = better
    return best


def tail_in_float(best: Candidate, build: Build, price: Price) -> Candidate:
    """Try the last weighted unit in float."""
    weighted = _weighted(best)
    last = weighted[-1] if len(weighted) > 1 else None
    if last is None or not price.affordable(best, last) or (price.slowdown is None and last.node.op == "Conv"):
        return best
    tried = build(_with_float(best, [last]))
    return tried if price.buys(best, tried) else best


def _weighted(candidate: Candidate) -> list[Unit]:
    return [u for u in candidate.units if u.view is not None]


def _first(candidate: Candidate) -> list[Unit]:
    """Weighted units that read nothing that another one computed."""
    own = {u.node: u for u in _weighted(candidate)}
    behind: set[Any] = set()
    found = []
    for node in candidate.model.graph.nodes:
        reached = any(t in behind for t in node.reads())
        if node in own and not reached:
            found.append(own[node])
        if node in own or reached:
            behind.update(node.outputs)
    return found


def heads_in_float(
    best: Candidate,
    build: Build,
    model: Model,
    work: Mapping[str, int],
    outputs: Collection[str],
    budget: float,
) -> Candidate:
    """Try in float what serves one of the named outputs alone, if it holds at most the share `budget` of all
    multiplications.
    """
    units = _weighted(best)
    served = _served(model)
    heads = [u for u in units if len(served.get(u.key, ())) == 1 and served[u.key] <= set(outputs)]
    if not heads or len(heads) == len(units):
        return best
    costs = _shares(units, work)
    if _total(heads, costs) > budget:
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


def rescue(
    best: Candidate,
    build: Build,
    finish: Finish,
    work: Mapping[str, int],
    enough: Enough,
    progress: Progress,
    others: Iterable[Candidate] = (),
) -> Candidate:
    """Give back runs of units to float until the finished candidate is good enough; what brings most for its work comes
    first.

    What a run brings is the noise that goes with it; the drop in quality of the samples at hand is a matter of chance
    where a few of them make it. The noise of several runs adds up, nearly, so that one round of trials is an order for
    all of them, and bisection from the small end finds how many it takes. What of these turns out to be too much, the
    most work first, is quantized again. The result may hold no quantized unit; then no run and no half of one was good
    enough in 8 bits. `finish` is what follows from the choice of units and is wrong for another: corrected biases.
    `others` are asked before that: candidates that are as good in 8 bits.
    """
    units = _weighted(best)
    for start in itertools.chain([best], others):
        done = finish(start)
        if enough(done) or not units:
            return done
    runs = [list(r) for r in np.array_split(np.array(units, dtype=object), min(_RUNS, len(units)))]
    shares, brings = _shares(units, work), []
    for number, run in enumerate(runs):
        progress(number / len(runs), "looking for layers to keep in float")
        brings.append(_relief(best, build(_with_float(best, run))) / max(_total(run, shares), 1e-6))
    ordered = [runs[k] for k in np.argsort(-np.array(brings), kind="stable")]

    def tried(given: list[list[Unit]]) -> Candidate | None:
        candidate = finish(build(_with_float(best, [u for run in given for u in run])))
        return candidate if enough(candidate) else None

    found, low, high = None, 0, len(ordered)
    while high - low > 1:
        middle = min(max(2 * low, 1), (low + high) // 2)
        progress(middle / len(ordered), "giving layers back to float")
        candidate = tried(ordered[:middle])
        found, low, high = (found, middle, high) if candidate is None else (candidate, low, middle)
    if found is None:
        found = build(_with_float(best, units))
    return _with_less(found, ordered[:high], shares, tried)


def _with_less(found: Candidate, given: list[list[Unit]], shares: dict[str, float], tried: Tried) -> Candidate:
    """`found`, which has the units of `given` in float, or what is good enough with fewer of these runs, or halves.

    The last one was needed.
    """
    last = given[-1]
    for run in sorted(given, key=lambda run: _total(run, shares), reverse=True):
        half = len(run) // 2
        ways = [kept for kept in ([], run[:half], run[half:]) if (kept or run is not last) and len(kept) < len(run)]
        for kept in ways:
            less = [r if r is not run else kept for r in given]
            if _total(run, shares) - _total(kept, shares) < _LITTLE or not any(less):
                continue
            if (candidate := tried(less)) is not None:
                found, given = candidate, less
                break
    return found


def _relief(before: Candidate, after: Candidate) -> float:
    """Share of the noise that is gone."""
    old, new = (10 ** (-np.clip(c.score, -200, 200) / 10) for c in (before, after))
    return float(1 - new / old)


def _with_float(best: Candidate, units: list[Unit]) -> Decisions:
    return replace(best.decisions, skip=best.decisions.skip | {u.key for u in units})


def _shares(units: list[Unit], work: Mapping[str, int]) -> dict[str, float]:
    """Share of the multiplications of each weighted unit; 1 where they are not known."""
    total = sum(work.get(u.key, 0) for u in units) or 1
    return {u.key: work.get(u.key, total) / total for u in units}


def _total(units: list[Unit], shares: dict[str, float]) -> float:
    return sum(shares[u.key] for u in units)
