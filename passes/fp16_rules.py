"""Which nodes may compute in float16: by operator, by the constants they read, and by the values that were seen.

float16 has 11 bits of precision, the largest value 65504 and the smallest 2^-24. A node stays in float32 where the
specification does not allow float16, where a sum over many values or an exponential leaves that range, where a weight
does, and where calibration saw values that do. Element-wise nodes between such nodes stay as well: a conversion costs
more than they do, and what ONNX Runtime fuses (layer normalization in pieces) stays in one piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxcomp.calibration.statistics import TensorStatistics
from onnxcomp.graph import Graph, Model, Node, producer
from onnxcomp.shapes import Shapes

__all__ = ["LARGEST", "Refused", "half_positions", "refused_by_ranges", "refused_by_rules", "spread"]

Array = npt.NDArray[Any]
Refused = dict[Node, str]
LARGEST = 65504.0
_FLOAT = onnx.TensorProto.FLOAT
# Sums of squares and of many values, and what grows or shrinks exponentially.
_WIDE = frozenset(
    "Exp Log Pow Softplus CumSum ReduceMean ReduceSum ReduceSumSquare ReduceProd ReduceL1 ReduceL2 ReduceLogSum "
    "ReduceLogSumExp LpNormalization MeanVarianceNormalization GlobalLpPool LpPool".split()
)
# Positions, indices and scores whose order decides; random values; operators whose type is an attribute.
_DECIDING = frozenset(
    "Cast CastLike ConstantOfShape EyeLike NonMaxSuppression Range TopK RoiAlign MaxRoiPool ArgMax ArgMin GridSample "
    "Multinomial Bernoulli RandomNormal RandomNormalLike RandomUniform RandomUniformLike QuantizeLinear "
    "DequantizeLinear DynamicQuantizeLinear Constant Unique STFT DFT MelWeightMatrix".split()
)
_ELEMENTWISE = frozenset(
    "Abs Add Clip Div Elu Erf Gelu HardSigmoid HardSwish LeakyRelu Max Min Mul Neg PRelu Reciprocal Relu Sigmoid "
    "Softsign Sqrt Sub Tanh Where".split()
)
# Constants of these can be clamped: a mask of -1e9 does the same work as one of -65504.
_CLAMPS = frozenset({"Add", "Where", "Clip", "Max", "Min", "Pad", "Sub"})
_LOST = 1e-4  # share of the power of a tensor that float16 may lose; rounding alone costs 1e-7
_VANISHING = 0.5  # share of the values other than zero that may become zero
_MARGIN = 0.5  # of the range: other data reach further than those of the calibration


def half_positions(node: Node, version: int) -> tuple[list[int], list[int]] | None:
    """Positions of the inputs and outputs that may be float16 instead of float32; None for an unknown operator."""
    try:
        schema = onnx.defs.get_schema(node.op, version, node.domain or "")
    except onnx.defs.SchemaError:
        return None
    both = {"tensor(float)", "tensor(float16)"}
    free = {c.type_param_str for c in schema.type_constraints if both <= set(c.allowed_type_strs)}

    def positions(formal: Any, count: int) -> list[int]:
        return [i for i in range(count) if formal and formal[min(i, len(formal) - 1)].type_str in free]

    return positions(schema.inputs, len(node.inputs)), positions(schema.outputs, len(node.outputs))


def refused_by_rules(model: Model, scope: Graph, shapes: Shapes, version: int) -> Refused:
    """Nodes of a scope with float32 values that have to stay, each with the reason. What has none is not named."""
    found: Refused = {}
    for node in scope.nodes:
        if not any(shapes[t].elem == _FLOAT for t in [*node.inputs, *node.outputs] if t.name):
            continue
        reason = _by_operator(node, version) or _by_constants(model, node, version)
        if reason is not None:
            found[node] = reason
    return found


def _by_operator(node: Node, version: int) -> str | None:
    positions = half_positions(node, version)
    if positions is None or node.bodies():
        return "no float16 form of it is known"
    if node.op in _DECIDING or not any(positions):
        return "float16 would change what it decides, or it has no such form"
    if node.op in _WIDE:
        return "its sums or exponents leave the range of float16"
    if any(p.op == "DequantizeLinear" for t in node.inputs for p in t.inputs):
        return "it runs on 8-bit values"
    return None


def _by_constants(model: Model, node: Node, version: int) -> str | None:
    positions = half_positions(node, version)
    for i in positions[0] if positions is not None else []:
        weight = model.weight(node.inputs[i]) if node.inputs[i].name else None
        if weight is None or weight.data_type != _FLOAT:
            continue
        values = weight.load()
        finite = values[np.isfinite(values)]
        if finite.size and float(np.abs(finite).max()) > LARGEST:
            if node.op not in _CLAMPS:
                return "a weight is above 65504"
            finite = np.clip(finite, -LARGEST, LARGEST)
        if _lost(finite.astype(np.float64), np.ones(finite.size)) > _LOST:
            return "a weight is too small for float16"
    return None


def refused_by_ranges(scope: Graph, seen: Mapping[str, TensorStatistics]) -> Refused:
    """Nodes that read or compute a value which, on the calibration data, leaves the range of float16."""
    bad: dict[str, str] = {}
    for name, statistics in seen.items():
        if not statistics.count:
            continue
        peak = max(-statistics.minimum, statistics.maximum)
        values, counts = statistics.histogram.bins()
        present = values != 0
        if peak > _MARGIN * LARGEST:
            bad[name] = f"its values reach {peak:.3g}"
        elif present.any() and (
            _lost(values, counts) > _LOST or _vanishing(values[present], counts[present]) > _VANISHING
        ):
            bad[name] = "its values vanish in float16"
    return {
        node: next(bad[t.name] for t in [*node.outputs, *node.inputs] if t.name in bad)
        for node in scope.nodes
        if any(t.name in bad for t in [*node.outputs, *node.inputs])
    }


def _lost(values: Array, counts: Array) -> float:
    """Share of the power that conversion to float16 loses."""
    power = float((counts * np.square(values)).sum())
    with np.errstate(over="ignore"):
        kept = values.astype(np.float16).astype(np.float64)
    return float((counts * np.square(values - kept)).sum()) / power if power > 0 else 0.0


def _vanishing(values: Array, counts: Array) -> float:
    """Share of values (other than zero) that become zero."""
    return float(counts[values.astype(np.float16) == 0].sum() / counts.sum())


def spread(scope: Graph, refused: Refused, shapes: Shapes) -> Refused:
    """`refused`, and the element-wise nodes that lie between refused ones or read nothing else."""
    found = dict(refused)
    reason = "it stands between nodes that stay in float32"
    for node in scope.nodes:
        if node in found or node.domain or node.op not in _ELEMENTWISE:
            continue
        sources = [producer(t) for t in node.inputs if shapes[t].elem == _FLOAT and t.inputs]
        behind = [s in found for s in sources if s is not None and s.op != "Constant"]
        ahead = any(reader in found and reader.op in _WIDE for t in node.outputs for reader in t.outputs)
        if behind and (all(behind) or (any(behind) and ahead)):
            found[node] = reason
    return found
