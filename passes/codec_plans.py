"""Which encodings a tensor has (see codec.py), and how many bytes each takes, from counts of its bit patterns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.passes.codec import MAX_CODES, MAX_ELEMENTS, Form, Plan, patterns
from onnxcomp.passes.codec_bits import group, packed_shape

__all__ = ["plans"]

Array = npt.NDArray[Any]
_MAX_LOW = 8
_SAMPLE = 1 << 16


def plans(values: Array, *, rows: bool = False, ranks: bool = True) -> list[Plan]:
    """The encodings of a tensor that are smaller than it is, without any overhead of a file.

    `rows`: those only of which rows can be decoded alone, if there are any; `ranks`: those with ranks as well.
    """
    bits = patterns(values)
    if not bits.size:
        return []
    if rows and (plan := _rows_plan(bits, values.shape)) is not None:
        return [plan]
    facts = _Facts(bits, values.shape)
    found = [plan for positions in facts.positions() for plan in facts.plans(positions)]
    return [plan for plan in found if plan.nbytes < bits.nbytes and (ranks or plan.form.ranks is None)]


def _rows_plan(bits: Array, shape: tuple[int, ...]) -> Plan | None:
    """Dense codes of a table [rows, columns] whose rows end with a byte."""
    table, _ = _distinct(bits)
    width = 0 if table is None or len(table) > MAX_CODES else _width(len(table))
    if table is None or not width or len(shape) != 2 or shape[1] % group(width)[0]:
        return None
    groups, size = packed_shape(shape[1], width)
    codes = (shape[0], groups, size)
    nbytes = math.prod(codes) + table.nbytes
    return Plan(Form(None, width, rows=True), {"c": codes, "t": table.shape}, nbytes) if nbytes < bits.nbytes else None


class _Facts:
    """Counts of a tensor's bit patterns, from which the sizes of its encodings follow."""

    def __init__(self, bits: Array, shape: tuple[int, ...]) -> None:
        self.shape, self.size, self.itemsize = shape, bits.size, bits.itemsize
        self.zeros = int(bits.size - np.count_nonzero(bits))
        self.lows: dict[int, int] = {0: self.size} if self.zeros else {}  # bits of the places, without low parts
        if 4 * self.zeros > self.size:
            self.lows.update(_rice_bits(_gaps(bits)))
        self.table, self.counts = _distinct(bits)
        self.rows = _grouped(bits, shape, self.table)

    def positions(self) -> list[int | None]:
        return [None, *self.lows]

    def plans(self, positions: int | None) -> list[Plan]:
        count = self.size if positions is None else self.size - self.zeros
        zero = 0 if positions is None else 1
        found = []
        if count == 0:
            return []
        if positions is not None:
            found.append(self._plan(Form(positions, None), count, (count + 1,), None))
        if self.table is not None:
            different = len(self.table) - int(zero and self.table[0] == 0)
            if different <= MAX_CODES:
                found.append(self._plan(Form(positions, _width(different)), count, (different + zero,), None))
                found += self._ranked(positions, count)
        for groups, dense, sparse in self.rows:
            different = sparse if zero else dense
            if different <= MAX_CODES:
                form = Form(positions, _width(different), True)
                found.append(self._plan(form, count, (groups[1], different + zero), groups))
        return found

    def _ranked(self, positions: int | None, count: int) -> list[Plan]:
        """Ranks by frequency with the best number of low bits and its neighbours."""
        assert self.table is not None
        counts = np.sort(self.counts[int(positions is not None and self.table[0] == 0) :])[::-1]
        ranks = np.arange(len(counts))
        unary = {low: int((counts * ((ranks >> low) + 1)).sum()) for low in range(_width(len(counts)))}
        if not unary:
            return []
        best = min(unary, key=lambda low: unary[low] + low * count)
        found = []
        for low in (best - 1, best, best + 1):
            if unary.get(low, MAX_ELEMENTS + 1) <= MAX_ELEMENTS:
                table = (len(counts) + int(positions is not None),)
                found.append(self._plan(Form(positions, None, ranks=low), count, table, None, unary[low]))
        return found

    def _plan(
        self, form: Form, count: int, table: tuple[int, ...], groups: tuple[int, int, int] | None, unary: int = 0
    ) -> Plan:
        shapes: dict[str, tuple[int, ...]] = {}
        if form.positions is not None:
            shapes["b"] = packed_shape(self.lows[form.positions], 1)
        if form.positions:
            shapes["r"] = packed_shape(count, form.positions)
        if form.ranks is not None:
            shapes["u"] = packed_shape(unary, 1)
        if form.low:
            shapes["c"] = packed_shape(count, form.low)
        nbytes = sum(math.prod(s) for s in shapes.values()) + math.prod(table) * self.itemsize
        shapes["t"] = table
        return Plan(form, shapes, nbytes, groups)


