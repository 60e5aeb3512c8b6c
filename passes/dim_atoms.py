"""Atoms of dimension coupling: one per (tensor, axis, index), and the equalities between them.

An equality says that if one slice is removed, the other has to go as well. A pin says that a slice must stay. Rules,
one small function per operator, state both; the components of the equality relation that hold no pinned atom are the
units that can be removed. Whatever moves elements around (Concat, Split, Transpose, Reshape, tied weights) needs no
index maps: it is a set of equalities like any other.

    @rule("Relu6", domain="my.domain")
    def relu6(atoms: Atoms, node: Node) -> None:
        atoms.same_axes(node.inputs[0], node.outputs[0])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Model, Node

__all__ = ["RULES", "SPATIAL", "Atoms", "Block", "Dims", "Rule", "UnknownDims", "components", "rule"]

Array = npt.NDArray[Any]
Dims = tuple[int, ...]
Rule = Callable[["Atoms", Node], None]
RULES: dict[str, Rule] = {}
SPATIAL = "a spatial axis"  # the reason of pins that nobody needs to be told about


def rule(*ops: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Register a function as the rule of these operators; a later registration replaces an earlier one."""

    def register(function: Rule) -> Rule:
        for op in ops:
            RULES[f"{domain}.{op}" if domain else op] = function
        return function

    return register


class UnknownDims(Exception):
    """A rule met a value whose shape is not known."""


@dataclass(frozen=True)
class Block:
    """Axes of `x` and `y` that hold the same elements in the same order, cut as finely as possible.

    More than one axis on a side: which axis of `x` follows which axis of `y` is decided when all pins are known.
    """

    x: Any
    y: Any
    x_axes: tuple[int, ...]
    y_axes: tuple[int, ...]


class Atoms:
    """What rules write to. Axes may be negative; tensors without a name (omitted) are ignored everywhere.

    `sums` lists (tensor, axis) whose slices are added up by an operator: set to zero there, a removed slice has no
    effect any more. `averages` lists (tensor, axis) that an operator normalizes over, where it always has one.
    """

    def __init__(self, model: Model, shapes: Mapping[Any, Dims], varying: Iterable[tuple[Any, int]]) -> None:
        self.model = model
        self.opset = model.opset
        self.shapes = shapes
        self.varying = set(varying)
        self.offsets: dict[Any, Array] = {}
        self.count = 1  # atom 0 stands for all that no rule touches
        self.edges: list[tuple[Array, Array]] = []
        self.pins: list[tuple[Array, str]] = [(np.zeros(1, np.int64), "no operator here says what follows it")]
        self.blocks: list[Block] = []
        self.sums: dict[tuple[Any, int], None] = {}
        self.averages: dict[tuple[Any, int], None] = {}

    # --- reading ---

    def shape(self, tensor: Any) -> Dims:
        """Raises UnknownDims, which pins all tensors of the node."""
        if tensor not in self.shapes:
            raise UnknownDims(f"the shape of {tensor.name!r} is not known")
        return self.shapes[tensor]

    def rank(self, tensor: Any) -> int:
        return len(self.shape(tensor))

    def value(self, tensor: Any) -> Array | None:
        """The elements of a constant, else None."""
        return self.model.value(tensor)

    def integers(self, node: Node, position: int, attribute: str = "") -> list[int] | None:
        """Integers given by an attribute (older operator versions) or a constant input; None where neither is."""
        if attribute and attribute in node.attrs:
            value = node.attrs[attribute]
            return [int(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
        if position < len(node.inputs) and node.inputs[position].name:
            found = self.value(node.inputs[position])
            return None if found is None else [int(v) for v in np.asarray(found).reshape(-1)]
        return None

    def at(self, tensor: Any, axis: int, index: Any = None) -> Array:
        """Atoms of an axis, all or those at `index`."""
        dims = self.shape(tensor)
        if tensor not in self.offsets:
            self.offsets[tensor] = self.count + np.concatenate([[0], np.cumsum(dims)[:-1]]).astype(np.int64)
            self.count += sum(dims)
            for k in range(len(dims)):
                if (tensor, k) in self.varying:
                    self.pin(tensor, k, why="a dimension that varies from run to run")
        start = self.offsets[tensor][axis]
        size = dims[axis]
        return np.asarray(start + (np.arange(size) if index is None else np.asarray(index, np.int64)))

    def spans(self) -> tuple[Array, Array]:
        """Start and end of the atoms of each axis that is not empty."""
        pairs = [
            (start, start + size)
            for tensor, starts in self.offsets.items()
            for start, size in zip(starts.tolist(), self.shapes[tensor], strict=True)
            if size
        ]
        found = np.asarray(pairs, np.int64).reshape(-1, 2)
        return found[:, 0], found[:, 1]

    # --- writing ---

    def join(self, a: Array, b: Array) -> None:
        """Atoms a[i] and b[i] go together."""
        self.edges.append(tuple(np.broadcast_arrays(a, b)))  # type: ignore[arg-type]

    def same(self, x: Any, i: int, y: Any, j: int) -> None:
        """Axis i of x and axis j of y, index by index; axes of different extent are pinned."""
        if self.shape(x)[i] == self.shape(y)[j]:
            self.join(self.at(x, i), self.at(y, j))
        else:
            self.pin(x, i, why="its extent changes")
            self.pin(y, j, why="its extent changes")

    def same_axes(self, x: Any, y: Any, but: Sequence[int] = ()) -> None:
        """All axes of two tensors of equal rank, except `but`."""
        skipped = {k % self.rank(x) for k in but}
        for k in range(self.rank(x)):
            if k not in skipped:
                self.same(x, k, y, k)

    def broadcast(self, inputs: Iterable[Any], output: Any) -> None:
        """Axes aligned from the right; an axis that is stretched from 1 is not coupled."""
        out = self.shape(output)
        for x in inputs:
            if not x.name:
                continue
            dims = self.shape(x)
            for k in range(1, len(dims) + 1):
                if dims[-k] == out[-k]:
                    self.join(self.at(x, len(dims) - k), self.at(output, len(out) - k))

    def pin(self, tensor: Any, axis: int | None = None, *, why: str) -> None:
        """An axis, or all axes, must stay as they are."""
        if not tensor.name or tensor not in self.shapes:
            return
        for k in range(self.rank(tensor)) if axis is None else [axis % self.rank(tensor)]:
            self.pins.append((self.at(tensor, k), why))

    def pin_node(self, node: Node, why: str) -> None:
        """All that a node reads (its subgraphs too) and writes."""
        for tensor in (*node.reads(), *node.outputs):
            self.pin(tensor, why=why)

    def summed(self, tensor: Any, axis: int) -> None:
        self.sums.setdefault((tensor, axis % self.rank(tensor)))

    def averaged(self, tensor: Any, axis: int) -> None:
        self.averages.setdefault((tensor, axis % self.rank(tensor)))


def components(count: int, a: Array, b: Array) -> Array:
    """Connected components of `count` vertices under edges (a[i], b[i]): int64 [count], the least vertex of each.

    Roots hook onto smaller roots and paths are halved until nothing changes: array operations only, O(log count)
    rounds in practice.
    """
    parent = np.arange(count)
    while True:
        left, right = parent[a], parent[b]
        open_ = left != right
        if not open_.any():
            return parent
        a, b, left, right = a[open_], b[open_], left[open_], right[open_]
        np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right))
        while True:
            above = parent[parent]
            if np.array_equal(above, parent):
                break
            parent = above
