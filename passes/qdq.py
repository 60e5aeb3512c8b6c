"""Writing a placement into the graph: QuantizeLinear / DequantizeLinear pairs, int8 weights, int32 biases.

    activation   x -> QuantizeLinear(s_x, z_x) -> DequantizeLinear(s_x, z_x) -> readers
    weight       int8 [.., channels, ..] -> DequantizeLinear(s_w[c], 0, axis) -> node
    bias         int32, scale s_x s_w[c] -> DequantizeLinear -> node, or as it is in float (TensorRT)

Weights are stored as the int8 values that the kernels multiply, once for each tensor however many nodes share it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.affine import QuantParameters
from onnxcomp.graph import Constant, Graph, Model, Node
from onnxcomp.linear import Linear
from onnxcomp.passes.placement import Placement, Unit

__all__ = ["QuantizedWeight", "insert", "output_channel_axis", "quantize_weight"]

Array = npt.NDArray[Any]
_INT32 = 2**31 - 1


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes (int8, shape of the weight) and one positive scale per output channel (float32)."""

    codes: Array
    scales: Array
    axis: int

    def dequantized(self) -> Array:
        shape = [1] * self.codes.ndim
        shape[self.axis] = -1
        return np.asarray(self.codes.astype(np.float64) * self.scales.astype(np.float64).reshape(shape))


def output_channel_axis(view: Linear) -> int:
    """Axis of the weight along which scales vary."""
    if view.op == "Conv":
        return 0
    if view.op == "ConvTranspose":
        return 1
    return 0 if view.transposed else len(view.weight.shape) - 1


def quantize_weight(view: Linear, limit: int = 127) -> QuantizedWeight:
    """Symmetric per-channel rounding to nearest: s[c] = max |W[c]| / limit. An all-zero channel gets scale 1."""
    w = view.weight.values.astype(np.float64) * view.alpha
    axis = output_channel_axis(view)
    others = tuple(i for i in range(w.ndim) if i != axis)
    peak = np.abs(w).max(axis=others)
    scales = np.where(peak > 0, peak / limit, 1.0).astype(np.float32)
    scales = np.maximum(scales, np.finfo(np.float32).tiny)
    shape = [1] * w.ndim
    shape[axis] = -1
    codes = np.clip(np.rint(w / scales.astype(np.float64).reshape(shape)), -limit, limit).astype(np.int8)
    return QuantizedWeight(codes, scales, axis)


def room_for_bias(weight: QuantizedWeight, bias: Array, input_scale: float) -> QuantizedWeight:
    """The weight with coarser scales for channels whose bias b would not fit 32 bits: |b| / (s_x s_w[c]) < 2^31.

    A channel with tiny weights and a large bias would overflow otherwise; its weights hardly matter.
    """
    least = np.abs(bias) / (float(np.float32(input_scale)) * 0.99 * _INT32)
    scales = weight.scales.astype(np.float64)
    small = scales < least
    if not small.any():
        return weight
    wider = np.where(small, least, scales).astype(np.float32)
    shape = [1] * weight.codes.ndim
    shape[weight.axis] = -1
    codes = np.rint(weight.codes * (scales / wider.astype(np.float64)).reshape(shape)).astype(np.int8)
    return QuantizedWeight(codes, wider, weight.axis)


class _Writer:
    def __init__(self, model: Model, scope: Graph, float_bias: bool) -> None:
        self.model = model
        self.float_bias = float_bias
        self.scope = scope
        self.constants: dict[tuple[str, bytes, tuple[int, ...]], Constant] = {}
        self.weights: dict[tuple[int, int], Any] = {}
        self.alive: list[QuantizedWeight] = []  # their ids are keys, so none may be freed before the end

    def constant(self, wish: str, values: Array) -> Constant:
        """An initializer; equal small ones (scales, zero points) are written once."""
        key = (values.dtype.str, values.tobytes(), values.shape)
        if key not in self.constants:
            self.constants[key] = self.model.constant(self.scope, wish, values)
        return self.constants[key]

    def pair(self, tensor: Any, chosen: QuantParameters) -> tuple[Node, Any]:
        """Q and DQ behind a value; returns the Q node and the dequantized value."""
        scale = self.constant("scale", np.asarray(chosen.scale, np.float32))
        zero = self.constant("zero_point", np.asarray(chosen.zero_point, chosen.dtype))
        codes = self.model.variable(f"{tensor.name}_q")
        values = self.model.variable(f"{tensor.name}_dq")
        node = self.scope.add("QuantizeLinear", [tensor, scale, zero], [codes])
        self.scope.add("DequantizeLinear", [codes, scale, zero], [values])
        return node, values

    def dequantized(self, wish: str, codes: Array, scales: Array, axis: int | None) -> Any:
        zero = self.constant("zero_point", np.zeros(scales.shape, codes.dtype))
        stored = self.model.constant(self.scope, f"{wish}_q", codes)
        values = self.model.variable(f"{wish}_dq")
        attrs = {} if axis is None else {"axis": axis}
        inputs = [stored, self.constant("scale", scales), zero]
        self.scope.add("DequantizeLinear", inputs, [values], attrs=attrs)
        return values


