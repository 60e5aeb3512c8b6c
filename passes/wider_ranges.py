"""Wider ranges where the outputs ask for them.

A range is chosen by the error of the value itself. What the outputs make of that error is another matter: the few large
values that a range cuts off may be the ones that a decision hangs on. So runs of consecutive values, those of one scale
together, get wider ranges as long as the outputs come closer.

Only wider ones are tried: where a range cuts off more, a few samples cannot show what is lost on others (measured: in
both directions 1.3 dB less on new samples for ESPCN, and no more than wider ones bring for the others).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np

from onnxcomp.calibration.affine import QuantParameters
from onnxcomp.calibration.statistics import TensorStatistics
from onnxcomp.passes.candidate import Candidate, Decisions
from onnxcomp.passes.placement import Placement

__all__ = ["widened", "with_wider_ranges"]

_RUNS = 16  # of values that are tried together
_WIDER = 1.25  # times the scale, in each step
_GAIN = 0.1  # dB that a step has to bring


def with_wider_ranges(
    best: Candidate,
    plan: Placement,
    statistics: Mapping[str, TensorStatistics],
    build: Callable[[Decisions], Candidate],
    progress: Callable[[float, str], None],
) -> Candidate:
    """`best`, or the same with wider ranges of values that cut off something of what `statistics` has seen."""
    groups: dict[tuple[float, bool], list[str]] = {}  # in the order of the graph
    for name in dict.fromkeys(plan.root(t).name for t in plan.quantized):
        chosen = best.decisions.chosen[name]
        groups.setdefault((chosen.scale, chosen.signed), []).append(name)
    clipped = [g for g in groups.values() if any(_clips(best.decisions.chosen[n], statistics[n]) for n in g)]
    runs = np.array_split(np.arange(len(clipped)), min(_RUNS, len(clipped))) if clipped else []
    for number, run in enumerate(runs):
        progress(number / len(runs), "trying wider ranges")
        roots = {name for place in run for name in clipped[place]}
        names = {t.name for t in plan.quantized if plan.root(t).name in roots}
        while any(_clips(best.decisions.chosen[n], statistics[n]) for n in roots):
            tried = build(widened(best.decisions, names, _WIDER))
            if tried.score < best.score + _GAIN:
                break
            best = tried
    return best


def _clips(chosen: QuantParameters, seen: TensorStatistics) -> bool:
    return chosen.high < seen.maximum or chosen.low > seen.minimum


def widened(decisions: Decisions, names: Collection[str], factor: float) -> Decisions:
    """With `factor` times the scale of the values in `names`. Zero points stay, so that both ends move away from 0."""
    wider = {}
    for name in names:
        old = decisions.chosen[name]
        wider[name] = replace(old, scale=float(np.float32(old.scale * factor)))
    return replace(decisions, chosen={**decisions.chosen, **wider})
