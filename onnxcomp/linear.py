"""One view of the operators that multiply by a weight: Conv, ConvTranspose, Gemm, MatMul.

    y[..., c, ...] = sum_k x[k] W[k, c] + b[c]

Every pass that changes weights (fusion, equalization, pruning, quantization) sees where the weight is, which of its
axes are input and output channels, and where the bias is, and need not know the four operators apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Constant, Graph, Model, Node
from onnxcomp.shapes import Shapes

__all__ = ["LINEAR_OPS", "Linear", "linear"]

Array = npt.NDArray[Any]
LINEAR_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Linear:
    """A node with a constant weight. `weight` is input 1; `bias` is the constant bias, None if there is none.

    `alpha` and `beta` are Gemm's factors (1 for the others).
    """

    node: Node
    weight: Constant
    bias: Constant | None
    alpha: float = 1.0
    beta: float = 1.0

    @property
    def op(self) -> str:
        return str(self.node.op)

    @property
    def groups(self) -> int:
        return int(self.node.attrs.get("group", 1)) if self.op in ("Conv", "ConvTranspose") else 1

    @property
    def transposed(self) -> bool:
        """Gemm with transB: the weight is [out, in]."""
        return bool(self.node.attrs.get("transB", 0))

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        shape = self.weight.shape
        if self.op == "Conv":
            return shape[0]
        if self.op == "ConvTranspose":
            return shape[1] * self.groups
        return shape[0] if self.transposed else shape[-1]

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        shape = self.weight.shape
        if self.op == "Conv":
            return shape[1] * self.groups
        return shape[1] if self.transposed else shape[-2] if self.op == "MatMul" else shape[0]

    @property
    def depthwise(self) -> bool:
        return self.op == "Conv" and self.groups > 1 and self.weight.shape[1] == 1

    def channel_axis(self, rank: int) -> int:
        """Axis of the output channels in an output of this rank, counted from the end."""
        return 1 - rank if self.op in ("Conv", "ConvTranspose") else -1

    def scaled_outputs(self, factor: Array) -> Array:
        """The weight (float64) with output channel c multiplied by factor[c]."""
        w = self.weight.values.astype(np.float64) * self.alpha
        spatial = (1,) * (w.ndim - 2)
        if self.op == "Conv":
            return w * factor.reshape(-1, 1, *spatial)
        if self.op == "ConvTranspose":
            grouped = w.reshape(self.groups, -1, *w.shape[1:])
            return (grouped * factor.reshape(self.groups, 1, -1, *spatial)).reshape(w.shape)
        return w * (factor[:, None] if self.transposed else factor)

    def scaled_inputs(self, factor: Array) -> Array:
        """The weight (float64) with input channel k multiplied by factor[k]."""
        w = self.weight.values.astype(np.float64) * self.alpha
        spatial = (1,) * (w.ndim - 2)
        if self.op == "Conv":
            per_group = factor.reshape(self.groups, 1, -1, *spatial)
            return (w.reshape(self.groups, -1, *w.shape[1:]) * per_group).reshape(w.shape)
        if self.op == "ConvTranspose":
            return w * factor.reshape(-1, 1, *spatial)
        return w * (factor if self.transposed else factor[:, None])

    def response(self, x: Array) -> Array:
        """Output of each channel (float64, without bias) to an input that is x[k] everywhere in channel k."""
        w = self.scaled_inputs(x)
        if self.op == "Conv":
            return np.asarray(w.sum(axis=tuple(range(1, w.ndim))))
        if self.op == "ConvTranspose":
            raise ValueError("the response of a ConvTranspose to a constant depends on the position")
        return np.asarray(w.sum(axis=1 if self.transposed else 0))

    def bias_values(self) -> Array:
        """The bias per output channel in float64, zeros if there is none."""
        if self.bias is None:
            return np.zeros(self.outputs)
        return np.broadcast_to(self.bias.values.astype(np.float64).reshape(-1) * self.beta, (self.outputs,)).copy()

    def rewrite(self, model: Model, scope: Graph, weight: Array, bias: Array | None) -> None:
        """Give the node a new weight and bias (cast to the weight's type); shared tensors stay as they are."""
        dtype = self.weight.dtype
        self.node.inputs[1] = model.constant(scope, self.weight.name, weight.astype(dtype))
        for factor in ("alpha", "beta"):
            self.node.attrs.pop(factor, None)
        if bias is None:
            return
        if self.op == "MatMul":
            raise ValueError("a MatMul has no bias")
        wish = self.bias.name if self.bias is not None else f"{self.node.outputs[0].name}_bias"
        constant = model.constant(scope, wish, bias.astype(dtype))
        if len(self.node.inputs) > 2:
            self.node.inputs[2] = constant
        else:
            self.node.inputs.append(constant)


def linear(model: Model, node: Node) -> Linear | None:
    """The view of a node, or None where it is not one of the four, or its weight or bias is not constant.

    A constant in the first operand of a MatMul or Gemm, a transposed first operand, and a bias that is not one value
    per output channel are not handled.
    """
    if node.op not in LINEAR_OPS or node.domain or len(node.inputs) < 2 or not node.plain:
        return None
    weight = node.inputs[1]
    if not isinstance(weight, Constant) or weight.sparse is not None or weight.dtype.kind not in "fV":
        return None
    if node.op in ("Gemm", "MatMul"):
        if len(weight.shape) != 2 or node.attrs.get("transA", 0) or isinstance(node.inputs[0], Constant):
            return None
    elif len(weight.shape) < 3:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    found = Linear(
        node, weight, None, float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    ) if node.op == "Gemm" else Linear(node, weight, None)
    if bias is None:
        return found
    if not isinstance(bias, Constant):
        return None
    per_channel = bias.weight.size == found.outputs and bias.shape[-1:] == (found.outputs,)
    if not per_channel and not (node.op == "Gemm" and bias.weight.size == 1):
        return None
    return Linear(found.node, found.weight, bias, found.alpha, found.beta)


def per_channel(constant: Array, rank: int | None, axis: int, channels: int) -> Array | None:
    """A constant operand as one float64 value per channel, if it broadcasts along the channel axis only.

    `rank` is the rank of the other operand and `axis` its channel axis, counted from the end. None if it varies along
    another axis or would add axes.
    """
    if constant.size == 1 and (rank is None or constant.ndim <= rank):
        return np.full(channels, constant.astype(np.float64).reshape(()))
    if rank is None or constant.ndim > rank or constant.size != channels or constant.ndim < -axis:
        return None
    return constant.astype(np.float64).reshape(-1) if constant.shape[axis] == channels else None


def output_rank(view: Linear, shapes: Shapes) -> int | None:
    """Rank of the node's output: given by the weight, except for MatMul."""
    if view.op == "MatMul":
        return shapes[view.node.outputs[0]].rank or shapes[view.node.inputs[0]].rank
    return len(view.weight.shape)
