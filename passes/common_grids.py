"""Common grids: values that meet in an addition share one scale, so that their sum needs no rounding.

The kernel gives q = round((s_a (a - z_a) + s_b (b - z_b)) / s) + z. With s_a = s_b = s that is a whole number before it
is rounded: the output carries the errors of its inputs and clipping, but no error of its own (s^2 / 12 otherwise). The
same holds for the positive values of LeakyRelu and PRelu, if they keep the scale of their input.

A shared scale is too coarse for some of its values, so it has to be worth it: groups of values are merged along the
additions while the sum of expected errors falls,

    cost(group) = min over s of sum_v e_v(s),   e_v = clipping error of sums whose inputs are all in the group,
                                                      rounding and clipping error of the others,

each value with the best zero point for s. All comes from the histograms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.affine import QuantParameters
from onnxcomp.calibration.range_errors import Function, RangeErrors, clipping_errors
from onnxcomp.calibration.statistics import TensorStatistics
from onnxcomp.graph import producer
from onnxcomp.passes.placement import MOVES, Placement
from onnxcomp.passes.read_through import read_through, slope_of

__all__ = ["on_common_grids"]

Array = npt.NDArray[Any]
_STEP = 1.03  # from one scale that is tried to the next
_SPAN = 1e-4  # the smallest scale that is tried, of the largest
_REACH = 2.0  # how far beyond the scales chosen so far
_ENDS = 7  # zero points tried for a scale, from one end covered to the other
_ROUNDS = 3
_LAST = 255


@dataclass(frozen=True)
class _Link:
    """A value whose rounding is saved if it has the scale of `sources`; `leaky`: that of its positive part."""

    sources: tuple[str, ...]
    result: str
    leaky: bool

    @property
    def names(self) -> frozenset[str]:
        return frozenset({*self.sources, self.result})


@dataclass(frozen=True)
class _Curve:
    """Errors of a value at each scale, with the zero point of the least: [scales] each."""

    errors: Array
    zero_points: Array


def on_common_grids(
    plan: Placement,
    chosen: Mapping[str, QuantParameters],
    statistics: Mapping[str, TensorStatistics],
    entry: float = 1.0,
) -> dict[str, QuantParameters] | None:
    """The parameters with those of values that gain from it on common grids; None if there are none.

    `entry` weighs the errors of values that enter a chain of sums and are read by others too: all that follows has
    them.
    """
    links = [k for k in _links(plan) if k.names <= statistics.keys() and len(k.names) == len(k.sources) + 1]
    if not links:
        return None
    names = {name for link in links for name in link.names}
    scales = [chosen[name].scale for name in names]
    least = max(min(scales), max(scales) * _SPAN)  # a value that is always zero has a scale of nothing
    steps = np.log(max(scales) / least * _REACH**2) / np.log(_STEP)
    tried = np.geomspace(least / _REACH, max(scales) * _REACH, int(steps) + 2).astype(np.float32)
    made = {link.result for link in links}
    entries = {t.name for t in plan.quantized if len(t.outputs) > 1 and t.name not in made}
    costs = _Costs(links, statistics, read_through(plan), tried.astype(np.float64), dict.fromkeys(entries, entry))
    groups = {name: frozenset({name}) for name in names}
    for _ in range(_ROUNDS):
        merged = [_merge(link, groups, costs) for link in links]
        if not any(merged):
            break
    found = dict(chosen)
    for group in set(groups.values()):
        if len(group) > 1:
            found |= costs.parameters(group)
    return found if found != chosen else None


def _merge(link: _Link, groups: dict[str, frozenset[str]], costs: _Costs) -> bool:
    """Put the values of a link into one group if that costs less."""
    parts = {groups[name] for name in link.names}
    merged = frozenset().union(*parts)
    if len(parts) == 1 or costs.least(merged)[0] >= sum(costs.least(part)[0] for part in parts):
        return False
    groups.update(dict.fromkeys(merged, merged))
    return True


class _Costs:
    """What groups of values cost at each of the scales."""

    def __init__(
        self,
        links: list[_Link],
        statistics: Mapping[str, TensorStatistics],
        functions: Mapping[str, Function],
        scales: Array,
        weights: Mapping[str, float],
    ) -> None:
        self._made_by = {link.result: link for link in links}
        self._statistics = statistics
        self._functions = functions
        self._scales = scales
        self._weights = weights
        self._curves: dict[tuple[str, bool], _Curve] = {}

    def least(self, group: frozenset[str]) -> tuple[float, int]:
        """The least cost, and the position of the scale that has it."""
        total = np.sum([self._curve(name, group).errors for name in sorted(group)], axis=0)
        best = int(total.argmin())
        return float(total[best]), best

    def parameters(self, group: frozenset[str]) -> dict[str, QuantParameters]:
        best = self.least(group)[1]
        scale = float(self._scales[best])
        return {name: QuantParameters(scale, int(self._curve(name, group).zero_points[best])) for name in group}

    def _curve(self, name: str, group: frozenset[str]) -> _Curve:
        link = self._made_by.get(name)
        exact = link is not None and link.names <= group
        if (name, exact) not in self._curves:
            self._curves[name, exact] = self._errors(name, link if exact else None)
        return self._curves[name, exact]

    def _errors(self, name: str, link: _Link | None) -> _Curve:
        seen, scales = self._statistics[name], self._scales
        low, high = min(seen.minimum, 0.0), max(seen.maximum, 0.0)
        ends = np.linspace(-low / scales, _LAST - high / scales, _ENDS)  # [zero points, scales]
        zero_points = np.clip(np.rint(ends), 0, _LAST)
        if low == 0:
            zero_points[:] = 0  # a Relu is absorbed only so
        lows, highs = (-zero_points * scales).reshape(-1), ((_LAST - zero_points) * scales).reshape(-1)
        if link is None:
            errors = RangeErrors(seen, through=self._functions.get(name))(lows, highs)
        else:
            errors = clipping_errors(seen, lows, highs)
            if link.leaky:
                errors = errors + RangeErrors(seen, negative_only=True)(lows, highs)
        errors = errors.reshape(zero_points.shape)
        best = errors.argmin(axis=0), np.arange(len(scales))
        return _Curve(errors[best] * self._weights.get(name, 1.0), zero_points[best])


def _links(plan: Placement) -> Iterator[_Link]:
    for unit in plan.units:
        if unit.node.op == "Add" and unit.view is None:
            yield _Link(tuple(plan.root(t).name for t in unit.node.inputs), plan.root(unit.output).name, leaky=False)
    for value in plan.quantized:
        source = _leaky_source(plan, value) if plan.root(value) is value else None
        if source is not None:
            yield _Link((plan.root(source).name,), value.name, leaky=True)


def _leaky_source(plan: Placement, value: Any) -> Any:
    """The 8-bit value that comes to `value` through a LeakyRelu or PRelu, and operators that move values."""
    node, leaky = producer(value), False
    while node is not None and not node.domain and (node.op in MOVES or slope_of(node) is not None):
        leaky = leaky or node.op not in MOVES
        value = node.inputs[0]
        if value in plan.quantized:
            return value if leaky else None
        node = producer(value)
    return None
