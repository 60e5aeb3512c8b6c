"""What a removal of channels was, as plain data for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnxcomp.graph import Constant
from onnxcomp.passes.dim_costs import Costs
from onnxcomp.passes.importance import Curve
from onnxcomp.passes.surgery import Cut

__all__ = ["plan_table", "prune_map"]


def plan_table(curves: Sequence[Curve], costs: Costs, removed: Sequence[int]) -> list[dict[str, Any]]:
    """One row per group: where it lies, its width in units, what is kept of it, predicted error, MACs saved alone."""
    none = [0] * len(curves)
    return [
        {
            "group": curve.group.name,
            "tensors": [{"name": tensor.name, "axis": axis} for tensor, axis in curve.group.axes],
            "width": curve.group.width,
            "kept": curve.group.width - count,
            "predicted_error": float(curve.errors[count]),
            "macs_saved": round(costs.gain("macs", none, g, count)),
            "importance": curve.method,
        }
        for g, (curve, count) in enumerate(zip(curves, removed, strict=True))
    ]


def prune_map(cut: Cut) -> list[dict[str, Any]]:
    """Kept original indices of every constant axis that lost some."""
    found: list[dict[str, Any]] = []
    for tensor in cut.coupling.offsets:
        if isinstance(tensor, Constant):
            found.extend(
                {"tensor": tensor.name, "axis": k, "kept": cut.keep(tensor, k).tolist()} for k in cut.axes(tensor)
            )
    return found
