"""Which channels have to be scaled alike: values connected by operators that pass a positive factor per channel on.

An operator f commutes with factors s > 0 per channel where f(s x) = s f(x): rectifiers, pooling, sums, interpolation,
and what only moves channels as a whole. Where channels move to other places (Pad, Concat, Split and Slice along the
channel axis), channel c of one value is channel c + d of another one: all values of a group have a place among its
channels. What does not commute, and what is no longer consistent, pins a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from onnxcomp.graph import Constant, Model, Node
from onnxcomp.linear import linear
from onnxcomp.passes.site import Site
from onnxcomp.shapes import infer

__all__ = ["Group", "channel_groups"]

_COMMUTES = frozenset(
    {"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity"}
)  # fmt: skip
_FLAT = ("Flatten", "Reshape", "Squeeze")
Link = tuple[Any, Any, int]  # channel c of the first value is channel c + d of the second


@dataclass
class Group:
    """Values whose channels must be scaled alike; who produces them, who uses them up, and the depthwise convolutions
    in between. `places` has the channels of each value among those of the group, `tensors` are the values that these
    nodes touch.
    """

    channels: int = 0
    places: dict[Any, slice] = field(default_factory=dict)
    tensors: dict[Any, None] = field(default_factory=dict)
    producers: list[Node] = field(default_factory=list)
    consumers: list[Node] = field(default_factory=list)
    between: list[Node] = field(default_factory=list)
    pinned: str | None = None


def channel_groups(model: Model) -> list[Group]:
    """Groups of the main graph."""
    scope, finder = model.graph, _Finder()
    site = Site(model, scope, infer(model), model.opset)
    roles = [(node, *_role(site, node)) for node in scope.nodes]
    for node, role, links in roles:
        for a, b, shift in links:
            finder.join(a, b, shift)
        if role == "pin":
            finder.pins.extend(t for t in (*node.inputs, *node.outputs) if t.name and not isinstance(t, Constant))
        for body in node.bodies():
            finder.pins.extend(t for s in body.scopes() for n in s.nodes for t in n.inputs if t.name)
    found: dict[Any, Group] = {}

    def group(tensor: Any) -> Group:
        entry = found.setdefault(finder.root(tensor)[0], Group())
        entry.tensors.setdefault(tensor)
        return entry

    for node, role, _ in roles:
        if role == "between":
            group(node.outputs[0]).between.append(node)
        elif role == "linear":
            group(node.outputs[0]).producers.append(node)
            group(node.inputs[0]).consumers.append(node)
    _place(site, found, finder)
    pinned = {finder.root(t)[0] for t in [*scope.inputs, *scope.outputs, *finder.pins]}
    for root, entry in found.items():
        if root in pinned:
            entry.pinned = "an operator that does not commute with a factor reads or makes it"
    return list(found.values())


def _place(site: Site, found: dict[Any, Group], finder: _Finder) -> None:
    """Say where the channels of each value are in its group."""
    places: dict[Any, dict[Any, tuple[int, int]]] = {root: {} for root in found}
    for tensor in [*site.scope.inputs, *(t for node in site.scope.nodes for t in node.outputs if t.name)]:
        root, offset = finder.root(tensor)
        if root in found:
            channels = _channels(site, tensor)
            if channels is None:
                finder.pins.append(tensor)
            else:
                places[root][tensor] = (offset, offset + channels)
    for root, group in found.items():
        begin = min((start for start, _ in places[root].values()), default=0)
        group.places = {t: slice(start - begin, end - begin) for t, (start, end) in places[root].items()}
        group.channels = max((p.stop for p in group.places.values()), default=0)


def _role(site: Site, node: Node) -> tuple[str, list[Link]]:
    """What a node is to its values, and what it connects.

    linear: makes and uses up channels; between: a depthwise convolution; commutes; shape: looks at extents only; pin.
    """
    view = linear(site.model, node)
    if view is not None and view.op != "ConvTranspose":
        whole = len(view.weight.outputs) == 1 and (view.op == "Conv" or site.shapes[node.inputs[0]].rank == 2)
        if view.depthwise and view.inputs == view.outputs and whole:
            return "between", [(node.inputs[0], node.outputs[0], 0)]
        return ("linear" if whole else "pin"), []
    if node.op in ("Shape", "Size") and not node.domain:
        return "shape", []
    if node.domain or not node.inputs or isinstance(node.inputs[0], Constant):
        return "pin", []
    links = list(_links(site, node))
    return ("commutes", links) if links else ("pin", [])


def _links(site: Site, node: Node) -> Iterator[Link]:
    """What a node that commutes with factors connects; nothing if it does not commute, or not as far as is known."""
    x, outputs = node.inputs[0], [o for o in node.outputs if o.name]
    channels = [_channels(site, t) for t in (x, *outputs)]
    if None in channels or not outputs:
        return
    same = len(set(channels)) == 1
    if len(outputs) == 1 and same and (node.op in _COMMUTES or _passes_on(site, node)):
        yield x, outputs[0], 0
    elif node.op == "Add":
        alike = {(site.shapes[t].rank, _channels(site, t)) for t in (*node.inputs, *outputs)}
        if len(alike) == 1 and not any(isinstance(t, Constant) for t in node.inputs):
            yield from ((t, outputs[0], 0) for t in node.inputs)
    elif node.op == "Slice" and (start := _slice_start(site, node)) is not None:
        yield outputs[0], x, start
    elif node.op == "Pad" and (before := _padded(site, node)) is not None:
        yield x, outputs[0], before
    elif node.op in ("Concat", "Split") and _axis(site, node) == 1:
        parts = list(node.inputs if node.op == "Concat" else node.outputs)
        whole = outputs[0] if node.op == "Concat" else x
        counts = [_channels(site, t) for t in parts]
        if not any(isinstance(t, Constant) for t in parts) and None not in counts:
            for number, part in enumerate(parts):
                yield part, whole, sum(c or 0 for c in counts[:number])


def _passes_on(site: Site, node: Node) -> bool:
    """Whether a node with options keeps channels where they are and commutes."""
    if node.op in _FLAT:
        return site.shapes[node.outputs[0]].rank == 2
    if node.op == "PRelu":
        return isinstance(node.inputs[1], Constant)
    if node.op in ("Resize", "Upsample"):  # what is outside of the picture may get a value of its own
        return bool(node.attrs.get("coordinate_transformation_mode") != "tf_crop_and_resize")
    if node.op == "Slice":
        axes = site.integers(node, 3, "axes")
        return axes is not None and 1 not in [a % (site.shapes[node.inputs[0]].rank or 1) for a in axes]
    return False


def _slice_start(site: Site, node: Node) -> int | None:
    """The first channel of a Slice of neighbouring channels only."""
    parts = [site.integers(node, place, name) for place, name in ((1, "starts"), (3, "axes"), (4, "steps"))]
    starts, axes, steps = parts
    channels = _channels(site, node.inputs[0])
    if starts is None or axes is None or len(axes) != 1 or channels is None or (steps or [1]) != [1]:
        return None
    if axes[0] % (site.shapes[node.inputs[0]].rank or 1) != 1:
        return None
    return min(max(starts[0] + channels if starts[0] < 0 else starts[0], 0), channels)


def _padded(site: Site, node: Node) -> int | None:
    """Channels of zeros that a Pad puts before those of its input; a channel axis is padded with zeros only."""
    pads, rank = site.integers(node, 1, "pads"), site.shapes[node.inputs[0]].rank
    plain = node.attrs.get("mode", "constant") == "constant" and not node.attrs.get("value")
    given = [t for t in node.inputs[2:] if t.name]
    values = [site.model.value(t) for t in given]
    if not plain or pads is None or len(pads) != 2 * (rank or 0) or any(v is None or v.any() for v in values):
        return None
    return pads[1] if pads[1] >= 0 and pads[1 + (rank or 0)] >= 0 else None


def _axis(site: Site, node: Node) -> int:
    return int(node.attrs.get("axis", 0)) % (site.shapes[node.inputs[0]].rank or 1)


def _channels(site: Site, tensor: Any) -> int | None:
    """The extent of axis 1 if it is known."""
    shape = site.shapes[tensor].shape
    return shape[1] if shape is not None and len(shape) >= 2 and isinstance(shape[1], int) else None


class _Finder:
    """Union-find over values with the distance of their channels, and the values that something else reads or makes."""

    def __init__(self) -> None:
        self._parent: dict[Any, tuple[Any, int]] = {}
        self.pins: list[Any] = []

    def root(self, tensor: Any) -> tuple[Any, int]:
        """The representative, and which of its channels is the first one of `tensor`."""
        offset = 0
        while tensor in self._parent:
            tensor, step = self._parent[tensor]
            offset += step
        return tensor, offset

    def join(self, a: Any, b: Any, shift: int) -> None:
        """Channel c of `a` is channel c + shift of `b`."""
        (first, offset), (second, other) = self.root(a), self.root(b)
        if first is not second:
            self._parent[first] = (second, other + shift - offset)
        elif offset != other + shift:
            self.pins.append(a)
