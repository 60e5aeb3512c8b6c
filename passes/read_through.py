"""Values that are read through an elementwise function only: its slope says how much an error of the value matters.

Below -3 a HardSwish gives zero and a LeakyRelu a hundredth, so a range need not be precise there, or reach as far.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.range_errors import Function
from onnxcomp.graph import Constant, Node
from onnxcomp.passes.placement import Placement

__all__ = ["read_through", "slope_of"]

Array = npt.NDArray[Any]


def _sigmoid(x: Array) -> Array:
    return np.asarray(0.5 * np.tanh(0.5 * x) + 0.5)


def _hard_sigmoid(node: Node) -> Function:
    alpha, beta = float(node.attrs.get("alpha", 0.2)), float(node.attrs.get("beta", 0.5))
    return lambda x: np.clip(alpha * x + beta, 0.0, 1.0)


def _leaky(slope: float) -> Function:
    return lambda x: np.where(x < 0, slope * x, x)


def _elu(node: Node) -> Function:
    alpha = float(node.attrs.get("alpha", 1.0))
    return lambda x: np.where(x < 0, alpha * np.expm1(np.minimum(x, 0.0)), x)


# ONNX operator specification; Softplus in the form that does not overflow.
_FUNCTIONS: dict[str, Callable[[Node], Function]] = {
    "Elu": _elu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda node: lambda x: x * np.clip(x / 6 + 0.5, 0.0, 1.0),
    "Mish": lambda node: lambda x: x * np.tanh(np.logaddexp(0.0, x)),
    "Sigmoid": lambda node: _sigmoid,
    "Softplus": lambda node: lambda x: np.logaddexp(0.0, x),
    "Tanh": lambda node: np.tanh,
}


def read_through(plan: Placement) -> dict[str, Function]:
    """By the name of an 8-bit value: the function f through which alone it is read, also as x f(x)."""
    found = {value.name: _function(value) for value in plan.quantized}
    return {name: function for name, function in found.items() if function is not None}


def _function(value: Any) -> Function | None:
    readers = list(value.outputs)
    known = [f for f in map(_of_node, readers) if f is not None]
    if len(readers) == 1 and known:
        return known[0]
    if len(readers) == 2 and len(known) == 1:
        inner, product = sorted(readers, key=lambda node: node.op == "Mul")
        function = known[0]
        gate = inner.outputs[0]
        if product.op == "Mul" and {*product.inputs} == {value, gate}:
            return lambda x: x * function(x)
    return None


def _of_node(node: Node) -> Function | None:
    slope = slope_of(node)
    if slope is not None:
        return _leaky(slope)
    make = _FUNCTIONS.get(node.op)
    return None if make is None or node.domain else make(node)


def slope_of(node: Node) -> float | None:
    """Of negative values: exact for LeakyRelu, the root of the mean square for the channels of PRelu."""
    if node.domain:
        return None
    if node.op == "LeakyRelu":
        return float(node.attrs.get("alpha", 0.01))
    if node.op == "PRelu" and isinstance(node.inputs[1], Constant):
        return float(np.sqrt(np.mean(np.square(node.inputs[1].values.astype(np.float64)))))
    return None
