"""Channels that change nothing, found from the weights alone and taken out without loss.

* unread: every operator that would add the unit up multiplies it by zero;
* zero: its weights and biases are zero, and so is all that is computed from them;
* duplicate: it equals another unit of its group everywhere, so the readers' weights for both can be added.

The result is equal up to the order of additions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import DataError
from onnxcomp.graph import Constant, Model
from onnxcomp.manager import Context
from onnxcomp.passes.dims import Coupling, Group, couple
from onnxcomp.passes.surgery import remove

__all__ = ["remove_without_loss"]

Array = npt.NDArray[Any]
_ROUNDS = 8
# Operators that make zeros of a slice of zeros, whatever the other slices are.
_KEEP_ZERO = """
    Abs Add Asinh AveragePool Concat Conv ConvTranspose Dropout Elu Erf Expand Flatten Gather Gelu Gemm
    GlobalAveragePool GlobalMaxPool Identity LeakyRelu MatMul MaxPool Mish Mul Neg PRelu Pad ReduceMax ReduceMean
    ReduceSum Relu Reshape Resize Selu Sign Sin Slice Softsign Split Sqrt Squeeze Sub Swish HardSwish Tan Tanh
    Transpose Unsqueeze
"""


def remove_without_loss(model: Model, plain: Model, ctx: Context) -> dict[str, Any]:
    """Remove units that change nothing from `model`, whose plain form is `plain`. Returns how many of each kind."""
    counts: dict[str, int] = {}
    for _ in range(_ROUNDS):
        try:
            coupling = couple(plain)
        except DataError as error:
            ctx.refuse("the model", str(error))
            break
        gone = _round(coupling, ctx, counts)
        if not gone:
            break
        plain = remove(coupling, gone).model
        model.become(plain.copy())
    return {"removed_without_loss": counts}


def _round(coupling: Coupling, ctx: Context, counts: dict[str, int]) -> list[int]:
    """Units to remove; weights of readers of duplicates are updated in the coupled model."""
    gone: list[int] = []
    touches = _Touches(coupling)
    for group in coupling.groups:
        if group.averaged:
            continue
        left = list(group.units)
        for kind, units in (("unread", touches.unread(left)), ("zero", touches.zero(left))):
            for unit in units:
                if len(left) > 1 and unit in left and ctx.allow(f"a slice of {group.name} is {kind}"):
                    left.remove(unit)
                    gone.append(unit)
                    counts[kind] = counts.get(kind, 0) + 1
        if len(left) == group.width:  # one kind at a time: weights change under the feet of the others
            for kept, twin in touches.duplicates(group, left):
                if ctx.allow(f"a slice of {group.name} is there twice"):
                    touches.add_up(kept, twin)
                    gone.append(twin)
                    counts["duplicate"] = counts.get("duplicate", 0) + 1
    empty = set(coupling.emptied(coupling.mask(gone))) if gone else set()
    return [unit for unit in gone if unit not in empty]


class _Touches:
    """Where each unit lies: {unit: {(tensor, axis): indices}}."""

    def __init__(self, coupling: Coupling) -> None:
        self.summed = set(coupling.sums)
        self.places: dict[int, dict[tuple[Any, int], Array]] = {u: {} for g in coupling.groups for u in g.units}
        for tensor in coupling.offsets:
            for axis in range(len(coupling.probe.shapes[tensor])):
                labels = coupling.label(tensor, axis)
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
        return [
            u
            for u in units
            if not self._sums_computed(u) and not any(s.any() for s in self._slices(u, summed=True).values())
        ]

    def zero(self, units: Sequence[int]) -> list[int]:
        keep_zero = frozenset(_KEEP_ZERO.split())
        return [
            u
            for u in units
            if not any(s.any() for s in self._slices(u, summed=False).values())
            and all(node.kind in keep_zero for t, _ in self.places[u] for node in (*t.inputs, *t.outputs))
        ]

    def duplicates(self, group: Group, units: Sequence[int]) -> list[tuple[int, int]]:
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
