"""Biases and scales as half-precision values, cast back when the model is loaded: half the bytes, 60 dB or more.

A Cast of an initializer is folded by ONNX Runtime, so that a run costs what it cost before.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from onnxcomp.graph import Constant, Model

__all__ = ["halve_vectors"]

_LEAST = 32  # elements; below, the Cast takes more room than it saves
# Operators to which one entry of a vector means as much as another: no positions, no tables, no variances.
_READERS = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", "InstanceNormalization", "LayerNormalization", "PRelu"}
)
_ERROR = 2.0**-10  # largest rounding error, of the largest entry


def halve_vectors(model: Model, allow: Callable[[str], bool]) -> int:
    """Store float32 vectors as float16, in place; returns how many. Those stay that half precision does not hold."""
    outputs, count = model.outputs(), 0
    for scope in model.graph.scopes():
        for item in list(scope.initializers):
            if not isinstance(item, Constant) or item in outputs or not _fits(item):
                continue
            if not allow(f"{item.name} in half precision"):
                continue
            stored = model.constant(scope, f"{item.name}_h", item.values.astype(np.float16))
            wide = model.variable(item.name, np.float32, item.shape)
            scope.add("Cast", [stored], [wide], attrs={"to": int(onnx.TensorProto.FLOAT)})
            model.redirect(item, wide)
            scope.initializers.remove(item)
            count += 1
    return count


def _fits(item: Constant) -> bool:
    vector = item.dtype == np.float32 and item.weight.size >= _LEAST and max(item.shape) == item.weight.size
    if not vector or item.sparse is not None or not item.outputs:
        return False
    if any(node.op not in _READERS or node.domain for node in item.outputs):
        return False
    values = item.values.astype(np.float64)
    peak = float(np.abs(values).max())
    if not 0 < peak < float(np.finfo(np.float16).max):  # a NaN compares as false
        return False
    return bool(np.abs(values - values.astype(np.float16)).max() <= _ERROR * peak)
