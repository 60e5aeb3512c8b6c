"""Dynamic int8: weights are int8, and activations become u8 in every run, with the range they have there.

    x -> DynamicQuantizeLinear -> MatMulInteger(W int8 per column) -> Cast -> Mul(s_x s_w) -> + b

ONNX Runtime fuses this into DynamicQuantizeMatMul / MatMulIntegerToFloat. An LSTM becomes its DynamicQuantizeLSTM
(domain com.microsoft). There is no such kernel for GRU, and none for Conv that is faster than float. It needs no
calibration data (with some weights are rounded by it, input_moments.py), and pays where a weight is large against the
values that it meets: small batches, recurrent layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Constant, Graph, Model, Node, Variable
from onnxcomp.linear import Linear, linear
from onnxcomp.passes.input_moments import Moments, round_rows
from onnxcomp.shapes import Shapes, infer

__all__ = ["MIN_OPSET", "quantize_dynamically"]

Array = npt.NDArray[Any]
MIN_OPSET = 11  # DynamicQuantizeLinear
_FLOAT = 1
_MIN_WEIGHTS = 1024  # of a matrix: below, the conversions cost more than they bring


def quantize_dynamically(model: Model, allow: Callable[[str], bool], moments: Moments) -> int:
    """Rewrite the matrix products and LSTMs of all scopes that have constant weights, in place; returns how many."""
    shapes = infer(model)
    count = 0
    for scope in model.graph.scopes():
        writer = _Writer(model, scope, moments)
        for node in list(scope.nodes):
            view = linear(model, node)
            if view is not None and _fits(view, shapes) and allow(f"{node.label} to dynamic int8"):
                writer.product(view)
                count += 1
            elif node.op == "LSTM" and _plain_lstm(node) and allow(f"{node.label} to dynamic int8"):
                writer.lstm(node)
                count += 1
    return count


def _fits(view: Linear, shapes: Shapes) -> bool:
    floats = view.weight.dtype == np.float32 and shapes[view.node.inputs[0]].elem == _FLOAT
    return view.op in ("Gemm", "MatMul") and floats and view.weight.weight.size >= _MIN_WEIGHTS


def _plain_lstm(node: Node) -> bool:
    """What ONNX Runtime's kernel takes: constant float32 weights, and no other layout."""
    weights = node.inputs[1:3]
    constant = all(isinstance(t, Constant) and t.dtype == np.float32 for t in weights)
    peephole = len(node.inputs) > 7 and bool(node.inputs[7].name)
    return not node.domain and constant and not peephole and not node.attrs.get("layout", 0)


class _Writer:
    def __init__(self, model: Model, scope: Graph, moments: Moments) -> None:
        self._model = model
        self._scope = scope
        self._moments = moments
        self._quantized: dict[Any, tuple[Any, Any, Any]] = {}

    def product(self, view: Linear) -> None:
        """y = x W + b with x quantized at run time, once for all that read it."""
        node = view.node
        w = view.weight.values.astype(np.float64) * view.alpha
        moment = self._moments.get(view.weight.name, [None])[0]
        codes, scales = _round(w if view.transposed else w.T, moment)
        source, result, name = node.inputs[0], node.outputs[0], view.weight.name
        has_bias = len(node.inputs) > 2 and bool(node.inputs[2].name)
        bias = view.bias_values() if has_bias else None
        self._scope.remove([node])
        x, x_scale, x_zero = self._activation(source)
        stored = self._model.constant(self._scope, f"{name}_q", codes)
        scale = self._model.constant(self._scope, f"{name}_scale", scales)
        zero = self._model.constant(self._scope, f"{name}_zero", np.zeros((), np.int8))
        sums, floats, factor = (self._model.variable(f"{result.name}_{s}") for s in ("sums", "floats", "factor"))
        self._scope.add("MatMulInteger", [x, stored, x_zero, zero], [sums])
        self._scope.add("Cast", [sums], [floats], attrs={"to": _FLOAT})
        self._scope.add("Mul", [x_scale, scale], [factor])
        last = result if bias is None else self._model.variable(f"{result.name}_product")
        self._scope.add("Mul", [floats, factor], [last])
        if bias is not None:
            addend = self._model.constant(self._scope, f"{name}_bias", bias.astype(np.float32))
            self._scope.add("Add", [last, addend], [result])

    def lstm(self, node: Node) -> None:
        """Weights [directions, 4 hidden, inputs] become int8 [directions, inputs, 4 hidden], a scale per gate row."""
        self._model.import_domain("com.microsoft", 1)
        inputs = [*node.inputs, *(Variable("") for _ in range(8 - len(node.inputs)))]
        for position in (1, 2):
            name, w = node.inputs[position].name, node.inputs[position].values.astype(np.float64)
            moments = self._moments.get(name, [None])  # one for both directions where these read the same
            pairs = [_round(rows, moments[d % len(moments)]) for d, rows in enumerate(w)]
            inputs[position] = self._model.constant(self._scope, f"{name}_q", np.stack([c for c, _ in pairs]))
            scales = np.stack([s for _, s in pairs])
            inputs.append(self._model.constant(self._scope, f"{name}_scale", scales))
            inputs.append(self._model.constant(self._scope, f"{name}_zero", np.zeros(scales.shape, np.int8)))
        outputs, attrs, label = list(node.outputs), dict(node.attrs), node.name
        attrs.pop("layout", None)
        self._scope.remove([node])
        self._scope.add("DynamicQuantizeLSTM", inputs, outputs, name=label, domain="com.microsoft", attrs=attrs)

    def _activation(self, tensor: Any) -> tuple[Any, Any, Any]:
        if tensor not in self._quantized:
            made = tuple(self._model.variable(f"{tensor.name}_{s}") for s in ("codes", "scale", "zero"))
            self._scope.add("DynamicQuantizeLinear", [tensor], list(made))
            self._quantized[tensor] = (made[0], made[1], made[2])
        return self._quantized[tensor]


def _round(w: Array, moment: Array | None) -> tuple[Array, Array]:
    """Codes int8 [inputs, outputs] and scales float32 [outputs] of a matrix [outputs, inputs]."""
    peak = np.abs(w).max(axis=1)
    scales = np.where(peak > 0, peak / 127, 1.0).astype(np.float32)
    return np.ascontiguousarray(round_rows(w, scales, moment).T), scales
