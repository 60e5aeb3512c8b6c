"""Coupling rules of elementwise operators and of products with weights.

Each function states what its operator's definition says about which slices belong together. Rules of normalization
and reductions are in dim_norm_rules.py, of operators that move elements in dim_layout_rules.py, of recurrent ones,
attention and control flow in dim_sequence_rules.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxcomp.graph import Constant, Node
from onnxcomp.passes.dim_atoms import SPATIAL, Atoms, rule

__all__ = ["ELEMENTWISE", "whole_groups"]

_ELEMENTWISE = """
    Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike
    Ceil Celu Clip Cos Cosh Div Dropout Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish
    Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal
    Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where
    Xor
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
_MICROSOFT_ELEMENTWISE = ("BiasAdd", "BiasGelu", "FastGelu", "Gelu", "QuickGelu", "BiasDropout")


@rule(*_ELEMENTWISE.split())
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
            atoms.pin(tensor, k, why=SPATIAL)


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
