"""Coupling rules of operators that compute: products with weights, normalization, elementwise operators, reductions.

Each function states what its operator's definition says about which slices belong together. Rules of operators that
move elements are in dim_layout_rules.py, of recurrent ones, attention and control flow in dim_sequence_rules.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxcomp.graph import Constant, Node
from onnxcomp.passes.dim_atoms import Atoms, rule

__all__ = ["whole_groups"]

_SPATIAL = "a spatial axis"
_ELEMENTWISE = (
    "Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil "
    "Celu Clip Cos Cosh Div Dropout Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity "
    "IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu "
    "Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where Xor"
).split()
_MICROSOFT_ELEMENTWISE = ("BiasAdd", "BiasGelu", "FastGelu", "Gelu", "QuickGelu", "BiasDropout")


@rule(*_ELEMENTWISE)
def _elementwise(atoms: Atoms, node: Node) -> None:
    """Y = f(X1, X2, ...) at each place: operands aligned from the right."""
    for output in node.outputs:
        if output.name:
            atoms.broadcast(node.inputs, output)


rule(*_MICROSOFT_ELEMENTWISE, domain="com.microsoft")(_elementwise)
rule("Affine", "ParametricSoftplus", "ScaledTanh")(_elementwise)  # ONNX Runtime still has these from opset 1


def whole_groups(group: Any) -> bool:
    """Whether a grouped convolution of `group` input channels each loses whole groups rather than channels of each.

    Narrow groups keep their width: kernels for narrow groups are slow at odd widths.
    """
    return bool(group <= 8)


@rule("Conv", "ConvInteger")
def _conv(atoms: Atoms, node: Node) -> None:
    x, w, y = node.inputs[0], node.inputs[1], node.outputs[0]
    groups = int(node.attrs.get("group", 1))
    width_in, width_out = atoms.shape(x)[1] // groups, atoms.shape(y)[1] // groups
    _positions(atoms, x, w, y)
    atoms.same(w, 0, y, 1)
    if len(node.inputs) > 2 and node.inputs[2].name:
        atoms.same(node.inputs[2], 0, y, 1)
    if groups == 1:
        atoms.same(x, 1, w, 1)
        atoms.summed(w, 1)
    elif whole_groups(width_in):
        _whole_groups(atoms, x, y, groups)
        atoms.pin(w, 1, why="the width of a group")
    else:
        # The same channels of every group: x[q, j] = w[:, j], y[q, k] = y[0, k].
        atoms.join(atoms.at(x, 1), atoms.at(w, 1, np.arange(groups * width_in) % width_in))
        atoms.join(atoms.at(y, 1), atoms.at(y, 1, np.arange(groups * width_out) % width_out))
        atoms.summed(w, 1)


@rule("ConvTranspose")
def _conv_transpose(atoms: Atoms, node: Node) -> None:
    x, w, y = node.inputs[0], node.inputs[1], node.outputs[0]
    groups = int(node.attrs.get("group", 1))
    _positions(atoms, x, w, y)
    atoms.same(x, 1, w, 0)
    if len(node.inputs) > 2 and node.inputs[2].name:
        atoms.same(node.inputs[2], 0, y, 1)
    if groups == 1:
        atoms.same(w, 1, y, 1)
        atoms.summed(w, 0)
    else:
        _whole_groups(atoms, x, y, groups)
        atoms.pin(w, 1, why="the width of a group")


@rule("FusedConv", domain="com.microsoft")
def _fused_conv(atoms: Atoms, node: Node) -> None:
    _conv(atoms, node)
    if len(node.inputs) > 3:
        atoms.broadcast(node.inputs[3:4], node.outputs[0])


def _positions(atoms: Atoms, x: Any, w: Any, y: Any) -> None:
    atoms.same(x, 0, y, 0)
    for k in range(2, atoms.rank(x)):
        for tensor in (x, w, y):
            atoms.pin(tensor, k, why=_SPATIAL)


def _whole_groups(atoms: Atoms, x: Any, y: Any, groups: int) -> None:
    """All channels of x and y that lie in one group go together."""
    first = np.arange(groups) * (atoms.shape(y)[1] // groups)
    for tensor in (x, y):
        width = atoms.shape(tensor)[1] // groups
        atoms.join(atoms.at(tensor, 1), atoms.at(y, 1, np.repeat(first, width)))


@rule("Gemm")
def _gemm(atoms: Atoms, node: Node) -> None:
    a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
    ta, tb = int(node.attrs.get("transA", 0)), int(node.attrs.get("transB", 0))
    atoms.same(a, ta, y, 0)
    atoms.same(a, 1 - ta, b, tb)
    atoms.same(b, 1 - tb, y, 1)
    atoms.summed(*((b, tb) if isinstance(b, Constant) else (a, 1 - ta)))
    if len(node.inputs) > 2:
        atoms.broadcast(node.inputs[2:3], y)


@rule("MatMul", "MatMulInteger")
def _matmul(atoms: Atoms, node: Node) -> None:
    a, b, y = node.inputs[0], node.inputs[1], node.outputs[0]
    if atoms.rank(a) < 2 or atoms.rank(b) < 2:
        return atoms.pin_node(node, "a product with a vector")
    atoms.same(a, -1, b, -2)
    atoms.same(a, -2, y, -2)
    atoms.same(b, -1, y, -1)
    atoms.summed(*((b, -2) if isinstance(b, Constant) else (a, -1)))
    for x in (a, b):
        for k in range(3, atoms.rank(x) + 1):
            if atoms.shape(x)[-k] == atoms.shape(y)[-k]:
                atoms.same(x, -k, y, -k)


@rule("Einsum")
def _einsum(atoms: Atoms, node: Node) -> None:
    equation = str(node.attrs["equation"]).replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow or "." in equation or any(len(set(t)) < len(t) for t in terms):
        return atoms.pin_node(node, f"the equation {equation!r}")
    first: dict[str, tuple[Any, int]] = {}
    for tensor, term in [*zip(node.inputs, terms, strict=True), (node.outputs[0], right)]:
        for k, letter in enumerate(term):
            atoms.same(tensor, k, *first.setdefault(letter, (tensor, k)))
    for letter, (tensor, k) in first.items():
        if letter not in right:
            atoms.summed(tensor, k)
    return None


# --- normalization ------------------------------------------------------------------------------------------


@rule("BatchNormalization", "InstanceNormalization")
def _channel_norm(atoms: Atoms, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    atoms.same_axes(x, y)
    for parameter in node.inputs[1:]:
        atoms.same(parameter, 0, y, 1)
    for extra in node.outputs[1:]:
        atoms.pin(extra, why="statistics of a training step")


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def _layer_norm(atoms: Atoms, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    axis = int(node.attrs.get("axis", -1)) % atoms.rank(x)
    atoms.same_axes(x, y)
    for k in range(axis, atoms.rank(x)):
        atoms.averaged(x, k)
    atoms.broadcast(node.inputs[1:3], y)
    for extra in node.outputs[1:]:
        if extra.name:
            atoms.same_axes(x, extra, but=range(axis, atoms.rank(x)))


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain="com.microsoft")
def _skip_layer_norm(atoms: Atoms, node: Node) -> None:
    y = node.outputs[0]
    atoms.broadcast(node.inputs, y)
    atoms.averaged(node.inputs[0], -1)
    if len(node.outputs) > 3 and node.outputs[3].name:
        atoms.same_axes(node.outputs[3], y)


@rule("GroupNormalization")
def _group_norm(atoms: Atoms, node: Node) -> None:
    """Whole groups go; a channel fewer in a group would change the statistics of the others."""
    x, y = node.inputs[0], node.outputs[0]
    groups, channels = int(node.attrs["num_groups"]), atoms.shape(x)[1]
    group = np.arange(channels) // (channels // groups)
    atoms.same_axes(x, y)
    atoms.join(atoms.at(x, 1), atoms.at(x, 1, group * (channels // groups)))
    for parameter in node.inputs[1:3]:
        per_channel = atoms.shape(parameter)[0] == channels
        atoms.join(atoms.at(x, 1), atoms.at(parameter, 0) if per_channel else atoms.at(parameter, 0, group))


@rule("LpNormalization")
def _lp_norm(atoms: Atoms, node: Node) -> None:
    atoms.same_axes(node.inputs[0], node.outputs[0])
    atoms.averaged(node.inputs[0], int(node.attrs.get("axis", -1)))


@rule("MeanVarianceNormalization")
def _mean_variance(atoms: Atoms, node: Node) -> None:
    atoms.same_axes(node.inputs[0], node.outputs[0])
    for k in node.attrs.get("axes", [0, 2, 3]):
        atoms.averaged(node.inputs[0], int(k))


@rule("LRN")
def _lrn(atoms: Atoms, node: Node) -> None:
    """Each channel is scaled by its neighbours, which removal brings closer."""
    atoms.same_axes(node.inputs[0], node.outputs[0])
    atoms.averaged(node.inputs[0], 1)


# --- reductions and competition -----------------------------------------------------------------------------


@rule(*(f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")))
def _reduce(atoms: Atoms, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    given = atoms.integers(node, 1, "axes")
    if given is None and len(node.inputs) > 1 and node.inputs[1].name:
        return atoms.pin_node(node, "it reduces axes that are not constant")
    keep = int(node.attrs.get("keepdims", 1))
    everything = given is None and not int(node.attrs.get("noop_with_empty_axes", 0))
    axes = set(range(atoms.rank(x))) if everything else {k % atoms.rank(x) for k in given or ()}
    out = 0
    for k in range(atoms.rank(x)):
        if k in axes:
            out += keep
            _reduced(atoms, node, x, k)
        else:
            atoms.same(x, k, y, out)
            out += 1
    return None


def _reduced(atoms: Atoms, node: Node, x: Any, axis: int) -> None:
    if node.op in ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"):
        atoms.summed(x, axis)
    else:
        atoms.averaged(x, axis)


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "MaxPool", "AveragePool", "LpPool")
def _pool(atoms: Atoms, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    for k in (0, 1):
        atoms.same(x, k, y, k)
    for k in range(2, atoms.rank(x)):
        atoms.pin(x, k, why=_SPATIAL)
        atoms.pin(y, k, why=_SPATIAL)
    for indices in node.outputs[1:]:
        atoms.pin(indices, why="indices of the largest elements")


@rule("Softmax", "LogSoftmax", "Hardmax")
def _softmax(atoms: Atoms, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    new = atoms.opset >= 13
    axis = int(node.attrs.get("axis", -1 if new else 1)) % atoms.rank(x)
    atoms.same_axes(x, y)
    for k in [axis] if new else range(axis, atoms.rank(x)):
        atoms.pin(x, k, why=f"{node.op} lets the slices compete")


@rule("ArgMax", "ArgMin", "TopK", "CumSum", "CumProd")
def _ordered(atoms: Atoms, node: Node) -> None:
    """Positions along the axis have a meaning."""
    x = node.inputs[0]
    axis = atoms.integers(node, 1) if node.op.startswith("Cum") else [int(node.attrs.get("axis", 0 if "Arg" in node.op else -1))]
    if axis is None:
        return atoms.pin_node(node, "its axis is not constant")
    axis = [axis[0] % atoms.rank(x)]
    atoms.pin(x, axis[0], why=f"the order along the axis matters to {node.op}")
    for y in node.outputs:
        if y.name and atoms.rank(y) == atoms.rank(x):
            atoms.same_axes(x, y, but=axis)
            atoms.pin(y, axis[0], why=f"the order along the axis matters to {node.op}")
        elif y.name:
            for k in range(atoms.rank(x)):
                if k != axis[0]:
                    atoms.same(x, k, y, k - (k > axis[0]))
    return None


# --- quantization -------------------------------------------------------------------------------------------


@rule("QuantizeLinear", "DequantizeLinear")
def _quantize(atoms: Atoms, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    atoms.same_axes(x, y)
    axis = int(node.attrs.get("axis", 1))
    for parameter in node.inputs[1:3]:
        if not parameter.name or atoms.rank(parameter) == 0 or atoms.shape(parameter) == (1,):
            continue
        if atoms.rank(parameter) == 1:
            atoms.same(parameter, 0, x, axis)
        else:
            atoms.pin(parameter, why="scales of blocks")
            atoms.same_axes(parameter, x)
