"""What each operator costs in multiply-accumulate operations (MACs): one rule per operator.

A rule is a formula over the shapes of a node's inputs and outputs. Operators that are not here cost 0, except
those in `WITHOUT_RULE`, whose cost depends on more than shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from onnxcomp.graph import Node

__all__ = ["RULES", "WITHOUT_RULE", "Operands", "UnknownShape"]

Dims = tuple[int, ...]


class UnknownShape(Exception):
    """A shape that a rule needs is not known; the text says which. Never leaves `onnxcomp.macs`."""


class Operands:
    """A node as a rule sees it. `lookup` gives the shape of a tensor or raises UnknownShape."""

    def __init__(self, node: Node, lookup: Callable[[Any], Dims]) -> None:
        self._node, self._lookup = node, lookup

    def has(self, index: int) -> bool:
        """Whether the optional input is given."""
        return index < len(self._node.inputs) and bool(self._node.inputs[index].name)

    def input(self, index: int) -> Dims:
        if not self.has(index):
            raise UnknownShape(f"input {index} is missing")
        return self._lookup(self._node.inputs[index])

    def inputs(self) -> list[Dims]:
        return [self._lookup(t) for t in self._node.inputs]

    def output(self, index: int = 0) -> Dims:
        """Raises UnknownShape for an output that is left out, too."""
        if index >= len(self._node.outputs) or not self._node.outputs[index].name:
            raise UnknownShape(f"output {index} is not there")
        return self._lookup(self._node.outputs[index])

    def attr(self, name: str, default: Any) -> Any:
        return self._node.attrs.get(name, default)


def _conv(op: Operands, weight: int = 1) -> int:
    """Each output element sums over kernel and input channels of its group: W is [M, C/group, k...]."""
    return math.prod(op.output()) * math.prod(op.input(weight)[1:])


def _conv_transpose(op: Operands) -> int:
    """Each input element goes to kernel times output channels of its group: W is [C, M/group, k...]."""
    return math.prod(op.input(0)) * math.prod(op.input(1)[1:])


def _matmul(op: Operands, right: int = 1) -> int:
    """[..., M, K] x [..., K, N] with broadcast batches: M N K for each; FusedMatMul may transpose A."""
    a, b = op.input(0), op.input(right)
    if not a or not b:
        raise UnknownShape("an operand has rank 0")
    if op.attr("transA", 0) and len(a) > 1:
        depth = a[0] if op.attr("transBatchA", 0) else a[-2]
    else:
        depth = a[-1]
    return math.prod(op.output()) * depth


def _gemm(op: Operands) -> int:
    """[M, K] x [K, N]: M N K."""
    a = op.input(0)
    return math.prod(op.output()) * (a[0] if op.attr("transA", 0) else a[-1])


def _packed_matmul(op: Operands) -> int:
    """[..., K] x [K, N] with a packed right side whose width is the attribute N."""
    return math.prod(op.input(0)) * int(op.attr("N", 0))


def _einsum(op: Operands) -> int:
    """Product of the sizes of all labels, for two operands; one operand is a transposition or a sum: 0."""
    terms = str(op.attr("equation", "")).replace(" ", "").split("->")[0].split(",")
    operands = op.inputs()
    if len(operands) == 1:
        return 0
    if len(operands) > 2:
        raise UnknownShape("the cost of an Einsum of more than two operands depends on their order")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, operands, strict=True):
        before, dots, after = term.partition("...")
        # Axes under an ellipsis align at the end, like any broadcast.
        hidden = range(len(shape) - len(before) - len(after), 0, -1) if dots else range(0)
        for label, size in zip([*before, *(f"...{i}" for i in hidden), *after], shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), size)
    return math.prod(sizes.values())


def _recurrent(op: Operands) -> int:
    """Each step multiplies the input by W and the state by R, in each direction: T B (|W| + |R|)."""
    length, batch = op.input(0)[:2]  # the other way round with layout=1, which gives the same product
    return length * batch * (math.prod(op.input(1)) + math.prod(op.input(2)))


def _attention(op: Operands) -> int:
    """Attention of opset 23: Q K^T and P V, for all heads. Masked positions count."""
    q, k, v = op.input(0), op.input(1), op.input(2)
    past = op.input(4)[2] if op.has(4) else 0
    if len(q) == 4:  # [batch, heads, length, size]
        return math.prod(q[:3]) * (k[2] + past) * (q[3] + v[3])
    heads = int(op.attr("q_num_heads", 1)) // int(op.attr("kv_num_heads", 1))
    return math.prod(q[:2]) * (k[1] + past) * (q[2] + v[2] * heads)


def _attention_projected(op: Operands, past: int) -> int:
    """com.microsoft.Attention: x [B, S, H] times a weight for Q, K and V, then Q K^T and P V.

    `past` is the input [2, B, heads, P, size].
    """
    x, weight = op.input(0), op.input(1)
    batch, length = x[:2]
    widths: list[int] = op.attr("qkv_hidden_sizes", None) or [weight[1] // 3] * 3
    total = length + (op.input(past)[3] if op.has(past) else 0)
    return batch * length * (math.prod(weight) + total * (widths[0] + widths[2]))


def _attention_heads(op: Operands) -> int:
    """com.microsoft.MultiHeadAttention: Q K^T and P V. Q may be packed with K and V, K with V."""
    q = op.input(0)
    batch, length = q[:2]
    width = q[2] * q[4] if len(q) == 5 else q[2]
    total, width_v = length, width
    if op.has(1):
        k = op.input(1)
        total = k[2] if len(k) == 4 else k[1]
    if op.has(2):
        v = op.input(2)
        width_v = v[1] * v[3] if len(v) == 4 else v[2]
    total += op.input(6)[2] if op.has(6) else 0
    return batch * length * total * (width + width_v)


def _attention_grouped(op: Operands) -> int:
    """com.microsoft.GroupQueryAttention: Q K^T and P V, over the present and input 3 [B, heads, P, size]."""
    q = op.input(0)
    heads, shared = int(op.attr("num_heads", 1)), int(op.attr("kv_num_heads", 1))
    size = q[2] // (heads if op.has(1) else heads + 2 * shared)
    total = q[1] + (op.input(3)[2] if op.has(3) else 0)
    return q[0] * q[1] * total * 2 * heads * size


def _linear_model(op: Operands) -> int:
    """ai.onnx.ml: one product per coefficient and sample."""
    x = op.input(0)
    return (x[0] if len(x) > 1 else 1) * len(op.attr("coefficients", ()))


RULES: Mapping[str, Callable[[Operands], int]] = {
    "Conv": _conv,
    "DeformConv": _conv,
    "ConvInteger": _conv,
    "QLinearConv": partial(_conv, weight=3),
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearMatMul": partial(_matmul, right=3),
    "Einsum": _einsum,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "Attention": _attention,
    "com.microsoft.FusedConv": _conv,
    "com.microsoft.NhwcFusedConv": _conv,
    "com.microsoft.QLinearConv": partial(_conv, weight=3),
    "com.microsoft.ConvTransposeWithDynamicPads": _conv_transpose,
    "com.microsoft.FusedGemm": _gemm,
    "com.microsoft.QGemm": _gemm,
    "com.microsoft.GemmFloat8": _gemm,
    "com.microsoft.GemmFastGelu": _matmul,
    "com.microsoft.FusedMatMul": _matmul,
    "com.microsoft.FusedMatMulActivation": _matmul,
    "com.microsoft.TransposeMatMul": _matmul,
    "com.microsoft.SparseToDenseMatMul": _matmul,
    "com.microsoft.MatMulInteger16": _matmul,
    "com.microsoft.MatMulIntegerToFloat": _matmul,
    "com.microsoft.DynamicQuantizeMatMul": _matmul,
    "com.microsoft.MatMulNBits": _packed_matmul,
    "com.microsoft.MatMulBnb4": _packed_matmul,
    "com.microsoft.DynamicQuantizeLSTM": _recurrent,
    "com.microsoft.Attention": partial(_attention_projected, past=4),
    "com.microsoft.QAttention": partial(_attention_projected, past=8),
    "com.microsoft.MultiHeadAttention": _attention_heads,
    "com.microsoft.GroupQueryAttention": _attention_grouped,
    "ai.onnx.ml.LinearClassifier": _linear_model,
    "ai.onnx.ml.LinearRegressor": _linear_model,
}

# They multiply, but how much depends on values, or they contain whole models.
WITHOUT_RULE = frozenset(
    {
        "ai.onnx.ml.SVMClassifier",
        "ai.onnx.ml.SVMRegressor",
        "com.microsoft.AttnLSTM",
        "com.microsoft.BeamSearch",
        "com.microsoft.DecoderAttention",
        "com.microsoft.DecoderMaskedMultiHeadAttention",
        "com.microsoft.DecoderMaskedSelfAttention",
        "com.microsoft.GatedRelativePositionBias",
        "com.microsoft.GreedySearch",
        "com.microsoft.LongformerAttention",
        "com.microsoft.MatMulFpQ4",
        "com.microsoft.MoE",
        "com.microsoft.PackedAttention",
        "com.microsoft.PackedMultiHeadAttention",
        "com.microsoft.PagedAttention",
        "com.microsoft.QMoE",
        "com.microsoft.QOrderedAttention",
        "com.microsoft.QOrderedLongformerAttention",
        "com.microsoft.QOrderedMatMul",
        "com.microsoft.Sampling",
        "com.microsoft.SparseAttention",
        "com.microsoft.WhisperBeamSearch",
    }
)
