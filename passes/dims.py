"""Dimension coupling: which slices of a model's tensors can be removed, and which have to go together.

    coupling = couple(plain_form(model))
    coupling.groups      units that can be removed, by the weights that they lie in
    coupling.reasons     why an axis of a weight has to stay

A unit is a component of the equality relation of dim_atoms.py without a pinned atom; units that lie in the same axes of
the same weights are a group: what people call the width of a layer, the heads of an attention, the units of an LSTM.
Residual branches (dim_residuals.py) are units as well, with labels of their own behind those of the components.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Constant, Model
from onnxcomp.passes import dim_layout_rules, dim_norm_rules, dim_rules, dim_sequence_rules
from onnxcomp.passes.dim_atoms import RULES, Atoms, UnknownDims
from onnxcomp.passes.dim_probe import Probe, probe
from onnxcomp.passes.dim_reshape import decide
from onnxcomp.passes.dim_residuals import Residual, residuals

__all__ = ["Coupling", "Group", "couple"]

Array = npt.NDArray[Any]
_RULE_MODULES = (
    dim_rules,
    dim_norm_rules,
    dim_layout_rules,
    dim_sequence_rules,
)  # imported for the rules that they register


@dataclass(frozen=True)
class Group:
    """Units of one kind. `units` are component labels; `axes` says how often one unit lies in an axis of a weight.

    A residual branch is a group of one unit that lies in no axis. `averaged`: a normalization averages over the axis,
    so removal changes the other slices as well.
    """

    name: str
    units: tuple[int, ...]
    axes: Mapping[tuple[Constant, int], int]
    averaged: bool

    @property
    def width(self) -> int:
        return len(self.units)


@dataclass(frozen=True)
class Coupling:
    """The result: a label for every atom. `unknown` counts operators without a rule, by name."""

    model: Model
    probe: Probe
    labels: Array
    offsets: Mapping[Any, Array]
    pinned: Array  # bool by label
    why: Mapping[int, str]
    groups: tuple[Group, ...]
    sums: tuple[tuple[Any, int], ...]
    averages: tuple[tuple[Any, int], ...]
    unknown: Mapping[str, int]
    failed: tuple[tuple[str, str], ...] = field(default=())
    residuals: tuple[Residual, ...] = field(default=())

    @property
    def branches(self) -> tuple[Group, ...]:
        """Each residual branch as a group."""
        return tuple(Group(r.name, (r.unit,), {}, False) for r in self.residuals)

    def label(self, tensor: Any, axis: int) -> Array:
        """The component of each slice of an axis; a tensor that no rule touched has no removable slices."""
        dims = self.probe.shapes[tensor]
        if tensor not in self.offsets:
            return np.zeros(dims[axis], np.int64)
        start = int(self.offsets[tensor][axis])
        return np.asarray(self.labels[start : start + dims[axis]])

    def keep(self, tensor: Any, axis: int, removed: Array) -> Array:
        """Indices that stay, ascending. `removed` is `mask` of the units that go."""
        return np.flatnonzero(~removed[self.label(tensor, axis)])

    def mask(self, units: Iterable[int]) -> Array:
        """bool by label: whether it is one of `units`."""
        found = np.zeros(len(self.pinned), bool)
        found[list(units)] = True
        return found

    def emptied(self, removed: Array) -> list[int]:
        """Of the removed units, those that lie in an axis of which nothing is left."""
        found: dict[int, None] = {}
        for tensor in self.offsets:
            for axis in range(len(self.probe.shapes[tensor])):
                labels = self.label(tensor, axis)
                if len(labels) and removed[labels].all():
                    found.update(dict.fromkeys(labels.tolist()))
        return list(found)

    @cached_property
    def reasons(self) -> dict[tuple[Constant, int], str]:
        """Why an axis of a weight has to stay whole."""
        found: dict[tuple[Constant, int], str] = {}
        for tensor in weights(self.model):
            for axis in range(len(tensor.shape)):
                labels = np.unique(self.label(tensor, axis))
                if self.pinned[labels].all():
                    found[tensor, axis] = self.why.get(int(labels[-1]), "it belongs to nothing that can be removed")
        return found

    def reachable(self) -> float:
        """Share of the elements of all weights that lie in at least one removable slice."""
        total = free = 0
        for tensor in weights(self.model):
            stays = 1
            for axis in range(len(tensor.shape)):
                stays *= int(self.pinned[self.label(tensor, axis)].sum())
            total += tensor.weight.size
            free += tensor.weight.size - stays
        return free / max(total, 1)


def couple(model: Model, *, sample: Mapping[str, Array] | None = None, seen: Probe | None = None) -> Coupling:
    """Analyse a model in plain form. Runs it once for its shapes, and once for each open dimension.

    Raises DataError if the model runs neither on made-up inputs nor on `sample`.
    """
    seen = probe(model, sample) if seen is None else seen
    atoms = Atoms(model, seen.shapes, seen.varying)
    for tensor in model.graph.inputs:
        atoms.pin(tensor, why="a model input")
    for tensor in model.graph.outputs:
        atoms.pin(tensor, why="a model output")
    unknown: Counter[str] = Counter()
    failed: list[tuple[str, str]] = []
    for scope in model.graph.scopes():
        for node in scope.nodes:
            if node.kind not in RULES:
                unknown[node.kind] += 1
                atoms.pin_node(node, f"the operator {node.kind} has no coupling rule")
                continue
            try:
                RULES[node.kind](atoms, node)
            except (UnknownDims, ArithmeticError, LookupError, TypeError, ValueError) as error:
                # A rule trusts its operator's definition and known shapes; what breaks that stays as it is.
                failed.append((node.label, f"{node.op} cannot be followed: {error}"))
                atoms.pin_node(node, f"{node.op} {node.label!r} cannot be followed")
    labels, pinned, why = decide(atoms)
    _pin_whole_axes(labels, pinned, why, atoms)
    averaged = np.zeros(len(pinned), bool)
    for tensor, axis in atoms.averages:
        averaged[labels[atoms.at(tensor, axis)]] = True
    groups = _groups(atoms, labels, pinned, averaged)
    branches = residuals(model, seen.shapes, seen.varying, len(pinned))
    pinned = np.append(pinned, np.zeros(len(branches), bool))
    sums, averages = tuple(atoms.sums), tuple(atoms.averages)
    return Coupling(
        model, seen, labels, atoms.offsets, pinned, why, groups, sums, averages, dict(unknown), tuple(failed), branches
    )


def _pin_whole_axes(labels: Array, pinned: Array, why: dict[int, str], atoms: Atoms) -> None:
    """A unit that is all of some axis would leave an empty tensor."""
    starts, ends = atoms.spans()
    if not len(starts):
        return
    first = labels[starts]
    # Labels of one axis lie side by side: they are all equal if the least is the greatest.
    bounds = np.stack([starts, ends], axis=1).reshape(-1)
    inside = np.append(labels, 0)
    least, greatest = np.minimum.reduceat(inside, bounds)[::2], np.maximum.reduceat(inside, bounds)[::2]
    for label in np.unique(first[least == greatest]).tolist():
        if not pinned[label]:
            pinned[label] = True
            why[label] = "without it a tensor would be empty"


def weights(model: Model) -> list[Constant]:
    """Float constants with two axes or more, in order of first use: what has a width."""
    found: dict[Constant, None] = {}
    for scope in model.graph.scopes():
        for node in scope.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, Constant) and tensor.sparse is None and _is_weight(tensor):
                    found.setdefault(tensor)
    return list(found)


def _is_weight(tensor: Constant) -> bool:
    return tensor.dtype.kind in "fVi" and sum(d > 1 for d in tensor.shape) > 1 and tensor.dtype.itemsize < 8


def _groups(atoms: Atoms, labels: Array, pinned: Array, averaged: Array) -> tuple[Group, ...]:
    """Units by signature: {(weight, axis): how many slices of that axis a unit has}."""
    signatures: dict[int, dict[tuple[Constant, int], int]] = {}
    for tensor in weights(atoms.model):
        if tensor not in atoms.offsets:
            continue
        for axis in range(len(tensor.shape)):
            found, counts = np.unique(labels[atoms.at(tensor, axis)], return_counts=True)
            for label, count in zip(found.tolist(), counts.tolist(), strict=True):
                if not pinned[label]:
                    signatures.setdefault(label, {})[tensor, axis] = count
    members: dict[Any, list[int]] = {}
    for label, signature in signatures.items():
        members.setdefault((tuple(signature.items()), bool(averaged[label])), []).append(label)
    names: Counter[str] = Counter()
    groups = []
    for (signature, flag), units in members.items():
        base = signature[0][0][0].name
        names[base] += 1
        name = base if names[base] == 1 else f"{base} ({names[base]})"
        groups.append(Group(name, tuple(sorted(units)), dict(signature), flag))
    return tuple(groups)
