"""Second-order rounding of all weights of a candidate: from decisions to decisions."""

from __future__ import annotations

from dataclasses import replace

from onnxcomp.calibration.range_errors import squared_error
from onnxcomp.passes.candidate import Decisions
from onnxcomp.passes.moments import Moments
from onnxcomp.passes.placement import Placement, Unit
from onnxcomp.passes.rounding import round_shared

__all__ = ["round_units"]


def round_units(plan: Placement, decisions: Decisions, seen: Moments, *, limit: int, noisy: bool) -> Decisions:
    """The decisions with weights (codes up to `limit`) and biases that keep the outputs of the units close.

    The scales are those of the weights in `decisions`. With `noisy`, weights are re-solved for inputs that rounding has
    made noisy; see `round_with`. A weight that several units share stays one.
    """
    weights, biases = dict(decisions.weights), dict(decisions.biases)
    for units in _sharing([u for u in plan.units if u.view is not None and u.key in seen.grams], decisions):
        first = units[0]
        assert first.view is not None
        inputs = [unit.node.inputs[0] for unit in units]
        errors = [squared_error(seen.statistics[t.name], decisions.chosen[plan.root(t).name]) for t in inputs]
        weight, shifts = round_shared(
            first.view,
            decisions.weights[first.key],
            [seen.grams[unit.key] for unit in units],
            centered=first.takes_bias,
            limit=limit,
            noise=sum(errors) / len(errors) if noisy else 0.0,
        )
        for unit, shift in zip(units, shifts, strict=True):
            weights[unit.key] = weight
            if unit.takes_bias:
                biases[unit.key] = biases[unit.key] + shift
    return replace(decisions, weights=weights, biases=biases)


def _sharing(units: list[Unit], decisions: Decisions) -> list[list[Unit]]:
    """Units in groups that have one weight in common: it stays one."""
    groups: dict[tuple[int, bool], list[Unit]] = {}
    for unit in units:
        groups.setdefault((id(decisions.weights[unit.key]), unit.takes_bias), []).append(unit)
    return list(groups.values())
