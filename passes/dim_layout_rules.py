"""Coupling rules of operators that move, repeat or select elements."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxcomp.graph import Node
from onnxcomp.passes.dim_atoms import SPATIAL, Atoms, Block, rule

__all__ = ["slice_ranges"]

_NUMBERED = "its positions are looked up by number"


@rule("Transpose")
def _transpose(atoms: Atoms, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    perm = node.attrs.get("perm") or list(range(atoms.rank(x)))[::-1]
    for k, source in enumerate(perm):
        atoms.same(x, int(source), y, k)


@rule("Concat")
def _concat(atoms: Atoms, node: Node) -> None:
    y = node.outputs[0]
    axis, start = int(node.attrs["axis"]) % atoms.rank(y), 0
    for x in node.inputs:
        atoms.same_axes(x, y, but=[axis])
        size = atoms.shape(x)[axis]
        atoms.join(atoms.at(x, axis), atoms.at(y, axis, start + np.arange(size)))
        start += size


@rule("Split")
def _split(atoms: Atoms, node: Node) -> None:
    x = node.inputs[0]
    axis, start = int(node.attrs.get("axis", 0)) % atoms.rank(x), 0
    if len(node.inputs) > 1 and node.inputs[1].name and atoms.value(node.inputs[1]) is None:
        atoms.pin(x, axis, why="it is split at places that are not constant")
    for y in node.outputs:
        atoms.same_axes(x, y, but=[axis])
        size = atoms.shape(y)[axis]
        atoms.join(atoms.at(y, axis), atoms.at(x, axis, start + np.arange(size)))
        start += size


def slice_ranges(atoms: Atoms, node: Node) -> dict[int, range] | None:
    """Selected positions by axis, None where the bounds are not constant."""
    dims = atoms.shape(node.inputs[0])
    starts, ends = atoms.integers(node, 1, "starts"), atoms.integers(node, 2, "ends")
    if starts is None or ends is None:
        return None
    axes, steps = atoms.integers(node, 3, "axes"), atoms.integers(node, 4)
    if (axes is None and len(node.inputs) > 3 and node.inputs[3].name) or (
        steps is None and len(node.inputs) > 4 and node.inputs[4].name
    ):
        return None
    axes = list(range(len(starts))) if axes is None else [a % len(dims) for a in axes]
    steps = [1] * len(starts) if steps is None else steps
    found: dict[int, range] = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = dims[axis]
        # An end far below zero means "to the very beginning", which Python writes as None.
        stop = None if step < 0 and end < -size else end
        found[axis] = range(size)[slice(start, stop, step)]
    return found


@rule("Slice")
def _slice(atoms: Atoms, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    ranges = slice_ranges(atoms, node)
    if ranges is None:
        axes = atoms.integers(node, 3, "axes")
        for k in range(atoms.rank(x)):
            if axes is not None and k not in [a % atoms.rank(x) for a in axes]:
                atoms.same(x, k, y, k)
            else:
                atoms.pin(x, k, why="it is cut at places that are not constant")
                atoms.pin(y, k, why="it is cut at places that are not constant")
        return
    for k in range(atoms.rank(x)):
        if k in ranges:
            atoms.join(atoms.at(x, k, list(ranges[k])), atoms.at(y, k))
        else:
            atoms.same(x, k, y, k)


@rule("Gather")
def _gather(atoms: Atoms, node: Node) -> None:
    x, indices, y = node.inputs[0], node.inputs[1], node.outputs[0]
    axis, rank = int(node.attrs.get("axis", 0)) % atoms.rank(x), atoms.rank(indices)
    for k in range(atoms.rank(x)):
        if k != axis:
            atoms.same(x, k, y, k if k < axis else k + rank - 1)
    chosen = atoms.value(indices)
    if chosen is not None and chosen.ndim == 1:
        atoms.join(atoms.at(x, axis, chosen % atoms.shape(x)[axis]), atoms.at(y, axis))
        return
    atoms.pin(x, axis, why=_NUMBERED)
    for k in range(rank):
        atoms.same(indices, k, y, axis + k)


@rule("GatherElements", "ScatterElements", "Scatter", "Compress", "ReverseSequence", "Trilu", "GridSample", "RoiAlign")
def _selected(atoms: Atoms, node: Node) -> None:
    """Only pins: their channel axes could be followed, which no model at hand needs."""
    atoms.pin_node(node, f"{node.op} selects elements by position")


@rule("ScatterND")
def _scatter(atoms: Atoms, node: Node) -> None:
    """Y is a copy of `data` with blocks at constant places replaced: y[indices[i]] = updates[i].

    An axis that is indexed is followed where the indices along it are those of one axis of `updates`, each once: what
    an assignment to a slice becomes.
    """
    data, indices, updates = node.inputs
    y, chosen = node.outputs[0], atoms.value(indices)
    if chosen is None:
        return atoms.pin_node(node, "its positions are not constant")
    atoms.same_axes(data, y)
    depth, lead = chosen.shape[-1], chosen.ndim - 1
    for k in range(depth, atoms.rank(data)):
        atoms.same(data, k, updates, lead + k - depth)
    atoms.pin(indices, -1, why=_NUMBERED)
    followed: set[int] = set()
    for k in range(depth):
        places = chosen[..., k] % atoms.shape(data)[k]
        axis = _only_axis(places)
        if axis is None:
            atoms.pin(data, k, why=_NUMBERED)
        else:
            followed.add(axis)
            line = np.moveaxis(places, axis, 0).reshape(places.shape[axis], -1)[:, 0]
            atoms.join(atoms.at(data, k, line), atoms.at(updates, axis))
    for axis in range(lead):
        atoms.same(indices, axis, updates, axis)
        if axis not in followed:
            atoms.pin(updates, axis, why=_NUMBERED)
    return None


def _only_axis(places: Any) -> int | None:
    """The one axis along which numbers differ, where no number comes twice."""
    for axis in range(places.ndim):
        line = np.moveaxis(places, axis, -1).reshape(-1, places.shape[axis])
        if len(line[0]) > 1 and (line == line[0]).all() and len(np.unique(line[0])) == len(line[0]):
            return axis
    return None


@rule("Pad")
def _pad(atoms: Atoms, node: Node) -> None:
    """Padded slots are atoms of their own and can be removed alone."""
    x, y = node.inputs[0], node.outputs[0]
    rank = atoms.rank(x)
    pads, axes = atoms.integers(node, 1, "pads"), atoms.integers(node, 3)
    if pads is None or (axes is None and len(node.inputs) > 3 and node.inputs[3].name):
        return atoms.pin_node(node, "it is padded by amounts that are not constant")
    axes = list(range(rank)) if axes is None else [a % rank for a in axes]
    begins, ends = dict(zip(axes, pads, strict=False)), dict(zip(axes, pads[len(axes) :], strict=True))
    constant = str(node.attrs.get("mode", "constant")) == "constant"
    for k in range(rank):
        begin, end = begins.get(k, 0), ends.get(k, 0)
        if begin == end == 0:
            atoms.same(x, k, y, k)
        elif constant and begin >= 0 and end >= 0:
            atoms.join(atoms.at(x, k), atoms.at(y, k, begin + np.arange(atoms.shape(x)[k])))
        else:
            atoms.pin(x, k, why="the padding repeats or cuts elements")
            atoms.pin(y, k, why="the padding repeats or cuts elements")
    return None


@rule("Expand")
def _expand(atoms: Atoms, node: Node) -> None:
    atoms.broadcast(node.inputs[:1], node.outputs[0])


@rule("Tile")
def _tile(atoms: Atoms, node: Node) -> None:
    """Counts that are computed (from the batch, say) are one where the extent stays and does not vary."""
    x, y = node.inputs[0], node.outputs[0]
    for k in range(atoms.rank(x)):
        if atoms.shape(x)[k] == atoms.shape(y)[k]:
            atoms.same(x, k, y, k)
        else:
            atoms.pin(x, k, why="it is repeated")
            atoms.pin(y, k, why="it is repeated")


@rule("Shape", "Size", "Range", "NonZero", "EyeLike", "OneHot")
def _numbers(atoms: Atoms, node: Node) -> None:
    """Their positions are numbers of axes or elements; what they read may be narrower at the next run."""
    for y in node.outputs:
        atoms.pin(y, why=f"positions that {node.op} numbers")
    if node.op not in ("Shape", "Size") or _becomes_a_factor(node):
        for x in node.inputs:
            atoms.pin(x, why=f"positions that {node.op} numbers")


def _becomes_a_factor(node: Node) -> bool:
    """Whether an extent goes into floating-point arithmetic, as the size of a head does into the scale of attention."""
    stack, seen = list(node.outputs), set(node.outputs)
    while stack:
        for reader in stack.pop().outputs:
            if reader.op == "Cast" and int(reader.attrs.get("to", 0)) in (1, 10, 11, 16):
                return True
            if reader.op in ("Gather", "Slice", "Squeeze", "Unsqueeze", "Concat", "Mul", "Div", "Add", "Sub", "Cast"):
                fresh = [t for t in reader.outputs if t not in seen]
                seen.update(fresh)
                stack.extend(fresh)
    return False


@rule("ConstantOfShape", "RandomNormalLike", "RandomUniformLike")
def _filled(atoms: Atoms, node: Node) -> None:
    """The values are the same at any extent: its shape is rewritten where others ask for it."""


@rule("Resize", "Upsample", "Crop")
def _resize(atoms: Atoms, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    for k in range(atoms.rank(x)):
        if k < 2 or atoms.shape(x)[k] == atoms.shape(y)[k]:
            atoms.same(x, k, y, k)
        else:
            atoms.pin(x, k, why=SPATIAL)
            atoms.pin(y, k, why=SPATIAL)


@rule("DepthToSpace", "SpaceToDepth")
def _blocks(atoms: Atoms, node: Node) -> None:
    """The b*b channels that make one channel of the wide map go together."""
    deep, wide = (node.inputs[0], node.outputs[0]) if node.op == "DepthToSpace" else (node.outputs[0], node.inputs[0])
    step = int(node.attrs["blocksize"]) ** 2
    atoms.same(deep, 0, wide, 0)
    index = np.arange(atoms.shape(deep)[1])
    by_column = node.op == "DepthToSpace" and str(node.attrs.get("mode", "DCR")) == "CRD"
    atoms.join(atoms.at(deep, 1), atoms.at(wide, 1, index // step if by_column else index % (len(index) // step)))
    for tensor in (deep, wide):
        for k in (2, 3):
            atoms.pin(tensor, k, why=SPATIAL)


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(atoms: Atoms, node: Node) -> None:
    """Row-major: input and output axes are cut into minimal blocks of equal product."""
    x, y = node.inputs[0], node.outputs[0]
    for block in _minimal_blocks(atoms, x, y):
        if len(block.x_axes) == len(block.y_axes) == 1:
            atoms.same(x, block.x_axes[0], y, block.y_axes[0])
        elif block.x_axes and block.y_axes:
            atoms.blocks.append(block)


def _minimal_blocks(atoms: Atoms, x: Any, y: Any) -> list[Block]:
    """Axes of extent 1 belong to no block."""
    blocks = []
    sides = [[k for k, d in enumerate(atoms.shape(t)) if d != 1] for t in (x, y)]
    i = j = 0
    while i < len(sides[0]) and j < len(sides[1]):
        first_i, first_j = i, j
        left, right = atoms.shape(x)[sides[0][i]], atoms.shape(y)[sides[1][j]]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left *= atoms.shape(x)[sides[0][i]]
                i += 1
            else:
                right *= atoms.shape(y)[sides[1][j]]
                j += 1
        blocks.append(Block(x, y, tuple(sides[0][first_i:i]), tuple(sides[1][first_j:j])))
    return blocks