def _width(different: int) -> int:
    return max(0, different - 1).bit_length()


def _gaps(bits: Array) -> npt.NDArray[np.int64]:
    """Zeros before each element that is not zero."""
    places = np.flatnonzero(bits)
    return np.diff(places, prepend=-1) - 1


def _rice_bits(gaps: npt.NDArray[np.int64]) -> dict[int, int]:
    """For the best l and its neighbours: bits of the unary stream."""
    if not len(gaps):
        return {}
    guess = round(math.log2(max(1.0, 0.69 * float(gaps.mean()))))
    lows = {min(max(low, 1), _MAX_LOW) for low in (guess - 1, guess, guess + 1)}
    return {low: int((gaps >> low).sum()) + len(gaps) for low in sorted(lows)}


def _distinct(bits: Array) -> tuple[Array | None, npt.NDArray[np.int64]]:
    """The different patterns in order, and how often each is there; None if they are more than fit a table (one more
    for zero).
    """
    none = np.empty(0, np.int64)
    if bits.size > 4 * _SAMPLE and len(np.unique(bits[:: bits.size // _SAMPLE])) > MAX_CODES + 1:
        return None, none
    if bits.itemsize <= 2:
        counted = np.bincount(bits, minlength=2)
        found = np.flatnonzero(counted).astype(bits.dtype)
        counts = counted[found]
    else:
        found, counts = np.unique(bits, return_counts=True)
    fits = len(found) <= MAX_CODES + 1 and len(found) - (found[0] == 0) <= MAX_CODES
    return (found, counts) if fits else (None, none)


def _grouped(
    bits: Array, shape: tuple[int, ...], table: Array | None
) -> list[tuple[tuple[int, int, int], int, int]]:
    """Ways to group slices along an axis: the view, and the most patterns in a group with and without zero."""
    found = []
    for axis in sorted({0, 1, len(shape) - 1} & set(range(len(shape)))):
        outer, channels, inner = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
        if channels < 2 or outer * inner < 2:
            continue
        view = bits.reshape(outer, channels, inner)
        if table is not None:
            counted = _by_presence(view, table)
        else:
            counted = _by_sorting(view)
        found += [((outer, channels // size, inner * size), *most) for size, most in counted.items()]
    return found


def _by_presence(view: Array, table: Array) -> dict[int, tuple[int, int]]:
    """Most patterns by group size, where a table of all patterns exists."""
    channels = view.shape[1]
    if _width(len(np.unique(view[:, 0]))) >= _width(len(table)):
        return {}
    codes = np.searchsorted(table, view)
    codes += np.arange(channels)[None, :, None] * len(table)
    there = np.bincount(codes.reshape(-1), minlength=channels * len(table)).reshape(channels, -1) > 0
    found, size = {}, 1
    while True:
        most = int(there.sum(axis=1).max())
        if _width(most) >= _width(len(table)):
            break
        found[size] = (most, int(there[:, int(table[0] == 0) :].sum(axis=1).max()))
        if len(there) % 2:
            break
        there, size = there[0::2] | there[1::2], size * 2
    return found


def _by_sorting(view: Array) -> dict[int, tuple[int, int]]:
    """Most patterns by group size, where there are too many for one table."""
    found: dict[int, tuple[int, int]] = {}
    if len(np.unique(view[:, 0])) > MAX_CODES + 1:
        return found
    rows, size = np.ascontiguousarray(view.transpose(1, 0, 2)).reshape(view.shape[1], -1), 1
    while True:
        ordered = np.sort(rows, axis=1)
        counts = (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1) + 1
        most, most_values = int(counts.max()), int((counts - (ordered[:, 0] == 0)).max())
        if most_values > MAX_CODES:
            break
        found[size] = (most, most_values)
        if len(rows) % 2 or len(rows) == 2:
            break
        rows, size = rows.reshape(len(rows) // 2, -1), size * 2
    return found
