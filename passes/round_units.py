"""Second-order rounding of all weights of a candidate: from decisions to decisions."""

from __future__ import annotations

from dataclasses import replace

from onnxcomp.calibration.range_errors import squared_error
from onnxcomp.passes.candidate import Decisions
from onnxcomp.passes.moments import Moments
from onnxcomp.passes.placement import Placement, Unit
from onnxcomp.passes.rounding import round_shared

__all__ = ["round_units"]

_ROWS_PER_ENTRY = 4  # rows of inputs for each entry of a row from which their covariance is known well enough


def round_units(plan: Placement, decisions: Decisions, seen: Moments, *, limit: int, noisy: bool) -> Decisions:
    """The decisions with weights (codes up to `limit`) and biases that keep the outputs of the units close.

    The scales are those of the weights in `decisions`. With `noisy`, weights are re-solved for inputs that rounding has
    made noisy; see `round_with`. That takes rows enough to know all directions of the inputs: weights lose what belongs
    to those that the samples hardly show. A weight that several units share stays one.
    """
    weights, biases = dict(decisions.weights), dict(decisions.biases)
    for units in _sharing([u for u in plan.units if u.view is not None and u.key in seen.grams], decisions):
        first, grams = units[0], [seen.grams[unit.key] for unit in units]
        assert first.view is not None
        known = sum(gram.rows for gram in grams) >= _ROWS_PER_ENTRY * grams[0].length
        inputs = [unit.node.inputs[0] for unit in units]
        errors = [squared_error(seen.statistics[t.name], decisions.chosen[plan.root(t).name]) for t in inputs]
        weight, shifts = round_shared(
            first.view,
            decisions.weights[first.key],
            grams,
            centered=first.takes_bias,
            limit=limit,
            noise=sum(errors) / len(errors) if noisy and known else 0.0,
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
