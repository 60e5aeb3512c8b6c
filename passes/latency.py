"""Groups of 8-bit units that are no faster than in float go back to float: time, as the target's profile tells it.

A group is what 8-bit values connect; its price are its kernels and the conversions at its borders, and what it has to
beat are the float kernels of the same nodes. Where a group as a whole pays, units at its border that do not are peeled
off. Profiles only propose (kernels run in another layout beside float neighbours): a proposal is kept if the whole
model is faster with it, in interleaved runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Model, producer
from onnxcomp.node_times import node_times
from onnxcomp.passes.candidate import Build, Candidate
from onnxcomp.passes.placement import Unit
from onnxcomp.runtime import Session, open_session

__all__ = ["drop_slow_groups", "speed_ratio"]

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
_ROUNDS = 8
_GAIN = 1.05  # times as fast as before that a proposal has to be: less may be the mood of the machine
_PROFILED = 9  # runs
_SESSIONS = 3  # pairs at most
_AGREE = 0.01  # difference of two pairs that need no third one
_PAIRS, _SECONDS = 7, 0.2  # of each session: at least, and at most once there are these


def drop_slow_groups(best: Candidate, build: Build, model: Model, feeds: Feeds, *, threads: int) -> Candidate:
    """`best`, or a faster candidate with fewer 8-bit units. At least one weighted unit stays.

    `model` is the float model, `feeds` one sample. Times are of this machine.
    """
    floats = _times(model, feeds, threads)
    for _ in range(_ROUNDS):
        slow = _slow(best, floats, feeds, threads)
        weighted = {u.key for u in best.units if u.view is not None}
        if not slow or weighted <= slow:
            break
        tried = build(replace(best.decisions, skip=best.decisions.skip | slow))
        if speed_ratio(best.model, tried.model, feeds, threads=threads) < _GAIN:
            break
        best = tried
    return best


def speed_ratio(old: Model, new: Model, feeds: Feeds, *, threads: int) -> float:
    """How many times as fast `new` is: the median over interleaved runs, and over pairs of sessions.

    Where memory happens to lie makes one session a few percent faster than its twin, as long as it lives.
    """
    found = []
    for number in range(_SESSIONS):
        a = open_session(old if number % 2 else new, threads=threads)
        b = open_session(new if number % 2 else old, threads=threads)
        ratio = _paired(a, b, feeds)
        found.append(ratio if number % 2 else 1 / ratio)
        if number and max(found) <= min(found) * (1 + _AGREE):
            break
    return float(np.median(found))


def _paired(a: Session, b: Session, feeds: Feeds) -> float:
    """How many times as fast `b` is."""
    for _ in range(3):
        a.run(feeds)
        b.run(feeds)
    ratios: list[float] = []
    begin = time.perf_counter()
    while len(ratios) < _PAIRS or time.perf_counter() - begin < _SECONDS:
        first, second = (a, b) if len(ratios) % 2 else (b, a)
        start = time.perf_counter()
        first.run(feeds)
        middle = time.perf_counter()
        second.run(feeds)
        times = (middle - start, time.perf_counter() - middle)
        ratios.append(times[0] / times[1] if first is a else times[1] / times[0])
    return float(np.median(ratios))


def _times(model: Model, feeds: Feeds, threads: int) -> dict[str, float]:
    """Microseconds of each node, by the name of its first output.

    What ONNX Runtime adds for its own layouts is spread over the convolutions, by their time: they ask for it.
    """
    times = node_times(model, feeds, threads=threads, runs=_PROFILED)
    found = {node.outputs[0].name: us for node, us in times.by_node.items()}
    asking = {n.outputs[0].name: us for n, us in times.by_node.items() if n.op == "Conv"}
    added, spent = times.total - sum(found.values()), sum(asking.values())
    return found | {name: us * (1 + added / max(spent, 1e-9)) for name, us in asking.items()}


def _slow(best: Candidate, floats: Mapping[str, float], feeds: Feeds, threads: int) -> set[str]:
    """Units of the groups that lose time; if there is no such group, units at the border of one that do."""
    ints = _times(best.model, feeds, threads)
    groups = _groups(best.units)
    losing = {u.key for group in groups for u in group if sum(_gain(u, floats, ints) for u in group) <= 0}
    if losing:
        return losing
    inside = {u.key for u in best.units}
    edge = [u for u in best.units if u.view is not None and _at_border(u, inside)]
    return {u.key for u in edge if _gain(u, floats, ints) < 0}


def _gain(unit: Unit, floats: Mapping[str, float], ints: Mapping[str, float]) -> float:
    """Microseconds that a unit saves, its share of the conversions taken off.

    A conversion into 8 bits counts for what reads it, one out of them for what computed the value; if two read the same
    value, ONNX Runtime still converts once.
    """
    own = [unit.node, unit.activation, unit.addend]
    before = sum(_time_before(n.outputs[0], floats) for n in own if n is not None)
    after = sum(ints.get(n.outputs[0].name, 0.0) for n in own if n is not None)
    for value in unit.node.inputs:
        dequantize = producer(value)
        quantize = None if dequantize is None else producer(dequantize.inputs[0])
        if dequantize is not None and quantize is not None and quantize.op == "QuantizeLinear":
            readers = max(len({n for d in quantize.outputs[0].outputs for n in d.outputs[0].outputs}), 1)
            after += ints.get(quantize.outputs[0].name, 0.0) / readers
    for quantize in unit.output.outputs:
        for dequantize in quantize.outputs[0].outputs if quantize.op == "QuantizeLinear" else ():
            after += ints.get(dequantize.outputs[0].name, 0.0)
    return before - after


def _time_before(value: Any, floats: Mapping[str, float]) -> float:
    """What its node took in the float model; the name of an output of the graph is that of its dequantized form now."""
    behind = [d.outputs[0].name for q in value.outputs for d in q.outputs[0].outputs]
    return next((floats[name] for name in [value.name, *behind] if name in floats), 0.0)


def _quantized_by(unit: Unit) -> list[Any]:
    """The codes that a unit reads."""
    found = []
    for value in unit.node.inputs:
        dequantize = producer(value)
        if dequantize is not None and dequantize.op == "DequantizeLinear" and dequantize.inputs[0].inputs:
            found.append(dequantize.inputs[0])
    return found


def _computed_by(unit: Unit) -> list[Any]:
    """The codes that a unit gives."""
    outputs = [unit.output, *unit.node.outputs]
    return [q.outputs[0] for o in outputs for q in o.outputs if q.op == "QuantizeLinear"]


def _groups(units: tuple[Unit, ...]) -> list[list[Unit]]:
    """Units connected by codes that they read or give."""
    group_of: dict[Any, list[Unit]] = {}
    found: list[list[Unit]] = []
    for unit in units:
        merged = [unit]
        for codes in dict.fromkeys([*_quantized_by(unit), *_computed_by(unit)]):
            other = group_of.get(codes)
            if other is not None and other is not merged:
                found.remove(other)
                merged = other + merged
            group_of[codes] = merged
            for known in merged:
                for value in [*_quantized_by(known), *_computed_by(known)]:
                    group_of[value] = merged
        found.append(merged)
    return found


def _at_border(unit: Unit, inside: set[str]) -> bool:
    """Whether a unit reads codes of a float value, or gives a value that is read as float."""
    sources = [producer(codes.inputs[0].inputs[0]) for codes in _quantized_by(unit)]
    fed = all(s is not None and any(o.name in inside for o in s.outputs) for s in sources)
    readers = [n for q in unit.output.outputs for d in q.outputs[0].outputs for n in d.outputs[0].outputs]
    return not fed or not readers or any(n.outputs[0].name not in inside for n in readers)
