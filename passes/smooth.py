"""Smoothing: outlier channels in front of matrix products move into the weights, where they cost less.

A value with a few large channels wastes the codes of all others. Where it comes out of a normalization, dividing
channel j by s_j costs nothing, as that goes into gamma and beta, and the rows of the weights behind it are multiplied:

    gamma_j / s_j,  beta_j / s_j,  W[j, .] s_j        s_j = max |x_j|^a / max_k |W[j, k]|^(1 - a)

(SmoothQuant, Xiao et al., arXiv:2211.10438). The exponent a is chosen for each value by what rounding is expected to
cost: with D_x the step of the activations and D_k that of column k of the weights, up to a factor

    D_x^2 sum_jk (s_j W_jk)^2 + sum_k D_k^2 sum_j E[x_j^2] / s_j^2

A value that anything but such products reads stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.statistics import TensorStatistics
from onnxcomp.graph import Constant, Model, Node, producer
from onnxcomp.linear import Linear, linear

__all__ = ["Site", "sites", "smooth"]

Array = npt.NDArray[Any]
_EXPONENTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_WORTH = 0.9  # of the expected error at most, else nothing is changed
_WIDEST = 1e3  # factor between channels


@dataclass(frozen=True)
class Site:
    """A value, the constants (node, position of the input) that its channels can be divided by, and who reads it."""

    value: Any
    constants: tuple[tuple[Node, int], ...]
    readers: tuple[Linear, ...]


def sites(model: Model) -> list[Site]:
    """Values of the main graph between a normalization and nothing but matrix products."""
    outputs = model.outputs()
    captured = {t for n in model.graph.nodes for b in n.bodies() for s in b.scopes() for m in s.nodes for t in m.inputs}
    found = []
    for node in model.graph.nodes:
        value = node.outputs[0] if node.outputs else None
        if value is None or value in outputs or value in captured or not value.outputs:
            continue
        views = [linear(model, reader) for reader in value.outputs]
        products = [v for v in views if v is not None and v.op in ("Gemm", "MatMul")]
        readers = tuple(v for v in products if v.weight.dtype == np.float32)
        if len(readers) < len(views) or any(v.node.inputs[0] is not value for v in readers):
            continue
        constants = _constants(node, readers[0].inputs)
        if constants:
            found.append(Site(value, constants, readers))
    return found


def _constants(node: Node, channels: int) -> tuple[tuple[Node, int], ...]:
    """Where gamma and beta are; empty if the node is no end of a normalization."""
    if node.domain:
        return ()
    if node.op == "LayerNormalization" and len([o for o in node.outputs if o.name]) == 1:
        places = [i for i in (1, 2) if i < len(node.inputs) and node.inputs[i].name]
        return tuple((node, i) for i in places) if all(_is_vector(node.inputs[i], channels) for i in places) else ()
    place = next((i for i, t in enumerate(node.inputs) if _is_vector(t, channels)), None)
    if place is None or len(node.inputs) != 2 or node.op not in ("Mul", "Add"):
        return ()
    if node.op == "Mul":
        return ((node, place),)
    inner = producer(node.inputs[1 - place])
    if inner is None or inner.op != "Mul" or len(inner.outputs[0].outputs) != 1:
        return ()
    behind = _constants(inner, channels)
    return (*behind, (node, place)) if behind else ()


def _is_vector(tensor: Any, channels: int) -> bool:
    return isinstance(tensor, Constant) and tensor.dtype == np.float32 and tensor.shape == (channels,)


def smooth(model: Model, seen: Mapping[str, TensorStatistics]) -> int:
    """Smooth the values of `sites(model)` for which `seen` has statistics per channel, in place; returns how many."""
    done = 0
    for site in sites(model):
        channels = seen[site.value.name].channels if site.value.name in seen else None
        if channels is None or len(channels.peak) != site.readers[0].inputs:
            continue
        factor = _factor(site, channels.peak, channels.squares / max(channels.count, 1))
        if factor is None:
            continue
        for node, place in site.constants:
            old = node.inputs[place]
            node.inputs[place] = model.constant(model.graph, old.name, (old.values / factor).astype(np.float32))
        for node in dict.fromkeys(v.node for v in site.readers):
            view = linear(model, node)
            assert view is not None
            bias = None if view.bias is None else view.bias_values()
            view.rewrite(model, model.graph, view.scaled_inputs(factor), bias)
        done += 1
    return done


def _factor(site: Site, peak: Array, power: Array) -> Array | None:
    """The best s [channels] of those that the exponents give, None if there is hardly anything to gain."""
    weights = []
    for view in site.readers:
        w = view.weight.values.astype(np.float64) * view.alpha
        weights.append(w.T if view.transposed else w)
    w = np.concatenate(weights, axis=1)
    rows = np.abs(w).max(axis=1)
    used = (peak > 0) & (rows > 0)
    if not used.any():
        return None
    best, found = _WORTH * _expected_error(w, peak, power, np.ones(len(peak))), None
    for exponent in _EXPONENTS:
        factor = np.ones(len(peak))
        factor[used] = peak[used] ** exponent / rows[used] ** (1 - exponent)
        factor[used] /= np.exp(np.log(factor[used]).mean())
        factor = np.clip(factor, 1 / _WIDEST, _WIDEST)
        error = _expected_error(w, peak, power, factor)
        if error < best:
            best, found = error, factor
    return found


def _expected_error(w: Array, peak: Array, power: Array, factor: Array) -> float:
    scaled = w * factor[:, None]
    step = 2 * float((peak / factor).max()) / 255
    columns = np.abs(scaled).max(axis=0) / 127
    return float(step**2 * np.square(scaled).sum() + np.square(columns).sum() * (power / np.square(factor)).sum())
