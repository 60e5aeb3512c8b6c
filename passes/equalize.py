"""equalize: give the channels of an activation similar ranges, so that one scale for all of them wastes less.

Between operators that commute with a positive factor per channel (Relu, LeakyRelu, pooling, sums, layout), a channel
can be divided by s where it is produced and multiplied by s where it is used, and the function stays the same:

    producers   W[c] / s[c],  b[c] / s[c]          consumers   W[., c] * s[c]

What was produced is quantized per output channel, so that division is free; the multiplication widens the spread
inside the consumers' channels. s[c] = (r[c] / max r)^strength balances the two, with r[c] the largest magnitude seen in
channel c (Nagel et al., arXiv:1906.04721, equalize weight ranges in pairs; Xiao et al., arXiv:2211.10438, activations
against weights). Values that are coupled, such as all that meet in a residual sum, share s. Depthwise convolutions in
between pass the factor on: of them only the bias changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.runner import collect
from onnxcomp.calibration.split import limited
from onnxcomp.calibration.statistics import TensorStatistics
from onnxcomp.errors import UsageError
from onnxcomp.graph import Constant, Graph, Model, Node
from onnxcomp.linear import Linear, linear
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.passes.dead import remove_dead
from onnxcomp.provenance import Origin, note
from onnxcomp.shapes import Shapes, infer

__all__ = ["Equalize", "equalize"]

Array = npt.NDArray[Any]
# Operators that commute with a positive factor per channel and keep the channels where they are.
_COMMUTES = frozenset({"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity"})
_LARGEST = 16.0  # factor between the widest and the narrowest channel that is evened out at most
_SAMPLES = 64


@dataclass(frozen=True)
class Equalize(Pass):
    """Cross-layer equalization from calibrated channel ranges. `strength` is the exponent of the range ratio."""

    name: ClassVar[str] = "equalize"
    effect: ClassVar[Effect] = "float"
    after: ClassVar[tuple[str, ...]] = ("fuse",)

    strength: float = 0.5

    @property
    def needs_data(self) -> bool:
        return True

    def run(self, model: Model, ctx: Context) -> Mapping[str, Any]:
        if ctx.data is None:
            raise UsageError("pass 'equalize' needs calibration data; give them with --calib")
        groups = [g for g in _groups(model) if g.pinned is None]
        requests: dict[str, int | None] = {t.name: 1 for g in groups for t in g.tensors}
        seen = collect(
            model, limited(ctx.data, _SAMPLES), requests, threads=ctx.threads, memory=ctx.memory, histogram=False
        )
        done = equalize(model, groups, seen, ctx, self.strength)
        remove_dead(model, Context())  # the weights that rescaled ones replaced
        return {"groups": done}


@dataclass
class Group:
    """Values whose channels must be scaled alike; who produces them, who uses them up, and the depthwise convolutions
    in between. `members` are all values of the group, `tensors` those that these nodes touch.
    """

    channels: int
    tensors: dict[Any, None] = field(default_factory=dict)
    members: list[Any] = field(default_factory=list)
    producers: list[Node] = field(default_factory=list)
    consumers: list[Node] = field(default_factory=list)
    between: list[Node] = field(default_factory=list)
    pinned: str | None = None


def equalize(
    model: Model, groups: list[Group], seen: Mapping[str, TensorStatistics], ctx: Context, strength: float
) -> int:
    """Rescale the groups, in place; returns how many."""
    done = 0
    for group in groups:
        statistics = [seen[t.name].channels for t in group.tensors if t.name in seen]
        peaks = [s.peak for s in statistics if s is not None and len(s.peak) == group.channels]
        if not peaks or not group.producers or not group.consumers:
            continue
        # Each value counts relative to its own widest channel: that is what its scale follows.
        spread = np.max([p / max(float(p.max()), 1e-30) for p in peaks], axis=0)
        factor = np.clip(spread, 1 / _LARGEST, 1.0) ** strength
        if factor.min() > 0.9 or not ctx.allow(f"channels of {next(iter(group.tensors)).name}"):
            continue
        _rescale(model, group, factor)
        scale = (1, tuple((1 / factor).tolist()))
        note(model, {t.name: Origin(t.name, scale=scale) for t in group.members})
        done += 1
    return done


def _rescale(model: Model, group: Group, factor: Array) -> None:
    """Divide channel c by factor[c] where it is produced, multiply where it is used up.

    The views are taken anew: the weight of a node between two groups changes twice.
    """
    for node in group.producers:
        view = _view(model, node)
        view.rewrite(model, model.graph, view.scaled_outputs(1 / factor), _bias(view, 1 / factor))
    for node in group.between:
        view = _view(model, node)
        view.rewrite(model, model.graph, view.weight.values, _bias(view, 1 / factor))
    for node in group.consumers:
        view = _view(model, node)
        view.rewrite(model, model.graph, view.scaled_inputs(factor), _bias(view, np.ones(1)))


def _view(model: Model, node: Node) -> Linear:
    view = linear(model, node)
    if view is None:
        raise ValueError(f"{node.label} has lost its constant weight")
    return view


def _bias(view: Linear, factor: Array) -> Array | None:
    return None if view.bias is None else view.bias_values() * factor


def _groups(model: Model) -> list[Group]:
    """Groups of the main graph, by union over operators that commute; what else reads or makes a value pins it."""
    scope, shapes = model.graph, infer(model)
    finder = _Finder()
    for node in scope.nodes:
        if _commutes(model, node, shapes):
            for tensor in [t for t in node.inputs if not isinstance(t, Constant) and t.name][1:] + list(node.outputs):
                finder.join(node.inputs[0], tensor)
        elif (view := linear(model, node)) is not None and view.depthwise and view.inputs == view.outputs:
            finder.join(node.inputs[0], node.outputs[0])
    found: dict[Any, Group] = {}

    def group(tensor: Any, channels: int) -> Group:
        entry = found.setdefault(finder.root(tensor), Group(channels))
        entry.tensors.setdefault(tensor)
        if entry.channels != channels:
            entry.pinned = "its channels are counted differently by different operators"
        return entry

    for node in scope.nodes:
        _enter(model, scope, node, shapes, finder, group)
    pinned = {finder.root(t) for t in [*scope.inputs, *scope.outputs, *finder.pins]}
    for tensor in (t for node in scope.nodes for t in node.outputs if t.name):
        if finder.root(tensor) in found:
            found[finder.root(tensor)].members.append(tensor)
    for root, entry in found.items():
        if root in pinned:
            entry.pinned = "an operator that does not commute with a factor reads or makes it"
    return list(found.values())


def _enter(model: Model, scope: Graph, node: Node, shapes: Shapes, finder: _Finder, group: Any) -> None:
    """Note what a node is to the groups of its values."""
    view = linear(model, node)
    if view is not None and view.op != "ConvTranspose" and len(view.weight.outputs) == 1:
        if view.depthwise and view.inputs == view.outputs:
            group(node.outputs[0], view.outputs).between.append(node)
            return
        if view.op == "Conv" or shapes[node.inputs[0]].rank == 2:
            group(node.outputs[0], view.outputs).producers.append(node)
            group(node.inputs[0], view.inputs).consumers.append(node)
            return
    if view is not None or not _commutes(model, node, shapes):
        finder.pins.extend(t for t in (*node.inputs, *node.outputs) if t.name and not isinstance(t, Constant))
    for body in node.bodies():
        finder.pins.extend(t for s in body.scopes() for n in s.nodes for t in n.inputs if t.name)


def _commutes(model: Model, node: Node, shapes: Shapes) -> bool:
    if node.domain or not node.inputs or isinstance(node.inputs[0], Constant):
        return False
    if node.op in _COMMUTES:
        return len([o for o in node.outputs if o.name]) == 1
    if node.op == "Add":
        a, b = (shapes[t].shape for t in node.inputs)
        constant = any(isinstance(t, Constant) for t in node.inputs)
        return not constant and a is not None and a[1:2] == (b or ())[1:2]
    if node.op in ("Flatten", "Reshape", "Squeeze"):
        before, after = shapes[node.inputs[0]].shape, shapes[node.outputs[0]].shape
        if before is None or after is None or len(before) < 2 or len(after) != 2:
            return False
        return before[1] == after[1] and isinstance(after[1], int)
    return False


class _Finder:
    """Union-find over values, and the values that something else reads or makes."""

    def __init__(self) -> None:
        self._parent: dict[Any, Any] = {}
        self.pins: list[Any] = []

    def root(self, tensor: Any) -> Any:
        while tensor in self._parent:
            tensor = self._parent[tensor]
        return tensor

    def join(self, a: Any, b: Any) -> None:
        a, b = self.root(a), self.root(b)
        if a is not b:
            self._parent[b] = a
