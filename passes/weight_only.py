"""Weight-only int8: the file is a quarter, the arithmetic stays float.

A weight W becomes int8 codes and one scale per channel; the graph rebuilds it with two standard nodes,

    W ~ Cast(codes) * scale[c]

which ONNX Runtime computes once when it loads the model (constant folding), so a run costs what it cost before.
A DequantizeLinear in their place would not be folded: ONNX Runtime keeps it for its own fusions and runs it every time.
Embedding tables and other weights that are not multiplied are rebuilt in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.gram import Gram
from onnxcomp.graph import Constant, Graph, Model
from onnxcomp.linear import linear
from onnxcomp.passes.input_moments import Moments, round_rows
from onnxcomp.passes.qdq import QuantizedWeight, output_channel_axis
from onnxcomp.passes.rounding import round_with

__all__ = ["compress_weights", "rebuild"]

Array = npt.NDArray[Any]
_MIN_BYTES = 1024  # below, two nodes and a scale take more room than they save


@dataclass(frozen=True)
class _Site:
    scope: Graph
    constant: Constant
    axis: int


def compress_weights(
    model: Model,
    allow: Callable[[str], bool],
    grams: Mapping[str, Gram] | None = None,
    recurrent: Moments | None = None,
) -> int:
    """Store the float weights of all scopes as int8 codes, in place, the largest first; returns how many.

    `grams` has second moments of inputs by the name of the first output of a node, `recurrent` those of recurrent
    layers by the name of the weight: such weights are rounded so that outputs stay close, others to the nearest code.
    """
    count = 0
    for site in _sites(model):
        codes = _round(site.constant.values, site.axis)
        readers = site.constant.outputs
        gram = (grams or {}).get(readers[0].outputs[0].name) if len(readers) == 1 else None
        view = linear(model, readers[0]) if gram is not None else None
        if view is not None and gram is not None and view.weight is site.constant and view.alpha == 1:
            codes, _ = round_with(view, codes, gram, centered=False)
        elif site.constant.name in (recurrent or {}):
            codes = _round_recurrent(site.constant.values, codes, (recurrent or {})[site.constant.name])
        saved = site.constant.weight.nbytes - codes.codes.nbytes - codes.scales.nbytes
        if saved < _MIN_BYTES // 2 or not allow(f"{site.constant.name} to int8 codes"):
            continue
        shape = [1] * codes.codes.ndim
        shape[codes.axis] = -1
        rebuild(model, site.scope, site.constant, codes.codes, codes.scales.reshape(shape))
        count += 1
    return count


def _sites(model: Model) -> list[_Site]:
    """Float initializers of at least two axes; graph outputs and sparse ones stay."""
    outputs = model.outputs()
    found = []
    for scope in model.graph.scopes():
        for item in scope.initializers:
            if not isinstance(item, Constant) or item.sparse is not None or item in outputs:
                continue
            large = item.dtype.kind == "f" and len(item.shape) >= 2 and item.weight.nbytes >= _MIN_BYTES
            if large and item.outputs:
                found.append(_Site(scope, item, _channel_axis(model, item)))
    return sorted(found, key=lambda site: -site.constant.weight.nbytes)


def _channel_axis(model: Model, constant: Constant) -> int:
    """Axis of the output channels where a reader tells, else the axis that leaves the fewest elements to a scale."""
    for node in constant.outputs:
        view = linear(model, node)
        if view is not None and view.weight is constant:
            return output_channel_axis(view)
        if node.op in ("LSTM", "GRU", "RNN"):
            return 1
    shape = constant.shape
    return max(range(len(shape)), key=lambda i: (shape[i] <= constant.weight.size // 32, shape[i]))


def _round(values: Array, axis: int) -> QuantizedWeight:
    wide = values.astype(np.float64)
    others = tuple(i for i in range(wide.ndim) if i != axis)
    peak = np.abs(wide).max(axis=others)
    tiny = float(np.finfo(np.float32).tiny)
    kind = np.float64 if values.dtype == np.float64 else np.float32
    scales = np.maximum(np.where(peak > 0, peak / 127, 1.0), tiny).astype(kind)
    shape = [1] * wide.ndim
    shape[axis] = -1
    codes = np.clip(np.rint(wide / scales.astype(np.float64).reshape(shape)), -127, 127).astype(np.int8)
    return QuantizedWeight(codes, scales, axis)


def _round_recurrent(values: Array, nearest: QuantizedWeight, moments: Array) -> QuantizedWeight:
    """Codes of a weight [directions, gates, K], whose directions share their scales."""
    wide = values.astype(np.float64)
    codes = [round_rows(w, nearest.scales, moments[d % len(moments)]) for d, w in enumerate(wide)]
    return QuantizedWeight(np.stack(codes), nearest.scales, nearest.axis)


def rebuild(model: Model, scope: Graph, constant: Constant, codes: Array, scales: Array) -> None:
    """Put Cast(codes) * scales in the place of an initializer; `scales` broadcasts to the shape of the codes."""
    stored = model.constant(scope, f"{constant.name}_q", codes)
    scale = model.constant(scope, f"{constant.name}_scale", scales)
    unscaled, result = model.variable(f"{constant.name}_f"), model.variable(f"{constant.name}_w")
    scope.add("Cast", [stored], [unscaled], attrs={"to": scale.weight.data_type})
    scope.add("Mul", [unscaled, scale], [result])
    if scale.weight.data_type != constant.weight.data_type:
        # The CPU provider has no float16 arithmetic: it would fold nothing and compute the product in every run.
        narrow = model.variable(f"{constant.name}_h")
        scope.add("Cast", [result], [narrow], attrs={"to": constant.weight.data_type})
        result = narrow
    model.redirect(constant, result)
    scope.initializers.remove(constant)
