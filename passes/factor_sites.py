"""Where two operators can take the place of one, what that costs, and the rewrite."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.gram import Gram
from onnxcomp.graph import Model
from onnxcomp.passes.dim_replay import piece
from onnxcomp.passes.dim_sites import Site, sites
from onnxcomp.passes.low_rank import Scheme, Split
from onnxcomp.passes.sparse_patterns import held_zeros

__all__ = ["Pair", "apply", "candidates", "time_ratio"]

Array = npt.NDArray[Any]
_SECONDS = 0.05


@dataclass(frozen=True)
class Pair:
    """An operator of the model and one way to split it; `positions` are those of the first operator and of the output.

    `mean` is that of the input [K], where a bias can take up what is lost on it, else None.
    """

    site: Site
    split: Split
    positions: tuple[int, int]
    mean: Array | None

    @property
    def macs(self) -> int:
        """Multiplications of the operator as it is, for one sample."""
        return self.site.length * self.site.view.outputs * self.positions[1]

    def macs_at(self, rank: int) -> int:
        outer = self.site.length // self.split.steps
        return rank * (outer * self.positions[0] + self.split.steps * self.site.view.outputs * self.positions[1])

    @property
    def params(self) -> int:
        return self.site.length * self.site.view.outputs

    def params_at(self, rank: int) -> int:
        return rank * (self.site.length // self.split.steps + self.split.steps * self.site.view.outputs)


def candidates(
    model: Model,
    wanted: Callable[[Site], bool],
    grams: Mapping[Any, Gram],
    shapes: Mapping[Any, tuple[int, ...]],
    refuse: Callable[[str, str], None],
) -> list[list[Pair]]:
    """For each operator that can be split, all schemes that can reach fewer multiplications or parameters."""
    found = []
    for site in sites(model):
        if not wanted(site):
            continue
        reason = _misfit(site, shapes)
        if reason is not None:
            refuse(site.node.label, reason)
            continue
        weight = site.matrix()[0]
        gram = grams.get(site.node)
        moment, mean = np.eye(len(weight)), None
        if gram is not None:
            moment = gram.covariance[0] if site.takes_bias else gram.products[0] / max(gram.rows, 1)
            mean = gram.mean[0] if site.takes_bias else None
        pairs = []
        for scheme in _schemes(site):
            split = Split.of(weight, moment, scheme, _kernel(site))
            pairs.append(Pair(site, split, _positions(site, scheme, shapes), mean))
        found.append(pairs)
    return found


def _misfit(site: Site, shapes: Mapping[Any, tuple[int, ...]]) -> str | None:
    view = site.view
    if len(view.weight.outputs) > 1:
        return f"{len(view.weight.outputs)} nodes share its weight"
    if view.op == "ConvTranspose":
        return "a ConvTranspose is not split"
    if view.groups > 1:
        return f"it has {view.groups} groups, each of which is small already"
    if held_zeros(view.weight.values) is not None:
        return "its weight was made sparse, and factors are dense"
    if site.node.inputs[0] not in shapes or site.node.outputs[0] not in shapes:
        return "the shapes around it are not known"
    return None


def _kernel(site: Site) -> tuple[int, ...]:
    return tuple(site.view.weight.shape[2:]) if site.view.op == "Conv" else ()


def _schemes(site: Site) -> list[Scheme]:
    kernel = _kernel(site)
    if int(np.prod(kernel)) == 1:
        return ["outputs"]
    return ["outputs", "inputs", "spatial"] if len(kernel) == 2 and min(kernel) > 1 else ["outputs", "inputs"]


def _positions(site: Site, scheme: Scheme, shapes: Mapping[Any, tuple[int, ...]]) -> tuple[int, int]:
    before, after = shapes[site.node.inputs[0]], shapes[site.node.outputs[0]]
    if site.view.op != "Conv":
        rows = int(np.prod(after[:-1]))
        return rows, rows
    out = before[0] * int(np.prod(after[2:]))
    across = before[0] * int(np.prod(before[2:]))
    return {"outputs": out, "inputs": across, "spatial": before[0] * after[2] * before[-1]}[scheme], out


def apply(model: Model, pair: Pair, rank: int) -> float:
    """Split the operator of the same name in `model` (a copy of the pair's); the relative error of its output."""
    site = next(s for s in sites(model) if s.node.outputs[0].name == pair.site.node.outputs[0].name)
    first, second = pair.split.factors(rank)
    product = pair.split.product(first, second)
    node, view = site.node, site.view
    middle = model.variable(f"{node.outputs[0].name}_factor", node.outputs[0].dtype)
    shift = None if pair.mean is None else pair.mean @ (pair.split.weight - product)
    if shift is not None:
        site.rewrite_bias(model, site.bias() + shift)
    if view.op == "Conv":
        attrs = _attributes(site, pair.split.scheme)
        kernels = [tuple(a["kernel_shape"]) for a in attrs]
        arrays = [first.T.reshape(rank, -1, *kernels[0]), second.T.reshape(view.outputs, rank, *kernels[1])]
        op, node.attrs = "Conv", attrs[1]
    else:
        attrs, arrays, op = [{}], [first, second], "MatMul"
        for name in ("alpha", "transB"):
            node.attrs.pop(name, None)
    constants = [
        model.constant(model.graph, f"{view.weight.name}_factor{k}", np.ascontiguousarray(a.astype(view.weight.dtype)))
        for k, a in enumerate(arrays, 1)
    ]
    label = f"{node.name}_factor" if node.name else ""
    model.graph.add(op, [node.inputs[0], constants[0]], [middle], name=label, attrs=attrs[0])
    model.graph.nodes.insert(model.graph.nodes.index(node), model.graph.nodes.pop())
    node.inputs[0], node.inputs[1] = middle, constants[1]
    return pair.split.error(product)


def _attributes(site: Site, scheme: Scheme) -> list[dict[str, Any]]:
    """Attributes of both convolutions: which of them steps, pads and dilates along which axis."""
    kernel, given = _kernel(site), site.node.attrs
    axes = len(kernel)
    mine = {"outputs": [True] * axes, "inputs": [False] * axes, "spatial": [True, False]}[scheme]
    strides, dilations = given.get("strides", [1] * axes), given.get("dilations", [1] * axes)
    pads = given.get("pads", [0] * (2 * axes))
    found = []
    for chosen in (mine, [not m for m in mine]):
        attrs: dict[str, Any] = {
            "kernel_shape": [k if m else 1 for k, m in zip(kernel, chosen, strict=True)],
            "strides": [s if m else 1 for s, m in zip(strides, chosen, strict=True)],
            "dilations": [d if m else 1 for d, m in zip(dilations, chosen, strict=True)],
        }
        if given.get("auto_pad", "NOTSET") in ("", "NOTSET"):
            attrs["pads"] = [p if m else 0 for p, m in zip(pads, [*chosen, *chosen], strict=True)]
        else:
            attrs["auto_pad"] = given["auto_pad"]
        found.append(attrs)
    return found


def time_ratio(model: Model, pair: Pair, rank: int, value: Array, threads: int) -> float:
    """Time of the pair over that of the operator on a real input: least of interleaved runs."""
    site = pair.site
    source, result = site.node.inputs[0].name, site.output.name
    split = model.copy()
    apply(split, pair, rank)
    sessions = [piece(m, {source: value.dtype}, [result], threads) for m in (model, split)]
    best = [float("inf")] * 2
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end or not np.isfinite(best[1]):
        for k, session in enumerate(sessions):
            begin = time.perf_counter()
            session.run({source: value}, [result])
            best[k] = min(best[k], time.perf_counter() - begin)
    return best[1] / best[0]
