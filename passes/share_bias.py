"""Biases of operators whose weights were shared: they take what sharing does to the mean of the output.

In the plain form a bias is a float initializer, the addend of the Add behind a MatMul, or missing. In a model with int8
weights it is int32 behind DequantizeLinear with the scale s_x s_w[c] that the kernel asks for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Constant, Graph, Model, Node, producer
from onnxcomp.passes.dim_sites import Site

__all__ = ["set_bias", "store_bias", "takes_bias"]

Array = npt.NDArray[Any]
_INT32 = 2**31 - 1


def takes_bias(model: Model, scope: Graph, site: Site | None) -> bool:
    """Whether the operator of the plain form can have a bias in `model`, where its weight may be stored as codes."""
    if site is None or not site.takes_bias:
        return False
    node = _twin(scope, site.node)
    addition = site.addition
    if addition is not None:
        return any(isinstance(t, Constant) for t in _twin(scope, addition).inputs)
    if isinstance(node.inputs[1], Constant):
        return True
    if len(node.inputs) > 2 and node.inputs[2].name:
        return isinstance(node.inputs[2], Constant) or _decoded(node.inputs[2])
    return _scale(node.inputs[0]) is not None and _scale(node.inputs[1]) is not None


def set_bias(model: Model, scope: Graph, site: Site, bias: Array) -> None:
    """Give the operator of a site (of this very model) a float bias [outputs]."""
    addition = site.addition
    if addition is not None:
        _replace_addend(model, scope, addition, bias)
        return
    site.node.attrs.pop("beta", None)
    wish = site.view.bias.name if site.view.bias is not None else f"{site.node.outputs[0].name}_bias"
    _attach(site.node, model.constant(scope, wish, bias.astype(site.view.weight.dtype)))


def store_bias(model: Model, scope: Graph, site: Site, bias: Array) -> None:
    """Give the twin of a site of the plain form a bias [outputs] in the form that its model has."""
    node, addition = _twin(scope, site.node), site.addition
    if addition is not None:
        _replace_addend(model, scope, _twin(scope, addition), bias)
        return
    given = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    wish = given.name if given is not None else f"{node.outputs[0].name}_bias"
    node.attrs.pop("beta", None)
    if given is not None and _decoded(given):
        scale = _scale(given)
    elif isinstance(node.inputs[1], Constant) or given is not None:
        _attach(node, model.constant(scope, wish, bias.astype(site.view.weight.dtype)))
        return
    else:
        x, w = _scale(node.inputs[0]), _scale(node.inputs[1])
        scale = None if x is None or w is None else (x * w).astype(np.float32)
    if scale is None:
        raise ValueError(f"{node.label} has no scale for a bias")  # `takes_bias` would have said so
    scales = np.broadcast_to(scale.reshape(-1), bias.shape).astype(np.float32)
    codes = np.clip(np.rint(bias / scales.astype(np.float64)), -_INT32, _INT32).astype(np.int32)
    stored = model.constant(scope, f"{wish}_q", codes)
    zero = model.constant(scope, f"{wish}_zero_point", np.zeros(bias.shape, np.int32))
    values = model.variable(f"{wish}_dq")
    scope.add(
        "DequantizeLinear", [stored, model.constant(scope, f"{wish}_scale", scales), zero], [values], attrs={"axis": 0}
    )
    _attach(node, values)


def _twin(scope: Graph, node: Node) -> Node:
    """The node of another copy of the scope that computes the same value."""
    name = node.outputs[0].name
    found: Node = next(n for n in scope.nodes if n.outputs and n.outputs[0].name == name)
    return found


def _decoded(tensor: Any) -> bool:
    return _scale(tensor) is not None


def _scale(tensor: Any) -> Array | None:
    """The constant scale of the DequantizeLinear that computes a value."""
    node = producer(tensor)
    if node is None or node.op != "DequantizeLinear" or not isinstance(node.inputs[1], Constant):
        return None
    return np.asarray(node.inputs[1].values)


def _replace_addend(model: Model, scope: Graph, addition: Node, bias: Array) -> None:
    place = next(k for k, t in enumerate(addition.inputs) if isinstance(t, Constant))
    old = addition.inputs[place]
    addition.inputs[place] = model.constant(scope, old.name, bias.astype(old.dtype).reshape(old.shape))


def _attach(node: Node, bias: Any) -> None:
    if len(node.inputs) > 2:
        node.inputs[2] = bias
    else:
        node.inputs.append(bias)