def insert(
    model: Model,
    scope: Graph,
    plan: Placement,
    chosen: Mapping[Any, QuantParameters],
    weights: Mapping[Node, QuantizedWeight],
    biases: Mapping[Node, Array],
    *,
    float_bias: bool = False,
) -> None:
    """Write the placement. `chosen` has the parameters of each 8-bit value, `biases` a float64 bias per unit with one,
    written as float32 with `float_bias`, else as int32.

    The graph is not sorted afterwards.
    """
    writer = _Writer(model, scope, float_bias)
    produced = {o for u in plan.units for o in [u.output, *u.node.outputs]}
    readers = {u.node for u in plan.units}
    inputs = {u.node: u.node.inputs[0] for u in plan.units if u.view is not None}
    for tensor in plan.quantized:
        everyone = plan.edges is None and tensor in produced
        eight = readers if plan.edges is None else plan.edges[tensor]
        _quantize_value(writer, tensor, chosen[plan.root(tensor)], eight, everyone=everyone)
    for unit in plan.units:
        if unit.view is not None:
            _quantize_unit(writer, unit, weights[unit.node], chosen[plan.root(inputs[unit.node])], biases)
        elif unit.node.op == "Pad":
            _pad_codes(writer, unit.node)


def _quantize_value(
    writer: _Writer, tensor: Any, chosen: QuantParameters, readers: Collection[Node], *, everyone: bool
) -> None:
    """Let readers of a value read it quantized: all of them (`everyone`), or only those given."""
    consumers = [n for n in dict.fromkeys(tensor.outputs) if everyone or n in readers]
    if not consumers and not any(o is tensor for o in writer.scope.outputs):
        return
    _, values = writer.pair(tensor, chosen)
    for node in consumers:
        for position, value in enumerate(node.inputs):
            if value is tensor:
                node.inputs[position] = values
    if everyone and any(o is tensor for o in writer.scope.outputs):
        tensor.name, values.name = values.name, tensor.name
        values.info, values.dtype, values.shape = tensor.info, tensor.dtype, tensor.shape
        tensor.info = None
        writer.scope.outputs = [values if o is tensor else o for o in writer.scope.outputs]


def _quantize_unit(
    writer: _Writer, unit: Unit, weight: QuantizedWeight, chosen: QuantParameters, biases: Mapping[Node, Array]
) -> None:
    node, view = unit.node, unit.view
    assert view is not None
    bias = biases.get(node)
    if bias is not None and unit.addend is None and not writer.float_bias:
        weight = room_for_bias(weight, bias, chosen.scale)
    key = (id(view.weight), id(weight))
    if key not in writer.weights:
        writer.weights[key] = writer.dequantized(view.weight.name, weight.codes, weight.scales, weight.axis)
    node.inputs[1] = writer.weights[key]
    writer.alive.append(weight)
    node.attrs.pop("alpha", None)
    if bias is None:
        return
    if unit.addend is not None:
        position = next(i for i, t in enumerate(unit.addend.inputs) if isinstance(t, Constant))
        old = unit.addend.inputs[position]
        new = writer.model.constant(writer.scope, old.name, bias.astype(old.dtype).reshape(old.shape))
        unit.addend.inputs[position] = new
        return
    node.attrs.pop("beta", None)
    wish = view.bias.name if view.bias is not None else f"{node.outputs[0].name}_bias"
    values = _bias(writer, wish, bias, (np.float32(chosen.scale) * weight.scales).astype(np.float32))
    if len(node.inputs) > 2:
        node.inputs[2] = values
    else:
        node.inputs.append(values)


def _bias(writer: _Writer, wish: str, bias: Array, scales: Array) -> Any:
    if writer.float_bias:
        return writer.model.constant(writer.scope, wish, bias.astype(np.float32))
    codes = np.clip(np.rint(bias / scales.astype(np.float64)), -_INT32, _INT32).astype(np.int32)
    return writer.dequantized(wish, codes, scales, 0)


def _pad_codes(writer: _Writer, node: Node) -> None:
    """Pad has no quantized fusion: let it move the codes themselves, between Q and DQ, filling in the zero point."""
    dequantize = node.inputs[0].inputs[0]
    quantize = node.outputs[0].outputs[0]
    codes, scale, zero = dequantize.inputs
    result = quantize.outputs[0]
    padded = node.outputs[0]
    node.inputs[0] = codes
    if len(node.inputs) > 2:
        node.inputs[2] = zero
    else:
        node.inputs.append(zero)
    node.outputs[0] = result
    quantize.outputs[0] = writer.model.variable(f"{padded.name}_unused")
    writer.scope.remove([quantize])
    for consumer in result.outputs:
        consumer.inputs[1], consumer.inputs[2] = scale, zero
