"""The product of an operator with its weight, and its gradients, tap by tap of the kernel.

    y[o, n, p] = sum over c, k of W[o, c, k] x[c, n, p s + k d - begin]

Values have their channels first, then samples, then positions: [channels, samples, *spatial], float32, so that every
tap is one matrix product for each group. A Gemm or MatMul is a kernel of one tap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.gram import padding
from onnxcomp.linear import Linear

__all__ = ["Product"]

Array = npt.NDArray[Any]


class Product:
    """Of `view` (Conv, Gemm or MatMul) with inputs of `spatial` extents. Weights are [groups, O/g, C/g, taps]."""

    def __init__(self, view: Linear, spatial: Sequence[int]) -> None:
        self._groups = view.groups
        kernel = view.weight.shape[2:] if view.op == "Conv" else (1,) * len(spatial)
        ones = [1] * len(kernel)
        attrs = view.node.attrs if view.op == "Conv" else {}
        strides, dilations = list(attrs.get("strides", ones)), list(attrs.get("dilations", ones))
        self._pads = [(0, 0)] * len(kernel)
        if view.op == "Conv":
            self._pads = padding(view, tuple(spatial), kernel, strides, dilations)
        self._padded = [e + sum(pads) for e, pads in zip(spatial, self._pads, strict=True)]
        spans = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
        self.positions = [(e - w) // s + 1 for e, w, s in zip(self._padded, spans, strides, strict=True)]
        self._windows = [
            tuple(
                slice(k * d, k * d + (n - 1) * s + 1, s)
                for k, d, n, s in zip(tap, dilations, self.positions, strides, strict=True)
            )
            for tap in np.ndindex(*kernel)
        ]

    def forward(self, x: Array, weight: Array) -> Array:
        """y, [O, samples, *positions]."""
        total = sum(np.matmul(weight[..., k], columns) for k, columns in enumerate(self._columns(x)))
        return np.asarray(total).reshape(-1, x.shape[1], *self.positions)

    def to_weight(self, x: Array, gradient: Array) -> Array:
        """The gradient of the weight from that of y."""
        rows = gradient.reshape(self._groups, -1, gradient[0].size)
        return np.stack([np.matmul(rows, columns.transpose(0, 2, 1)) for columns in self._columns(x)], axis=-1)

    def to_input(self, weight: Array, gradient: Array) -> Array:
        """The gradient of x from that of y."""
        rows = gradient.reshape(self._groups, -1, gradient[0].size)
        samples = gradient.shape[1]
        channels = weight.shape[0] * weight.shape[2]
        found = np.zeros((channels, samples, *self._padded), gradient.dtype)
        for k, window in enumerate(self._windows):
            part = np.matmul(weight[..., k].transpose(0, 2, 1), rows)
            found[:, :, *window] += part.reshape(channels, samples, *self.positions)
        inside = (slice(a, e - b) for e, (a, b) in zip(self._padded, self._pads, strict=True))
        return found[:, :, *inside]

    def _columns(self, x: Array) -> Iterator[Array]:
        """For each tap what it is multiplied with: [groups, C/g, samples * positions]."""
        padded = np.pad(x, [(0, 0), (0, 0), *self._pads]) if any(map(any, self._pads)) else x
        for window in self._windows:
            yield padded[:, :, *window].reshape(self._groups, len(x) // self._groups, -1)
