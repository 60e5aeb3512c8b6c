"""Multiplications, parameters and work of a model as functions of how many units each group keeps.

Work is what the kernels of ONNX Runtime's CPU provider compute: multiplications with the input and output channels of
plain convolutions rounded up to the block of the instruction set. It follows the latency of convolutional networks far
better than multiplications do (measured: 3x3, 32 to 24 channels: 1.0 of the time, 32 to 16: 0.6). Time is what each
node took in a profile of the whole model, in the proportion in which its work falls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Constant, Node
from onnxcomp.macs import count_macs
from onnxcomp.passes.dims import Coupling, Group, weights

__all__ = ["Costs"]

Array = npt.NDArray[Any]
_INSIDE = 0.3  # measured between 0 (32 to 24 channels) and 0.5 (16 to 8)


@dataclass(frozen=True)
class _Item:
    """Something that costs `full`, in proportion to the extents of axes: [(extent, {group: slices per unit})].

    Extents count in steps of `block`.
    """

    full: float
    axes: tuple[tuple[int, Mapping[int, float]], ...]
    block: int = 1

    def at(self, removed: Sequence[int]) -> float:
        cost = self.full
        for extent, shares in self.axes:
            kept = extent - sum(share * removed[g] for g, share in shares.items())
            cost *= self._blocked(kept) / self._blocked(extent)
        return cost

    def _blocked(self, extent: float) -> float:
        """The extent in whole blocks; a part of the gain inside a block counts, as a narrower map is less to move."""
        if self.block == 1:
            return extent
        return (1 - _INSIDE) * self.block * math.ceil(extent / self.block - 1e-9) + _INSIDE * extent


class Costs:
    """`of(kind, removed)` for the kinds macs, params, work and (with measured `times`) time, where removed[g] units of
    group g are gone.
    """

    def __init__(
        self,
        coupling: Coupling,
        groups: Sequence[Group],
        block: int = 1,
        times: Mapping[Node, float] | None = None,
    ) -> None:
        self._coupling = coupling
        self._group_of = np.full(len(coupling.pinned), -1)
        for g, group in enumerate(groups):
            self._group_of[list(group.units)] = g
        self._widths = [group.width for group in groups]
        branches = {r: int(self._group_of[r.unit]) for r in coupling.residuals}
        self._branches = {r: g for r, g in branches.items() if g >= 0}
        known = {t.name: dims for t, dims in coupling.probe.shapes.items()}
        counted = count_macs(coupling.model, known=known)
        self._counted = frozenset(node for node, macs in counted.nodes.items() if macs)
        pairs = [(node, item) for node, macs in counted.nodes.items() for item in self._node_items(node, macs)]
        self._items: dict[str, list[_Item]] = {
            "macs": [item for _, item in pairs],
            "work": [replace(item, block=block) if _in_blocks(node) else item for node, item in pairs],
            "time": [i for node, us in (times or {}).items() for i in self._timed(node, us, block)],
            "params": [self._item(t.weight.size, self._all_axes(t), t.outputs) for t in weights(coupling.model)],
        }
        self._touching = {
            kind: [[i for i in items if any(g in shares for _, shares in i.axes)] for g in range(len(groups))]
            for kind, items in self._items.items()
        }

    def of(self, kind: str, removed: Sequence[int]) -> float:
        return sum(item.at(removed) for item in self._items[kind])

    def share(self, kind: str, removed: Sequence[int]) -> float:
        """What stays, as a share of the whole."""
        whole = self.of(kind, [0] * len(removed))
        return round(self.of(kind, removed) / whole, 4) if whole else 1.0

    def gain(self, kind: str, removed: Sequence[int], g: int, more: int) -> float:
        """What is saved if group g loses `more` units on top of `removed`."""
        after = list(removed)
        after[g] += more
        return sum(item.at(removed) - item.at(after) for item in self._touching[kind][g])

    def _timed(self, node: Node, microseconds: float, block: int) -> list[_Item]:
        """A node's time follows its multiplications, or the size of what it makes."""
        found = self._node_items(node, 1.0) if node in self._counted else []
        if not found:
            made = [y for y in node.outputs if y in self._coupling.probe.shapes]
            return [self._item(microseconds, self._all_axes(made[0]) if made else [], [node])]
        whole = sum(item.full for item in found) or 1.0
        return [
            replace(i, full=microseconds * i.full / whole, block=block if _in_blocks(node) else 1) for i in found
        ]

    def _node_items(self, node: Node, macs: float) -> list[_Item]:
        constants = [t for t in node.inputs if isinstance(t, Constant) and len(t.shape) > 1]
        if node.op in ("LSTM", "GRU", "RNN"):
            total = sum(t.weight.size for t in constants[:2]) or 1
            return [self._item(macs * t.weight.size / total, self._all_axes(t), [node]) for t in constants[:2]]
        if constants:
            return [self._item(macs, self._all_axes(constants[0]), [node])]
        if node.op == "MatMul":
            a, b = node.inputs[:2]
            return [self._item(macs, [*self._all_axes(a), (b, len(self._coupling.probe.shapes[b]) - 1)], [node])]
        return [self._item(macs, [], [node])]

    def _all_axes(self, tensor: Any) -> list[tuple[Any, int]]:
        return [(tensor, k) for k in range(len(self._coupling.probe.shapes[tensor]))]

    def _item(self, full: float, axes: Sequence[tuple[Any, int]], nodes: Sequence[Node]) -> _Item:
        """What `nodes` need: it goes with any branch that has all of them, as if along an axis of extent 1."""
        found: list[tuple[int, dict[int, float]]] = [
            (1, {g: 1.0}) for branch, g in self._branches.items() if branch.nodes.issuperset(nodes)
        ]
        for tensor, axis in axes:
            groups = self._group_of[self._coupling.label(tensor, axis)]
            numbers, counts = np.unique(groups[groups >= 0], return_counts=True)
            if len(numbers):
                shares = {int(g): float(c) / self._widths[g] for g, c in zip(numbers, counts, strict=True)}
                found.append((len(groups), shares))
        return _Item(float(full), tuple(found))


def _in_blocks(node: Node) -> bool:
    return node.op in ("Conv", "FusedConv") and int(node.attrs.get("group", 1)) == 1
