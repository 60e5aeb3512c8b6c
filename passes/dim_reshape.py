"""Components of the coupling, with Reshape decided exactly.

A block of a Reshape with several axes on a side lets one input axis i and one output axis j be followed:

    flat index f,  u = (f // stride_i) % extent_i,  v = (f // stride_j) % extent_j :  x_i[u] = y_j[v] for all f

and the other axes of the block have to stay whole; both sides then lose the same elements and stay rectangular.
C -> (heads, size) becomes whole heads by (C, heads) or sizes of all heads by (C, size). The choice waits until the rest
of the model has pinned what it pins.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.passes.dim_atoms import Atoms, Block, components

__all__ = ["decide"]

Array = npt.NDArray[Any]
_LIMIT = 1 << 24  # elements of a block; more than that is pinned


def decide(atoms: Atoms) -> tuple[Array, Array, dict[int, str]]:
    """Labels by atom (int64), whether a label is pinned (bool by label), and the reasons of pinned labels."""
    partition = _Partition(atoms)
    pending = list(atoms.blocks)
    while pending:
        options = [(block, _options(atoms, partition, block)) for block in pending]
        fewest = min(len(o) for _, o in options)
        now = [(b, o) for b, o in options if len(o) <= 1] or [next((b, o) for b, o in options if len(o) == fewest)]
        for block, choices in now:
            _follow(atoms, partition, block, choices)
        partition.merge()
        done = {id(block) for block, _ in now}
        pending = [b for b in pending if id(b) not in done]
    return partition.labels, partition.pinned, partition.why


class _Partition:
    """Components so far; `merge` takes in the edges and pins that were added to the atoms since."""

    def __init__(self, atoms: Atoms) -> None:
        self.atoms = atoms
        self.labels = np.zeros(0, np.int64)
        self.pinned = np.zeros(0, bool)
        self.why: dict[int, str] = {}
        self._edges = self._pins = 0
        self.merge()

    def merge(self) -> None:
        count = self.atoms.count
        labels = np.concatenate([self.labels, np.arange(len(self.labels), count)])
        new = self.atoms.edges[self._edges :]
        if new:
            a = labels[np.concatenate([e[0].reshape(-1) for e in new])]
            b = labels[np.concatenate([e[1].reshape(-1) for e in new])]
            labels = components(count, a, b)[labels]
        self._edges = len(self.atoms.edges)
        pinned = np.zeros(count, bool)
        pinned[labels[np.flatnonzero(self.pinned)]] = True
        why: dict[int, str] = {}
        for label, reason in self.why.items():
            why.setdefault(int(labels[label]), reason)
        for where, reason in self.atoms.pins[self._pins :]:
            found = labels[where]
            for label in np.unique(found[~pinned[found]]).tolist():
                why.setdefault(label, reason)
            pinned[found] = True
        self._pins = len(self.atoms.pins)
        self.labels, self.pinned, self.why = labels, pinned, why

    def free(self, tensor: Any, axis: int) -> bool:
        return not bool(self.pinned[self.labels[self.atoms.at(tensor, axis)]].all())


def _options(atoms: Atoms, partition: _Partition, block: Block) -> list[tuple[int, int]]:
    """Pairs of axes of which neither is pinned as a whole."""
    rows = [i for i in block.x_axes if partition.free(block.x, i)]
    columns = [j for j in block.y_axes if partition.free(block.y, j)]
    size = int(np.prod([atoms.shape(block.x)[k] for k in block.x_axes]))
    return [(i, j) for i in rows for j in columns] if size <= _LIMIT else []


def _follow(atoms: Atoms, partition: _Partition, block: Block, options: list[tuple[int, int]]) -> None:
    """Couple the pair of axes that leaves the most units to remove, and pin the other axes."""
    best: tuple[int, int, int, Array, Array] | None = None
    for i, j in options:
        u, v = _pairs(atoms, block, i, j)
        units = _units(partition, atoms.at(block.x, i, u), atoms.at(block.y, j, v))
        if best is None or units > best[0]:
            best = (units, i, j, u, v)
    chosen = (-1, -1)
    if best is not None and best[0] > 1:
        _, i, j, u, v = best
        atoms.join(atoms.at(block.x, i, u), atoms.at(block.y, j, v))
        chosen = (i, j)
    for tensor, axes, kept in ((block.x, block.x_axes, chosen[0]), (block.y, block.y_axes, chosen[1])):
        for k in axes:
            if k != kept:
                atoms.pin(tensor, k, why="a reshape merges it with other axes")


def _pairs(atoms: Atoms, block: Block, i: int, j: int) -> tuple[Array, Array]:
    """Distinct (u, v) over all flat indices of the block."""
    index = []
    for tensor, axes, axis in ((block.x, block.x_axes, i), (block.y, block.y_axes, j)):
        dims = [atoms.shape(tensor)[k] for k in axes]
        place = axes.index(axis)
        flat = np.arange(int(np.prod(dims)))
        index.append(flat // int(np.prod(dims[place + 1 :])) % dims[place])
    codes = np.unique(index[0] * atoms.shape(block.y)[j] + index[1])
    return codes // atoms.shape(block.y)[j], codes % atoms.shape(block.y)[j]


def _units(partition: _Partition, a: Array, b: Array) -> int:
    """How many components without a pin the edges leave among the atoms they touch."""
    touched, place = np.unique(partition.labels[np.concatenate([a, b])], return_inverse=True)
    root = components(len(touched), place[: len(a)], place[len(a) :])
    pinned = np.zeros(len(touched), bool)
    pinned[root[partition.pinned[touched]]] = True
    return int(np.count_nonzero((root == np.arange(len(touched))) & ~pinned))
