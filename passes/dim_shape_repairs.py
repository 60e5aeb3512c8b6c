"""Repairs of operators that are told extents in numbers: Reshape, Expand, ConstantOfShape, Resize, Slice, ScatterND."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxcomp.graph import Node
from onnxcomp.passes.surgery import Cut, repair

__all__ = ["rewrite_extents"]


@repair("Reshape", "Expand")
def _target_shape(cut: Cut, node: Node, twin: Node) -> None:
    if "shape" in node.attrs:  # Reshape before opset 5
        dims = cut.coupling.probe.shapes[node.outputs[0]]
        twin.attrs["shape"] = [
            cut.extent(node.outputs[0], k) if s == dims[k] else s for k, s in enumerate(node.attrs["shape"])
        ]
    else:
        rewrite_extents(cut, node, twin, 1, node.outputs[0])


@repair("ConstantOfShape")
def _constant_of_shape(cut: Cut, node: Node, twin: Node) -> None:
    rewrite_extents(cut, node, twin, 0, node.outputs[0])


@repair("Resize")
def _resize(cut: Cut, node: Node, twin: Node) -> None:
    if len(node.inputs) > 3 and node.inputs[3].name and "axes" not in node.attrs:
        rewrite_extents(cut, node, twin, 3, node.outputs[0])


def rewrite_extents(cut: Cut, node: Node, twin: Node, position: int, y: Any) -> None:
    """Let the shape at an input say the new extents of `y`; entries for other axes stay as they are or are computed.

    Only entries that say the old extent change: -1 and 0 stay. An axis that also holds the batch becomes -1.
    """
    dims, changed = cut.coupling.probe.shapes[y], cut.axes(y)
    if not changed:
        return
    vector = node.inputs[position]
    values = cut.coupling.model.value(vector)
    length = cut.coupling.probe.shapes[vector][0]
    entries = {k - len(dims) + length: cut.extent(y, k) for k in changed}
    if values is not None:
        old = [int(v) for v in values]
        extents = {k: e for k, e in entries.items() if k >= 0 and old[k] == dims[k + len(dims) - length]}
        if extents:
            cut.integers(twin, position, [extents.get(k, v) for k, v in enumerate(old)])
        return
    ours = np.zeros(length, bool)
    literals = np.zeros(length, np.int64)
    for k, extent in entries.items():
        if k >= 0:
            ours[k] = True
            literals[k] = -1 if cut.varies(y, k + len(dims) - length) else extent
    name = f"{twin.outputs[0].name}_extents"
    condition = cut.model.constant(cut.scope, f"{name}_given", ours)
    given = cut.model.constant(cut.scope, f"{name}_values", literals)
    merged = cut.model.variable(name, np.int64, [length])
    cut.scope.add("Where", [condition, given, twin.inputs[position]], [merged], name=merged.name)
    twin.inputs[position] = merged


@repair("Slice")
def _slice(cut: Cut, node: Node, twin: Node) -> None:
    """New bounds where what stays is a run of neighbours, else a Gather for that axis."""
    x, y = node.inputs[0], node.outputs[0]
    rank = len(cut.coupling.probe.shapes[x])
    bounds = _Bounds(cut, node, rank)
    for axis in dict.fromkeys([*cut.axes(x), *cut.axes(y)]):
        if axis not in bounds.axes:
            continue
        place = bounds.axes.index(axis)
        chosen = range(cut.coupling.probe.shapes[x][axis])[bounds.slice(place)]
        kept = np.searchsorted(cut.keep(x, axis), np.asarray(chosen)[cut.keep(y, axis)])
        if len(kept) and (np.diff(kept) == 1).all():
            bounds.starts[place], bounds.ends[place], bounds.steps[place] = int(kept[0]), int(kept[-1]) + 1, 1
        else:
            bounds.drop(place)
            _gather_after(cut, twin, axis, kept)
    bounds.write(cut, twin)


class _Bounds:
    """The four lists of a Slice, from attributes (before opset 10) or constant inputs."""

    def __init__(self, cut: Cut, node: Node, rank: int) -> None:
        def read(position: int, attribute: str) -> list[int] | None:
            if attribute in node.attrs:
                return [int(v) for v in node.attrs[attribute]]
            if position < len(node.inputs) and node.inputs[position].name:
                found = cut.coupling.model.value(node.inputs[position])
                return None if found is None else [int(v) for v in found.reshape(-1)]
            return None

        self.by_attribute = "starts" in node.attrs
        self.starts, self.ends = read(1, "starts") or [], read(2, "ends") or []
        axes, steps = read(3, "axes"), read(4, "")
        self.axes = list(range(len(self.starts))) if axes is None else [a % rank for a in axes]
        self.steps = [1] * len(self.starts) if steps is None else steps

    def slice(self, place: int) -> slice:
        return slice(self.starts[place], self.ends[place], self.steps[place])

    def drop(self, place: int) -> None:
        for part in (self.starts, self.ends, self.axes, self.steps):
            del part[place]

    def write(self, cut: Cut, twin: Node) -> None:
        if not self.starts and not self.axes and not self.ends:
            # Nothing is left to cut here: bounds that keep everything.
            self.starts, self.ends, self.axes, self.steps = [0], [1 << 62], [0], [1]
        if self.by_attribute:
            twin.attrs.update(starts=self.starts, ends=self.ends, axes=self.axes)
            return
        for position, values in enumerate((self.starts, self.ends, self.axes, self.steps), 1):
            cut.integers(twin, position, values)


def _gather_after(cut: Cut, twin: Node, axis: int, kept: Any) -> None:
    y = twin.outputs[0]
    whole = cut.model.variable(f"{y.name}_whole", y.dtype)
    indices = cut.model.constant(cut.scope, f"{y.name}_indices", np.asarray(kept, np.int64))
    twin.outputs[0] = whole
    cut.scope.add("Gather", [whole, indices], [y], name=f"{y.name}_gather", attrs={"axis": axis})


@repair("ScatterND")
def _scatter(cut: Cut, node: Node, twin: Node) -> None:
    """Indices that stay (they lost slices with the updates) count what stays of the axes that they index."""
    data, indices = node.inputs[:2]
    chosen = cut.coupling.model.value(indices)
    if chosen is None:
        return
    for axis in cut.axes(indices):
        chosen = np.take(chosen, cut.keep(indices, axis), axis=axis)
    places = [
        np.searchsorted(cut.keep(data, k), chosen[..., k] % cut.coupling.probe.shapes[data][k])
        for k in range(chosen.shape[-1])
    ]
    name = f"{twin.outputs[0].name}_places"
    twin.inputs[1] = cut.model.constant(cut.scope, name, np.stack(places, axis=-1).astype(np.int64))
