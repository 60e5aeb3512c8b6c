"""Multiplications and parameters of a model as functions of how many units each group keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Constant, Node
from onnxcomp.macs import count_macs
from onnxcomp.passes.dims import Coupling, Group, weights

__all__ = ["Costs"]

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Item:
    """Something that costs `full`, in proportion to the extents of axes: [(extent, {group: slices per unit})]."""

    full: float
    axes: tuple[tuple[int, Mapping[int, float]], ...]

    def at(self, removed: Sequence[int]) -> float:
        cost = self.full
        for extent, shares in self.axes:
            cost *= 1 - sum(share * removed[g] for g, share in shares.items()) / extent
        return cost


class Costs:
    """`macs(removed)` and `params(removed)`, where removed[g] is the number of units that group g loses."""

    def __init__(self, coupling: Coupling, groups: Sequence[Group]) -> None:
        self._coupling = coupling
        self._group_of = np.full(len(coupling.pinned), -1)
        for g, group in enumerate(groups):
            self._group_of[list(group.units)] = g
        self._widths = [group.width for group in groups]
        known = {t.name: dims for t, dims in coupling.probe.shapes.items()}
        counted = count_macs(coupling.model, known=known)
        self._macs = [item for node, macs in counted.nodes.items() for item in self._node_items(node, macs)]
        self._params = [
            self._item(tensor.weight.size, [(tensor, k) for k in range(len(tensor.shape))])
            for tensor in weights(coupling.model)
        ]
        self._touching: dict[str, list[list[_Item]]] = {}
        for kind, items in (("macs", self._macs), ("params", self._params)):
            self._touching[kind] = [
                [i for i in items if any(g in shares for _, shares in i.axes)] for g in range(len(groups))
            ]

    def macs(self, removed: Sequence[int]) -> float:
        return sum(item.at(removed) for item in self._macs)

    def params(self, removed: Sequence[int]) -> float:
        return sum(item.at(removed) for item in self._params)

    def gain(self, kind: str, removed: Sequence[int], g: int, more: int) -> float:
        """What is saved if group g loses `more` units on top of `removed`."""
        after = list(removed)
        after[g] += more
        return sum(item.at(removed) - item.at(after) for item in self._touching[kind][g])

    def _node_items(self, node: Node, macs: float) -> list[_Item]:
        constants = [t for t in node.inputs if isinstance(t, Constant) and len(t.shape) > 1]
        if node.op in ("LSTM", "GRU", "RNN"):
            total = sum(t.weight.size for t in constants[:2]) or 1
            return [self._item(macs * t.weight.size / total, self._all_axes(t)) for t in constants[:2]]
        if constants:
            return [self._item(macs, self._all_axes(constants[0]))]
        if node.op == "MatMul":
            a, b = node.inputs[:2]
            return [self._item(macs, [*self._all_axes(a), (b, len(self._coupling.probe.shapes[b]) - 1)])]
        return [self._item(macs, [])]

    def _all_axes(self, tensor: Any) -> list[tuple[Any, int]]:
        return [(tensor, k) for k in range(len(self._coupling.probe.shapes[tensor]))]

    def _item(self, full: float, axes: Sequence[tuple[Any, int]]) -> _Item:
        found = []
        for tensor, axis in axes:
            groups = self._group_of[self._coupling.label(tensor, axis)]
            numbers, counts = np.unique(groups[groups >= 0], return_counts=True)
            if len(numbers):
                shares = {int(g): float(c) / self._widths[g] for g, c in zip(numbers, counts, strict=True)}
                found.append((len(groups), shares))
        return _Item(float(full), tuple(found))
