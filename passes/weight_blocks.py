"""Weight-only int4: matrices in blocks of 32 inputs with a scale each, which ONNX Runtime multiplies without unpacking.

    W[k, n] ~ s[k // 32, n] q[k, n],  q in -7..7      DequantizeLinear(axis 0, block_size 32) -> MatMul

At load ONNX Runtime turns the pair into MatMulNBits (blocks must run along the inputs of a MatMul, so a Gemm becomes
MatMul and Add). The file is an eighth, and a product with few rows reads an eighth of the memory. Where second moments
of the inputs are known, the codes are those that keep the outputs close (rounding.py), else the nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.gram import Gram
from onnxcomp.graph import Graph, Model
from onnxcomp.linear import Linear, linear
from onnxcomp.passes.rounding import round_to_grid
from onnxcomp.weights import Weight

__all__ = ["BLOCK", "MIN_OPSET", "block_codes", "compress_blocks"]

Array = npt.NDArray[Any]
BLOCK = 32
MIN_OPSET = 21  # 4-bit types, and DequantizeLinear with blocks
_LARGEST = 7
_MIN_BYTES = 4096  # of a float matrix: smaller ones are not worth a kernel of their own


def compress_blocks(model: Model, allow: Callable[[str], bool], grams: Mapping[str, Gram]) -> int:
    """Store the matrices of all scopes as 4-bit blocks, in place; returns how many. The model has opset 21 or more.

    `grams` has second moments of inputs by the name of the first output of the node.
    """
    done: dict[Any, tuple[Array, Array]] = {}
    for scope in model.graph.scopes():
        for node in list(scope.nodes):
            view = linear(model, node)
            if view is None or not _fits(view):
                continue
            key = (view.weight, view.transposed, view.alpha)
            if key not in done:
                if not allow(f"{view.weight.name} to 4-bit blocks"):
                    continue
                done[key] = block_codes(view, grams.get(node.outputs[0].name))
            _rewire(model, scope, view, *done[key])
    return len(done)


def _fits(view: Linear) -> bool:
    weight = view.weight
    large = weight.dtype == np.float32 and weight.weight.nbytes >= _MIN_BYTES
    return view.op in ("Gemm", "MatMul") and large and view.inputs % BLOCK == 0


def block_codes(view: Linear, gram: Gram | None) -> tuple[Array, Array]:
    """Codes (int8 holding -7..7, [inputs, outputs]) and scales (float32 [inputs / 32, outputs]) of a matrix."""
    w = view.weight.values.astype(np.float64) * view.alpha
    rows = w if view.transposed else w.T  # [outputs, inputs]
    blocks = rows.reshape(len(rows), -1, BLOCK)
    peak = np.abs(blocks).max(axis=2)
    scales = np.where(peak > 0, peak / _LARGEST, 1.0).astype(np.float32)
    wide = np.repeat(scales.astype(np.float64), BLOCK, axis=1)
    codes = _nearest(rows / wide)
    if gram is not None:
        moments = gram.products[0] / max(gram.rows, 1)
        codes = round_to_grid(rows, wide, moments, _nearest)
    return np.ascontiguousarray(codes.T.astype(np.int8)), np.ascontiguousarray(scales.T)


def _nearest(values: Array) -> Array:
    return np.clip(np.rint(values), -_LARGEST, _LARGEST)


def _rewire(model: Model, scope: Graph, view: Linear, codes: Array, scales: Array) -> None:
    """Let a node read the codes. Each has its own, tied or not: ONNX Runtime fuses only what one node reads."""
    node, name = view.node, view.weight.name
    stored = model.constant(scope, f"{name}_q4", Weight.from_array(codes.astype(ml_dtypes.int4)))
    scale = model.constant(scope, f"{name}_scale", scales)
    values = model.variable(f"{name}_dq")
    scope.add("DequantizeLinear", [stored, scale], [values], attrs={"axis": 0, "block_size": BLOCK})
    if view.op == "MatMul":
        node.inputs[1] = values
        return
    product = model.variable(f"{node.outputs[0].name}_product")
    result, source = node.outputs[0], node.inputs[0]
    has_bias = len(node.inputs) > 2 and bool(node.inputs[2].name)
    bias = view.bias_values() if has_bias else np.zeros(view.outputs)
    label = node.name
    scope.remove([node])
    scope.add("MatMul", [source, values], [product], name=label)
    scope.add("Add", [product, model.constant(scope, f"{name}_bias", bias.astype(np.float32))], [result])
