"""Wider ranges where the outputs ask for them.

A range is chosen by the error of the value itself. What the outputs make of that error is another matter: the few large
values that a range cuts off may be the ones that a decision hangs on. So runs of consecutive values, those of one scale
together, get wider ranges as long as the outputs come closer.

Only wider ones are tried: where a range cuts off more, a few samples cannot show what is lost on others (measured: in
both directions 1.3 dB less on new samples for ESPCN, and no more than wider ones bring for the others).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.affine import QuantParameters
from onnxcomp.calibration.data import Dataset
from onnxcomp.calibration.statistics import TensorStatistics
from onnxcomp.graph import Model
from onnxcomp.passes.builder import CLEARLY
from onnxcomp.passes.candidate import Build, Candidate, Decisions
from onnxcomp.passes.judge import Judge
from onnxcomp.passes.placement import Placement

__all__ = ["asking", "cut_off", "redrawn", "with_wider_ranges"]

Array = npt.NDArray[Any]

_RUNS = 16  # of values that are tried together
_WIDER = 1.25  # times the scale, in each step
_GAIN = 0.1  # dB that a step has to bring
_SAMPLES = (32, 128)  # at least and at most that are asked each time
_WORK = 1.3e10  # multiplications that this may take, within these bounds
_REDRAWN = (1.005, 1.01, 1.02)  # times all scales


def asking(model: Model, data: Dataset, work: int, *, threads: int) -> Judge:
    """The judge of wider ranges, of so many samples of `data` as `work`, multiplications for each, allows."""
    return Judge(model, data, samples=int(np.clip(_WORK / max(work, 1), *_SAMPLES)), threads=threads)


def cut_off(best: Candidate, plan: Placement, statistics: Mapping[str, TensorStatistics]) -> list[list[str]]:
    """Values of which `best` cuts off something that `statistics` has seen, with all that share their scale, in the
    order of the graph.
    """
    groups: dict[tuple[float, bool], list[str]] = {}
    for name in dict.fromkeys(plan.root(t).name for t in plan.quantized):
        chosen = best.decisions.chosen[name]
        groups.setdefault((chosen.scale, chosen.signed), []).append(name)
    return [g for g in groups.values() if any(_clips(best.decisions.chosen[n], statistics[n]) for n in g)]


def with_wider_ranges(
    best: Candidate,
    plan: Placement,
    statistics: Mapping[str, TensorStatistics],
    build: Build,
    progress: Callable[[float, str], None],
) -> Candidate:
    """`best`, or the same with wider ranges of values that cut off something of what `statistics` has seen."""
    clipped = cut_off(best, plan, statistics)
    runs = np.array_split(np.arange(len(clipped)), min(_RUNS, len(clipped))) if clipped else []
    for number, run in enumerate(runs):
        progress(number / len(runs), "trying wider ranges")
        roots = {name for place in run for name in clipped[place]}
        names = {t.name for t in plan.quantized if plan.root(t).name in roots}
        while any(_clips(best.decisions.chosen[n], statistics[n]) for n in roots):
            tried = build(_widened(best.decisions, names, _WIDER))
            if tried.score < best.score + _GAIN:
                break
            best = tried
    return best


def redrawn(best: Candidate, names: Collection[str], build: Build) -> Iterator[Candidate]:
    """The same on slightly wider grids for the values in `names`: about as close to the float model, with other
    rounding errors.

    Where samples held out are content and a check on others is not, it is often one close call among a few samples,
    and layers in float would be a high price for another throw.
    """
    for factor in _REDRAWN:
        tried = build(_widened(best.decisions, names, factor))
        if tried.score >= best.score - 2 * CLEARLY:  # chance has chosen the best among its like
            yield tried


def _clips(chosen: QuantParameters, seen: TensorStatistics) -> bool:
    """By more than a step: the zero point alone moves the ends of a range by half a one."""
    return chosen.high + chosen.scale < seen.maximum or chosen.low - chosen.scale > seen.minimum


def _widened(decisions: Decisions, names: Collection[str], factor: float) -> Decisions:
    """With `factor` times the scale of the values in `names`. Zero points stay, so that both ends move away from 0."""
    wider = {}
    for name in names:
        old = decisions.chosen[name]
        wider[name] = replace(old, scale=float(np.float32(old.scale * factor)))
    return replace(decisions, chosen={**decisions.chosen, **wider})
