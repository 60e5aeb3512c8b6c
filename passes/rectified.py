"""What a rectified sum takes from its terms: y = max(0, a + b) = max(0, max(a, -b) + b).

Where a < -b the value of a does not matter, as long as it stays below -b. So a range for a has to cover max(a, -b)
only: its negative end is often far from where that of a is, and the step of 8 bits smaller.
"""

from __future__ import annotations

from typing import Any

from onnxcomp.graph import Model, sort
from onnxcomp.passes.placement import Placement

__all__ = ["with_effective_terms"]


def with_effective_terms(model: Model, plan: Placement) -> tuple[Model, dict[str, str]]:
    """A copy that computes max(a, -b) too, and its name for each such term a that nothing but its sum reads."""
    terms = [
        (term.name, other.name)
        for unit in plan.units
        if unit.node.op == "Add" and unit.view is None and unit.activation is not None
        for term, other in (unit.node.inputs, unit.node.inputs[::-1])
        if len(term.outputs) == 1 and plan.root(term) is term and term not in model.outputs()
    ]
    if not terms:
        return model, {}
    copy = model.copy()
    values: dict[str, Any] = {t.name: t for n in copy.graph.nodes for t in (*n.inputs, *n.outputs)}
    found = {}
    for term, other in terms:
        negative, effective = copy.variable(f"{other}_negative"), copy.variable(f"{term}_effective")
        copy.graph.add("Neg", [values[other]], [negative])
        copy.graph.add("Max", [values[term], negative], [effective])
        found[term] = effective.name
    sort(copy)
    return copy, found
