"""The reference of the proof where an average runs over a removed axis: the original that averages over what stays.

Zero is not what a normalization sees of a slice that is gone: the mean of the others has to be taken over fewer. With
M the mask of slices that stay and f their share,

    ReduceMean(x)    becomes   ReduceMean(x M / f)
    ReduceMax(x)     becomes   ReduceMax(where(M, x, lowest)), and so on with what each reduction does not see
    LayerNorm(x)     becomes   d / sqrt(mean(d^2) / f + eps) scale + bias,   d = (x - mean(x M) / f) M

and RMS, skip and mean-variance normalization alike. LRN scales by neighbours, which removal brings closer: what stands
there after it is no function of the original's slices, so such a removal cannot be proven.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Graph, Model, Node

__all__ = ["AVERAGES", "Average"]

Array = npt.NDArray[Any]


class Average:
    """A node of the copy that averages over axes of its first input: for each, which slices stay (bool)."""

    def __init__(
        self, model: Model, scope: Graph, node: Node, keep: Mapping[int, Array], rank: int, dtype: Any
    ) -> None:
        self.node = node
        self.rank = rank
        self.dtype = np.dtype(dtype)
        self._model = model
        self._scope = scope
        self._keep = keep
        self.share = float(np.prod([k.mean() for k in keep.values()]))

    def mask(self) -> Array:
        """bool, of the rank of the input."""
        found = np.ones((1,) * self.rank, bool)
        for axis, keep in self._keep.items():
            found = found & keep.reshape([-1 if k == axis else 1 for k in range(self.rank)])
        return found

    def add(self, op: str, *inputs: Any, **attrs: Any) -> Any:
        """The output of a new node; arrays become constants, floats of the type of the input."""
        result = self._model.variable(f"{self.node.outputs[0].name}_proof", self.dtype)
        operands = [self._constant(x) if isinstance(x, (np.ndarray, float)) else x for x in inputs]
        self._scope.add(op, operands, [result], attrs=attrs, name=result.name)
        return result

    def mean(self, x: Any, axes: list[int]) -> Any:
        """Over what stays, of a value that is zero elsewhere."""
        if self._model.opset < 18:
            found = self.add("ReduceMean", x, axes=axes, keepdims=1)
        else:
            found = self.add("ReduceMean", x, np.asarray(axes, np.int64), keepdims=1)
        return self.add("Div", found, self.share)

    def becomes(self, value: Any, total: Any = None) -> None:
        """The node passes this value on; its fourth output is `total`."""
        outputs = list(self.node.outputs)
        self.node.op, self.node.domain, self.node.inputs, self.node.outputs = "Identity", "", [value], outputs[:1]
        self.node.attrs.clear()
        if len(outputs) > 3 and outputs[3].name:
            self._scope.add("Identity", [total], [outputs[3]], name=outputs[3].name)

    def _constant(self, values: Array | float) -> Any:
        array = values if isinstance(values, np.ndarray) else np.asarray(values, self.dtype)
        return self._model.constant(self._scope, f"{self.node.outputs[0].name}_proof", array)


def _reduction(unseen: Callable[[np.dtype[Any]], Any]) -> Callable[[Average], None]:
    def rewrite(average: Average) -> None:
        fill = np.asarray(unseen(average.dtype), average.dtype)
        x = average.node.inputs[0]
        if average.node.op == "ReduceMean":
            x = average.add("Div", x, average.share)
        average.node.inputs[0] = average.add("Where", average.mask(), x, fill)

    return rewrite


def _lowest(dtype: np.dtype[Any]) -> Any:
    return np.finfo(dtype).min if dtype.kind == "f" else np.iinfo(dtype).min


def _highest(dtype: np.dtype[Any]) -> Any:
    return np.finfo(dtype).max if dtype.kind == "f" else np.iinfo(dtype).max


def _normalized(average: Average, x: Any, axes: list[int], *, centered: bool, epsilon: float) -> Any:
    mask = average.mask().astype(average.dtype)
    x = average.add("Mul", x, mask)
    if centered:
        x = average.add("Mul", average.add("Sub", x, average.mean(x, axes)), mask)
    power = average.mean(average.add("Mul", x, x), axes)
    return average.add("Div", x, average.add("Sqrt", average.add("Add", power, epsilon)))


def _layer_norm(average: Average) -> None:
    node = average.node
    axes = list(range(int(node.attrs.get("axis", -1)) % average.rank, average.rank))
    epsilon, centered = float(node.attrs.get("epsilon", 1e-5)), node.op == "LayerNormalization"
    y = _normalized(average, node.inputs[0], axes, centered=centered, epsilon=epsilon)
    average.becomes(_affine(average, y, node.inputs[1:3]))


def _skip_layer_norm(average: Average) -> None:
    node = average.node
    centered = node.op == "SkipLayerNormalization"
    parameters = 2 if centered else 1  # a scale, and where it is centered a shift
    total = average.add("Add", node.inputs[0], node.inputs[1])
    for bias in node.inputs[2 + parameters :]:
        total = average.add("Add", total, bias) if bias.name else total
    y = _normalized(
        average, total, [average.rank - 1], centered=centered, epsilon=float(node.attrs.get("epsilon", 1e-12))
    )
    y = _affine(average, y, node.inputs[2 : 2 + parameters])
    average.becomes(y, total)


def _affine(average: Average, y: Any, parameters: list[Any]) -> Any:
    for op, parameter in zip(("Mul", "Add"), parameters, strict=False):
        y = average.add(op, y, parameter) if parameter.name else y
    return y


def _lp_norm(average: Average) -> None:
    average.node.inputs[0] = average.add("Mul", average.node.inputs[0], average.mask().astype(average.dtype))


def _mean_variance(average: Average) -> None:
    axes = [int(k) % average.rank for k in average.node.attrs.get("axes", [0, 2, 3])]
    average.becomes(_normalized(average, average.node.inputs[0], axes, centered=True, epsilon=1e-18))


AVERAGES: Mapping[str, Callable[[Average], None]] = {
    "ReduceMean": _reduction(lambda dtype: 0),
    "ReduceLogSum": _reduction(lambda dtype: 0),
    "ReduceProd": _reduction(lambda dtype: 1),
    "ReduceMax": _reduction(_lowest),
    "ReduceLogSumExp": _reduction(_lowest),
    "ReduceMin": _reduction(_highest),
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _layer_norm,
    "SimplifiedLayerNormalization": _layer_norm,
    "com.microsoft.SkipLayerNormalization": _skip_layer_norm,
    "com.microsoft.SkipSimplifiedLayerNormalization": _skip_layer_norm,
    "LpNormalization": _lp_norm,
    "MeanVarianceNormalization": _mean_variance,
}
