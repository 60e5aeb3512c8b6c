"""A quantized model built from decisions that are plain data, so that candidates can be made, judged, and changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.affine import QuantParameters
from onnxcomp.calibration.ranges import Method
from onnxcomp.graph import Model, sort
from onnxcomp.manager import Context
from onnxcomp.passes.cleanup import remove_dead
from onnxcomp.passes.layout import CPU, Layout
from onnxcomp.passes.placement import Placement, Unit
from onnxcomp.passes.qdq import QuantizedWeight, insert, quantize_weight
from onnxcomp.shapes import infer

__all__ = ["Build", "Candidate", "Decisions", "build", "first_decisions", "updated"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Decisions:
    """All that was decided, by name: `chosen` per value, `weights` and `biases` per unit (`Unit.key`).

    A bias is float64 per output channel; units that can take one always have one here, zeros if the model has none.
    """

    skip: frozenset[str]
    chosen: Mapping[str, QuantParameters]
    weights: Mapping[str, QuantizedWeight]
    biases: Mapping[str, Array]


@dataclass(frozen=True)
class Candidate:
    """A built model, its units (of this very model), and what judge.py says of it: its SQNR, the score in dB by which
    candidates are told apart, and its drop in quality.

    `ranges` is how its ranges were chosen, while that is being decided.
    """

    decisions: Decisions
    model: Model
    units: tuple[Unit, ...]
    sqnr: float = float("-inf")
    score: float = float("-inf")
    drop: float = float("inf")
    ranges: Method | None = None


Build = Callable[[Decisions], Candidate]  # what a search builds and judges candidates with


def first_decisions(
    plan: Placement, skip: frozenset[str], chosen: Mapping[str, QuantParameters], limit: int = 127
) -> Decisions:
    """Nearest rounding to codes up to `limit`, and the model's own biases."""
    weights: dict[str, QuantizedWeight] = {}
    biases: dict[str, Array] = {}
    shared: dict[tuple[int, float], QuantizedWeight] = {}
    for unit in plan.units:
        if unit.view is not None:
            key = (id(unit.view.weight), unit.view.alpha)
            weights[unit.key] = shared.setdefault(key, quantize_weight(unit.view, limit))
            if unit.takes_bias:
                biases[unit.key] = unit.bias_values()
    return Decisions(skip, chosen, weights, biases)


def updated(decisions: Decisions, later: Decisions) -> Decisions:
    """What was decided, and instead of it, where both say something of a value or unit, what was decided later."""
    return replace(
        decisions,
        chosen={**decisions.chosen, **later.chosen},
        weights={**decisions.weights, **later.weights},
        biases={**decisions.biases, **later.biases},
    )


def build(model: Model, decisions: Decisions, ops: tuple[str, ...], layout: Layout = CPU) -> Candidate:
    """The model with Q/DQ as decided, on a copy."""
    copy = model.copy()
    plan = layout.place(copy, copy.graph, infer(copy), Context(), keep_float=decisions.skip, ops=ops)
    chosen = {t: decisions.chosen[t.name] for t in map(plan.root, plan.quantized)}
    weights = {u.node: decisions.weights[u.key] for u in plan.units if u.view is not None}
    biases = {u.node: decisions.biases[u.key] for u in plan.units if _bias_matters(u, decisions)}
    insert(copy, copy.graph, plan, chosen, weights, biases, float_bias=layout.float_bias)
    sort(copy)
    remove_dead(copy, Context())
    return Candidate(decisions, copy, tuple(plan.units))


def _bias_matters(unit: Unit, decisions: Decisions) -> bool:
    """A bias of zeros is not written where there was none."""
    bias = decisions.biases.get(unit.key)
    return bias is not None and (unit.has_bias or bool(np.any(bias)))
