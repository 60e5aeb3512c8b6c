"""Channels that change nothing, found from the weights alone and taken out without loss.

* unread: every operator that would add the unit up multiplies it by zero;
* zero: its weights and biases are zero, and so is all that is computed from them;
* constant: its weights are zero and its biases are not, so that it is a number that goes into the readers' biases;
* duplicate: it equals another unit of its group everywhere, so the readers' weights for both can be added.

The result is equal up to the order of additions. Convolutions keep widths that are multiples of four.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import DataError, ModelError
from onnxcomp.graph import Constant, Model
from onnxcomp.manager import Context
from onnxcomp.passes.dim_constant import Constants, with_biases, without_biases
from onnxcomp.passes.dim_plan import channels_per_unit, convolves
from onnxcomp.passes.dims import Coupling, Group, couple, weights
from onnxcomp.passes.surgery import remove

__all__ = ["remove_without_loss", "worth_a_look"]

Array = npt.NDArray[Any]
_ROUNDS = 8
_ALIGNED = 4  # channels: inputs of other widths cost a convolution of ONNX Runtime a fifth more (measured)
# Operators that make zeros of a slice of zeros, whatever the other slices are; the inputs named have to hold the slice
# too, as they are added to it.
_ADDENDS = {"Add": (0, 1), "Sub": (0, 1), "Conv": (2,), "ConvTranspose": (2,), "Gemm": (2,), "Pad": (2,)}
_KEEP_ZERO = """
    Abs Add Asinh AveragePool Concat Conv ConvTranspose Dropout Elu Erf Expand Flatten Gather Gelu Gemm
    GlobalAveragePool GlobalMaxPool Identity LeakyRelu MatMul MaxPool Mish Mul Neg PRelu Pad ReduceMax ReduceMean
    ReduceSum Relu Reshape Resize Selu Sign Sin Slice Softsign Split Sqrt Squeeze Sub Swish HardSwish Tan Tanh
    Transpose Unsqueeze
