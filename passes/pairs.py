"""Two nodes that one operator does: Pad and Conv, MatMul and Add, Relu and Clip. Same function up to rounding."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxcomp.graph import Constant, Graph, Model, Node, producer
from onnxcomp.linear import linear
from onnxcomp.manager import Context
from onnxcomp.shapes import Shapes

__all__ = ["absorb_output", "fuse_padding", "matmul_to_gemm", "relu_into_clip"]


def absorb_output(node: Node, follower: Node) -> None:
    """`node` now computes what `follower` did: it takes over its output."""
    result = follower.outputs[0]
    follower.outputs[0] = _placeholder(result)
    node.outputs[0] = result


def _placeholder(like: Any) -> Any:
    return type(like)(f"{like.name}_fused", dtype=like.dtype, shape=like.shape)


def fuse_padding(model: Model, scope: Graph, shapes: Shapes, ctx: Context) -> int:
    """A Pad with zeros at the sides of the picture becomes part of the Conv behind it."""
    outputs, home, gone = set(scope.outputs), set(scope.nodes), set()
    for node in scope.nodes:
        pad = producer(node.inputs[0]) if node.kind == "Conv" and node.plain else None
        if pad is None or pad not in home or pad.kind != "Pad" or not pad.plain:
            continue
        if pad.outputs[0] in outputs or len(pad.outputs[0].outputs) != 1:
            continue
        amounts = _zero_padding(model, pad)
        if amounts is None or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            continue
        rank = len(amounts) // 2
        old = list(node.attrs.get("pads", [0] * (2 * (rank - 2))))
        if min(amounts) < 0 or any(amounts[i] for i in (0, 1, rank, rank + 1)) or len(old) != 2 * (rank - 2):
            continue
        if (shapes[pad.outputs[0]].shape or ())[3:] == (1,):
            ctx.refuse(node.label, "ONNX Runtime's Conv takes 1.1 to 3.4 times as long if it pads columns of width 1")
            continue
        if ctx.allow(f"{pad.label} into {node.label}"):
            new = amounts[2:rank] + amounts[rank + 2 :]
            node.attrs["pads"] = [a + b for a, b in zip(old, new, strict=True)]
            node.attrs.pop("auto_pad", None)
            node.inputs[0] = pad.inputs[0]
            gone.add(pad)
    scope.remove(gone)
    return len(gone)


def _zero_padding(model: Model, pad: Node) -> list[int] | None:
    """Amounts of a Pad with constant zeros on all axes, begin of each axis and then the ends; None for other kinds."""
    if pad.attrs.get("mode", "constant") != "constant" or (len(pad.inputs) > 3 and pad.inputs[3].name):
        return None
    if len(pad.inputs) == 1:
        return list(pad.attrs.get("pads", ())) or None if not pad.attrs.get("value", 0.0) else None
    if len(pad.inputs) > 2 and pad.inputs[2].name:
        value = model.value(pad.inputs[2])
        if value is None or value.any():
            return None
    amounts = model.value(pad.inputs[1])
    return None if amounts is None else [int(v) for v in amounts]


def matmul_to_gemm(model: Model, scope: Graph, shapes: Shapes, ctx: Context) -> int:
    """MatMul of a matrix with a weight, plus one value per column, is one Gemm."""
    outputs, home, gone = set(scope.outputs), set(scope.nodes), set()
    for node in scope.nodes:
        view = linear(model, node) if node.op == "MatMul" and model.opset >= 7 else None
        if view is None or shapes[node.inputs[0]].rank != 2 or node.outputs[0] in outputs:
            continue
        follower = node.outputs[0].outputs[0] if len(node.outputs[0].outputs) == 1 else None
        if follower is None or follower.kind != "Add" or follower not in home or view.weight.dtype.kind != "f":
            continue
        bias = next((t for t in follower.inputs if isinstance(t, Constant)), None)
        if (
            bias is None
            or bias.weight.size != view.outputs
            or bias.shape[-1:] != (view.outputs,)
            or len(bias.shape) > 2
        ):
            continue
        if bias.dtype == view.weight.dtype and ctx.allow(f"{follower.label} into {node.label}: Gemm"):
            if len(bias.shape) == 2:
                bias = model.constant(scope, bias.name, bias.values.reshape(-1))
            node.op = "Gemm"
            node.inputs.append(bias)
            absorb_output(node, follower)
            outputs = set(scope.outputs)
            gone.add(follower)
    scope.remove(gone)
    return len(gone)


def relu_into_clip(model: Model, scope: Graph, ctx: Context) -> int:
    """Clip behind Relu is Clip alone, from max(0, min) on."""
    outputs, home, gone = set(scope.outputs), set(scope.nodes), []
    for node in scope.nodes:
        relu = producer(node.inputs[0]) if node.kind == "Clip" and model.opset >= 11 else None
        if relu is None or relu.kind != "Relu" or relu not in home or len(node.inputs) < 2:
            continue
        low = model.value(node.inputs[1])
        if low is None or low.size != 1 or relu.outputs[0] in outputs or len(relu.outputs[0].outputs) != 1:
            continue
        if ctx.allow(f"{relu.label} into {node.label}"):
            node.inputs[1] = model.constant(scope, f"{node.outputs[0].name}_min", np.maximum(low, low.dtype.type(0)))
            node.inputs[0] = relu.inputs[0]
            gone.append(relu)
    scope.remove(gone)
    return len(gone)
