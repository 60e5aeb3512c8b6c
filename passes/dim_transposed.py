"""A ConvTranspose as the Conv that it equals: over its input with zeros between the elements, with the kernel turned.

    y[o, p] = sum over c, i, t with i s + t d - pad = p of  x[c, i] W[c, o, t]

so the patch under an output position, and with it moments and regression, are those of a Conv.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Constant, Node
from onnxcomp.linear import Linear

__all__ = ["equivalent", "representable", "spread", "turned_back"]

Array = npt.NDArray[Any]


def representable(view: Linear) -> bool:
    """Whether the padding is given in numbers and cuts nothing that the kernel does not reach."""
    attrs = view.node.attrs
    if attrs.get("auto_pad", "NOTSET") not in ("", "NOTSET") or "output_shape" in attrs:
        return False
    return all(p >= 0 for p in _padding(view))


def equivalent(view: Linear) -> Linear:
    """The Conv over the spread input."""
    weight = view.weight.values
    groups, spatial = view.groups, weight.ndim - 2
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    turned = np.flip(grouped.swapaxes(1, 2), axis=tuple(range(3, 3 + spatial)))
    constant = Constant(view.weight.name, turned.reshape(-1, *turned.shape[2:]))
    attrs = {"group": groups, "pads": _padding(view), "dilations": view.node.attrs.get("dilations", [1] * spatial)}
    return Linear(Node("Conv", attrs=attrs), constant, view.bias)


def spread(view: Linear, x: Array) -> Array:
    """The input with stride - 1 zeros between neighbours."""
    strides = view.node.attrs.get("strides", [1] * (x.ndim - 2))
    if all(s == 1 for s in strides):
        return x
    size = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], strides, strict=True)]
    wide = np.zeros((*x.shape[:2], *size), x.dtype)
    places: list[Any] = [slice(None, None, int(s)) for s in strides]
    wide[(slice(None), slice(None), *places)] = x
    return wide


def turned_back(view: Linear, weight: Array) -> Array:
    """A weight of the equivalent Conv, [outputs, inputs per group, kernel...], in the layout of the ConvTranspose."""
    groups, spatial = view.groups, weight.ndim - 2
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    turned = np.flip(grouped.swapaxes(1, 2), axis=tuple(range(3, 3 + spatial)))
    return np.asarray(turned.reshape(-1, *turned.shape[2:]))


def _padding(view: Linear) -> list[int]:
    kernel = view.weight.shape[2:]
    attrs, spatial = view.node.attrs, len(kernel)
    dilations = attrs.get("dilations", [1] * spatial)
    pads = attrs.get("pads", [0] * (2 * spatial))
    extra = attrs.get("output_padding", [0] * spatial)
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    begins = [r - p for r, p in zip(reach, pads[:spatial], strict=True)]
    return [*begins, *(r - p + e for r, p, e in zip(reach, pads[spatial:], extra, strict=True))]