"""


def worth_a_look(model: Model) -> bool:
    """Whether any weight has a slice of zeros, or two equal slices: without that there is nothing to remove."""
    for tensor in weights(model):
        values = tensor.values
        looked_up = all(node.op == "Gather" for node in tensor.outputs)
        for axis in range(1 if looked_up else 0, values.ndim if values.ndim < 4 else 2):
            slices = np.moveaxis(values, axis, 0)
            if len({s.tobytes() for s in slices}) < len(slices) or not all(s.any() for s in slices):
                return True
    return False


def remove_without_loss(model: Model, plain: Model, ctx: Context) -> dict[str, int]:
    """Remove units that change nothing from `model`, whose plain form is `plain`. Returns how many of each kind."""
    counts: dict[str, int] = {}
    added = with_biases(plain)
    for _ in range(_ROUNDS):
        try:
            coupling = couple(plain)
        except (DataError, ModelError) as error:
            ctx.refuse("the model", str(error))
            break
        gone = _round(coupling, ctx, counts)
        if not gone:
            break
        plain = remove(coupling, gone).model
        narrow = plain.copy()
        without_biases(narrow, added)
        model.become(narrow)
    return counts


def _round(coupling: Coupling, ctx: Context, counts: dict[str, int]) -> list[int]:
    """Units to remove; weights and biases of readers are updated in the coupled model."""
    gone: list[int] = []
    touches = _Touches(coupling)
    constants = Constants(coupling, touches.places)
    for group in coupling.groups:
        if group.averaged:
            continue
        found = _candidates(group, touches, constants)
        if not found:
            continue
        empty = set(coupling.emptied(coupling.mask([*gone, *(c.unit for c in found)])))
        found = [c for c in found if c.unit not in empty]
        number = _fitting(group, len(found))
        if number < len(found):
            ctx.refuse(group.name, f"{len(found) - number} slices without effect stay: other widths run slower")
        for one in found[:number]:
            if ctx.allow(f"a slice of {group.name} is {one.kind}"):
                one.move()
                gone.append(one.unit)
                counts[one.kind] = counts.get(one.kind, 0) + 1
    return gone


@dataclass(frozen=True)
class _Candidate:
    """A unit without effect, once `move` has given what it does to others."""

    kind: str
    unit: int
    move: Callable[[], None]


def _candidates(group: Group, touches: _Touches, constants: Constants) -> list[_Candidate]:
    """Of each unit the first reason, fewer than all units."""
    units = list(group.units)
    found = {u: _Candidate("unread", u, _nothing) for u in touches.unread(units)}
    found.update({u: _Candidate("zero", u, _nothing) for u in touches.zero(units) if u not in found})
    for unit in constants.units([u for u in units if u not in found]):
        if constants.known(unit):
            found[unit] = _Candidate("constant", unit, partial(constants.absorb, unit))
    for kept, twin in touches.duplicates([u for u in units if u not in found]):
        found[twin] = _Candidate("duplicate", twin, partial(touches.add_up, kept, twin))
    return list(found.values())[: group.width - 1]


def _nothing() -> None:
    pass


def _fitting(group: Group, count: int) -> int:
    """How many of `count` units may go so that convolutions keep widths that their kernels take without detours."""
    widths = group.width * channels_per_unit(group)
    if not convolves(group) or widths % _ALIGNED:
        return count
    while count and (group.width - count) * channels_per_unit(group) % _ALIGNED:
        count -= 1
    return count


class _Touches:
    """Where each unit lies: {unit: {(tensor, axis): indices}}."""

    def __init__(self, coupling: Coupling) -> None:
        self.summed = set(coupling.sums)
        self.places: dict[int, dict[tuple[Any, int], Array]] = {u: {} for g in coupling.groups for u in g.units}
        for tensor in coupling.offsets:
            for axis in range(len(coupling.probe.shapes[tensor])):
                labels = coupling.label(tensor, axis)
                if not len(labels):
                    continue
                order = np.argsort(labels, kind="stable")
                found, starts = np.unique(labels[order], return_index=True)
                for label, index in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
                    if label in self.places:
                        self.places[label][tensor, axis] = index

    def _slices(self, unit: int, *, summed: bool) -> Mapping[tuple[Any, int], Array]:
        return {
            (tensor, axis): np.take(tensor.values, index, axis=axis)
            for (tensor, axis), index in self.places[unit].items()
            if isinstance(tensor, Constant) and ((tensor, axis) in self.summed) == summed
        }

    def _sums_computed(self, unit: int) -> bool:
        """Whether an operator adds up slices that are computed, not weights."""
        return any((t, a) in self.summed and not isinstance(t, Constant) for t, a in self.places[unit])

    def unread(self, units: Sequence[int]) -> list[int]:
        found = []
        for unit in units:
            read = self._slices(unit, summed=True).values()
            if read and not any(s.any() for s in read) and not self._sums_computed(unit):
                found.append(unit)
        return found

    def zero(self, units: Sequence[int]) -> list[int]:
        return [
            u
            for u in units
            if not any(s.any() for s in self._slices(u, summed=False).values())
            and all(self._keeps_zero(node, u) for t, _ in self.places[u] for node in (*t.inputs, *t.outputs))
        ]

    def _keeps_zero(self, node: Any, unit: int) -> bool:
        held = {t for t, _ in self.places[unit]}
        if node.kind not in _KEEP_ZERO.split() or not any(y in held for y in node.outputs):
            return node.kind in _KEEP_ZERO.split()
        added = [node.inputs[k] for k in _ADDENDS.get(node.op, ()) if k < len(node.inputs) and node.inputs[k].name]
        return all(t in held or (isinstance(t, Constant) and not t.values.any()) for t in added)

    def duplicates(self, units: Sequence[int]) -> list[tuple[int, int]]:
        """(kept, equal to it): both lie in the same tensors, and all that makes them is equal."""
        first: dict[Any, int] = {}
        found = []
        for unit in units:
            if self._sums_computed(unit):
                continue
            made = self._slices(unit, summed=False)
            key = (
                tuple((id(t), a, len(i)) for (t, a), i in self.places[unit].items()),
                tuple(s.tobytes() for s in made.values()),
            )
            kept = first.setdefault(key, unit)
            if kept != unit and any(s.any() for s in made.values()):
                found.append((kept, unit))
        return found

    def add_up(self, kept: int, gone: int) -> None:
        """Readers multiply the kept unit by the sum of both weights."""
        for (tensor, axis), index in self.places[gone].items():
            if (tensor, axis) in self.summed:
                values = np.moveaxis(tensor.values.astype(np.float64), axis, 0)
                values[self.places[kept][tensor, axis]] += values[index]
                tensor.values = np.moveaxis(values, 0, axis).astype(tensor.dtype)
