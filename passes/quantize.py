"""quantize: static int8 with calibration data, laid out for the kernels of ONNX Runtime's CPU provider.

Activations are u8 with zero point (ranges from one histogram per value), weights s8 per output channel, biases int32
with scale s_x s_w[c]. Which values become 8-bit is decided in placement.py, the graph is written by qdq.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.ranges import Method, QuantParameters, choose
from onnxcomp.calibration.runner import collect
from onnxcomp.calibration.statistics import TensorStatistics
from onnxcomp.errors import UsageError
from onnxcomp.graph import Graph, Model, Node, sort
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.passes.cleanup import remove_dead
from onnxcomp.passes.placement import Placement, Unit, place
from onnxcomp.passes.qdq import QuantizedWeight, insert, quantize_weight
from onnxcomp.shapes import infer

__all__ = ["Quantize"]

Array = npt.NDArray[Any]
_MIN_OPSET = 13  # DequantizeLinear with a scale per channel


@dataclass(frozen=True)
class Quantize(Pass):
    """Static int8 quantization.

    `ranges` chooses activation ranges (minmax, percentile, mse, entropy); `ops` the operators to quantize; `skip`
    names nodes that stay in float; `samples` limits the calibration samples.
    """

    name: ClassVar[str] = "quantize"
    effect: ClassVar[Effect] = "lossy"
    after: ClassVar[tuple[str, ...]] = ("cleanup", "fold-constants", "fuse", "equalize", "prune-channels")
    needs_data: ClassVar[bool] = True

    ranges: Method = "mse"
    ops: tuple[str, ...] = ("Conv", "Gemm", "MatMul")
    skip: tuple[str, ...] = ()
    samples: int | None = None

    def run(self, model: Model, ctx: Context) -> Mapping[str, Any]:
        if ctx.data is None:
            raise UsageError("pass 'quantize' needs calibration data; give them with --calib")
        if model.opset < _MIN_OPSET:
            from onnxcomp.opset import upgrade

            upgrade(model, _MIN_OPSET)
        scope = model.graph
        plan = place(model, scope, infer(model), ctx, keep_float=self.skip, ops=self.ops)
        plan = _allowed(plan, ctx)
        if not any(u.view is not None for u in plan.units):
            return {"quantized": 0}
        statistics = collect(
            model,
            ctx.data,
            {plan.root(t).name: None for t in plan.quantized},
            samples=self.samples,
            threads=ctx.threads,
            memory=ctx.memory,
            progress=ctx.progress,
        )
        chosen = choose_parameters(plan, statistics, self.ranges)
        weights, biases = _round_weights(plan, chosen)
        insert(model, scope, plan, chosen, weights, biases)
        sort(model)
        remove_dead(model, Context())
        return {
            "quantized": sum(u.view is not None for u in plan.units),
            "activations": len(plan.quantized),
            "ranges": self.ranges,
        }


def _allowed(plan: Placement, ctx: Context) -> Placement:
    """Ask for each weighted unit; what is not allowed takes everything that came along with it back to float."""
    refused = {u.node for u in plan.units if u.view is not None and not ctx.allow(f"{u.label} to int8")}
    if not refused:
        return plan
    units = [u for u in plan.units if u.node not in refused]
    kept = Placement(units, {}, plan.same)
    for unit in units:
        for tensor in (*unit.node.inputs[: 1 if unit.view is not None else None], unit.output):
            if tensor in plan.quantized and (tensor is not unit.output or unit.quantized_output):
                kept.quantized.setdefault(tensor)
    return kept


def choose_parameters(
    plan: Placement, statistics: Mapping[str, TensorStatistics], method: Method
) -> dict[Any, QuantParameters]:
    """Scale and zero point of each value that decides its own.

    The range of an absorbed Clip(0, b) may not exceed b, or ONNX Runtime keeps the Clip.
    """
    chosen: dict[Any, QuantParameters] = {}
    for tensor in plan.quantized:
        root = plan.root(tensor)
        if root not in chosen:
            chosen[root] = choose(statistics[root.name], method)
    return chosen


def _round_weights(
    plan: Placement, chosen: Mapping[Any, QuantParameters]
) -> tuple[dict[Node, QuantizedWeight], dict[Node, Array]]:
    """Codes of each unit's weight (the same object for a shared weight), and its bias."""
    weights: dict[Node, QuantizedWeight] = {}
    biases: dict[Node, Array] = {}
    shared: dict[tuple[int, float], QuantizedWeight] = {}
    for unit in plan.units:
        if unit.view is None:
            continue
        key = (id(unit.view.weight), unit.view.alpha)
        weights[unit.node] = shared.setdefault(key, quantize_weight(unit.view))
        if unit.view.bias is not None:
            biases[unit.node] = unit.view.bias_values()
    return weights, biases
