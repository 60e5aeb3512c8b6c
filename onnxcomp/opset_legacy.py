"""Operators that ONNX Runtime knows up to opset 9 only, as operators of opset 7."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Node
from onnxcomp.opset_site import RefusedError, UpgradeSite, take

__all__ = ["LAST_LEGACY", "LEGACY"]

LAST_LEGACY = 9


def _affine(site: UpgradeSite, node: Node) -> None:
    """alpha · x + beta"""
    scaled = _elementwise(site, node, "Mul", node.inputs[0], take(node, "alpha", 1.0))
    _elementwise(site, node, "Add", scaled, take(node, "beta", 0.0), _give_output(node))


def _image_scaler(site: UpgradeSite, node: Node) -> None:
    """scale · x + bias, one bias per channel; x is [N, C, H, W]."""
    scaled = _elementwise(site, node, "Mul", node.inputs[0], take(node, "scale", 1.0))
    bias = np.reshape(take(node, "bias", []), (-1, 1, 1))
    _elementwise(site, node, "Add", scaled, bias, _give_output(node))


def _scale(site: UpgradeSite, node: Node) -> None:
    """scale · x"""
    _elementwise(site, node, "Mul", node.inputs[0], take(node, "scale", 1.0), _give_output(node))


def _scaled_function(op: str) -> Callable[[UpgradeSite, Node], None]:
    """An adapter for alpha · op(beta · x)."""

    def adapt(site: UpgradeSite, node: Node) -> None:
        alpha, beta = take(node, "alpha"), take(node, "beta")
        if alpha is None or beta is None:
            raise RefusedError("it has no alpha or beta")
        scaled = _elementwise(site, node, "Mul", node.inputs[0], beta)
        value = site.insert(op, [scaled], site.model.variable(f"{node.outputs[0].name}_{op}", scaled.dtype))
        _elementwise(site, node, "Mul", value, alpha, _give_output(node))

    return adapt


def _crop(site: UpgradeSite, node: Node) -> None:
    """x[:, :, top : H - bottom, left : W - right]; `scale` (height, width) replaces bottom and right."""
    border, size = take(node, "border", []), take(node, "scale")
    if len(border) != 4:
        raise RefusedError(f"its border has {len(border)} elements, 4 expected")
    left, top, right, bottom = border
    end = np.iinfo(np.int64).max
    ends = [top + size[0], left + size[1]] if size else [-bottom or end, -right or end]
    attrs = {"starts": [top, left], "ends": ends, "axes": [2, 3]}
    site.insert("Slice", [node.inputs[0]], _give_output(node), attrs)


def _give_output(node: Node) -> Any:
    """The output of a node that is about to go; a tensor has one producer."""
    output = node.outputs[0]
    node.outputs.clear()
    return output


def _elementwise(site: UpgradeSite, node: Node, op: str, x: Any, operand: npt.ArrayLike, output: Any = None) -> Any:
    dtype = site.types[node.inputs[0]].dtype or node.inputs[0].dtype or np.dtype(np.float32)
    output = site.model.variable(f"{x.name}_{op}", dtype) if output is None else output
    return site.insert(op, [x, site.constant(f"{x.name}_{op}_operand", operand, dtype)], output)


LEGACY: dict[str, Callable[[UpgradeSite, Node], None]] = {
    "Affine": _affine,
    "Crop": _crop,
    "ImageScaler": _image_scaler,
    "ParametricSoftplus": _scaled_function("Softplus"),
    "Scale": _scale,
    "ScaledTanh": _scaled_function("Tanh"),
}
