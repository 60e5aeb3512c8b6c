"""Lossless encodings of weight tensors, after "Deep Compression" (Han et al., ICLR 2016). Pure numpy, bit-exact.

A tensor is seen as n bit patterns, so that -0.0, denormals and NaN payloads come back as they were; "zero" is the
pattern of +0.0. An encoding stores a table of values and, for each element, a place in it:

* dense: a code of w = ceil(log2 K) bits for each element, K the number of different values (w = 0: one value);
* sparse: the places of the m elements that are not zero, and for these a code, or the values as they are;
* grouped: a row of the table for each group of slices along one axis (codebooks per output channel, for one).

Places are Rice-coded (Rice and Plaunt, 1971): of each gap g, the number of zeros before a value, the quotient
g >> l in unary (that many zeros and a one) and the low l bits. With l = 0 that is the bitmap of the tensor. The whole
takes m (1 + l) + sum(g >> l) bits; at random places and the best l, that is within 4 % of the entropy
n H(m/n) from 50 % zeros up.

Codes have a fixed width. Variable ones would save little: the int8 weights of the quantized models in models/ have an
entropy of 7.4 to 7.8 bits, and decoding them with operators of static shape takes many more nodes at load.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from onnxcomp.passes.codec_bits import group, pack_numbers, packed_shape, unpack_numbers

__all__ = ["MAX_ELEMENTS", "Encoded", "Form", "Plan", "decode", "encode", "plans"]

Array = npt.NDArray[Any]
MAX_CODES = 256
# Elements of a tensor that is decoded as a whole: ONNX Runtime folds no node that gives more than 1 GiB, here of int32.
MAX_ELEMENTS = 1 << 28
_MAX_LOW = 8
_SAMPLE = 1 << 16
_NAME = re.compile(r"(?:(Bitmap)|(Rows)|Rice([1-8]))?(?:Values|Codes([0-8]))(Grouped)?")


@dataclass(frozen=True, order=True)
class Form:
    """What a decoder has to know. `positions`: None for a dense form, else l; `width`: bits of a code, or None for
    values as they are (sparse only). `rows`: a dense table of which single rows are decoded, when they are looked up.
    """

    positions: int | None
    width: int | None
    grouped: bool = False
    rows: bool = False

    @property
    def name(self) -> str:
        places = "Rows" if self.rows else ""
        if self.positions is not None:
            places = f"Rice{self.positions}" if self.positions else "Bitmap"
        values = "Values" if self.width is None else f"Codes{self.width}"
        return places + values + ("Grouped" if self.grouped else "")

    @classmethod
    def parse(cls, name: str) -> Self | None:
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        bitmap, rows, low, width, grouped = match.groups()
        positions = 0 if bitmap else int(low) if low else None
        form = cls(positions, int(width) if width else None, bool(grouped), bool(rows))
        sensible = form.width is not None or (form.positions is not None and not form.grouped)
        if form.rows:
            sensible = bool(form.width) and not form.grouped
        return form if sensible else None

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams: b(its of the places), r(ests of the gaps), c(odes), t(able)."""
        used = {"b": self.positions is not None, "r": bool(self.positions), "c": bool(self.width), "t": True}
        return tuple(name for name, there in used.items() if there)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The streams, and the i(ndices) of rows."""
        return (*self.streams, "i") if self.rows else self.streams

    @property
    def attributes(self) -> tuple[str, ...]:
        used = {"shape": not self.rows, "count": bool(self.positions), "groups": self.grouped}
        return tuple(name for name, there in used.items() if there)

    def shape(self, attributes: Mapping[str, list[int]], codes: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor, from the attributes of the call and the shape of the codes."""
        if not self.rows:
            return tuple(attributes["shape"])
        rows, groups, _ = codes
        return rows, groups * group(self.width or 8)[0]


@dataclass(frozen=True)
class Plan:
    """A way to encode a tensor: the form, the bytes of its streams with their shapes, and the grouped axis."""

    form: Form
    shapes: dict[str, tuple[int, ...]]
    nbytes: int
    groups: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Encoded:
    """The streams of a form by name, and the attributes of the call. The table has the type of the tensor."""

    form: Form
    streams: dict[str, Array]
    attributes: dict[str, list[int]]


# --- what is possible ------------------------------------------------------------------------------------------


def plans(values: Array, *, rows: bool = False) -> list[Plan]:
    """The encodings of a tensor that are smaller than it is, without any overhead of a file.

    `rows`: those only of which rows can be decoded alone, if there are any.
    """
    bits = _patterns(values)
    if not bits.size:
        return []
    if rows and (plan := _rows_plan(bits, values.shape)) is not None:
        return [plan]
    facts = _Facts(bits, values.shape)
    found = [plan for positions in facts.positions() for plan in facts.plans(positions)]
    return [plan for plan in found if plan.nbytes < bits.nbytes]


def _rows_plan(bits: Array, shape: tuple[int, ...]) -> Plan | None:
    """Dense codes of a table [rows, columns] whose rows end with a byte."""
    table = _distinct(bits)
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
        self.table = _distinct(bits)
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
        for groups, dense, sparse in self.rows:
            different = sparse if zero else dense
            if different <= MAX_CODES:
                form = Form(positions, _width(different), True)
                found.append(self._plan(form, count, (groups[1], different + zero), groups))
        return found

    def _plan(self, form: Form, count: int, table: tuple[int, ...], groups: tuple[int, int, int] | None) -> Plan:
        shapes: dict[str, tuple[int, ...]] = {}
        if form.positions is not None:
            shapes["b"] = packed_shape(self.lows[form.positions], 1)
        if form.positions:
            shapes["r"] = packed_shape(count, form.positions)
        if form.width:
            shapes["c"] = packed_shape(count, form.width)
        nbytes = sum(math.prod(s) for s in shapes.values()) + math.prod(table) * self.itemsize
        shapes["t"] = table
        return Plan(form, shapes, nbytes, groups)


def _patterns(values: Array) -> Array:
    """The elements as unsigned integers, flat."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return flat.view(f"u{flat.itemsize}")


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


def _distinct(bits: Array) -> Array | None:
    """The different patterns in order; None if they are more than fit a table (one more for zero)."""
    if bits.size > 4 * _SAMPLE and len(np.unique(bits[:: bits.size // _SAMPLE])) > MAX_CODES + 1:
        return None
    if bits.itemsize <= 2:
        found = np.flatnonzero(np.bincount(bits, minlength=2)).astype(bits.dtype)
    else:
        found = np.unique(bits)
    return found if len(found) <= MAX_CODES + 1 and len(found) - (found[0] == 0) <= MAX_CODES else None


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


# --- encoding --------------------------------------------------------------------------------------------------


def encode(values: Array, plan: Plan) -> Encoded:
    """The streams of a tensor for one of its plans."""
    form, bits = plan.form, _patterns(values)
    streams: dict[str, Array] = {}
    attributes: dict[str, list[int]] = {} if form.rows else {"shape": list(values.shape)}
    held: Array = np.arange(bits.size) if form.positions is None else np.flatnonzero(bits)
    if form.positions is not None:
        gaps = np.diff(held, prepend=-1) - 1
        length = bits.size if form.positions == 0 else plan_bits(gaps, form.positions)
        unary = np.zeros(length, np.uint8)
        unary[np.cumsum((gaps >> form.positions) + 1) - 1] = 1
        streams["b"] = pack_numbers(unary, 1)
        if form.positions:
            streams["r"] = pack_numbers(gaps & ((1 << form.positions) - 1), form.positions)
            attributes["count"] = [len(held)]
    if plan.groups is not None:
        attributes["groups"] = list(plan.groups)
    codes, table = _coded(bits if form.positions is None else bits[held], held, plan)
    if form.width:
        streams["c"] = pack_numbers(codes, form.width)
        if form.rows:
            streams["c"] = streams["c"].reshape(plan.shapes["c"])
    streams["t"] = table.view(values.dtype)
    return Encoded(form, streams, attributes)


def plan_bits(gaps: npt.NDArray[np.int64], low: int) -> int:
    """Bits of the unary stream of Rice-coded gaps."""
    return int((gaps >> low).sum()) + len(gaps)


def _coded(kept: Array, held: Array, plan: Plan) -> tuple[Array, Array]:
    """Codes of the elements that are stored, and the table, in which zero comes first if the form is sparse."""
    zero = int(plan.form.positions is not None)
    table = np.zeros(plan.shapes["t"], kept.dtype)
    if plan.form.width is None:
        table[1:] = kept
        return np.empty(0, np.uint8), table
    if plan.groups is None:
        table[zero:] = np.unique(kept)
        return np.searchsorted(table[zero:], kept), table
    _, groups, inner = plan.groups
    owner = held // inner % groups
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=groups))
    codes = np.empty(len(kept), np.uint8)
    for row, members in enumerate(np.split(order, ends[:-1])):
        different, codes[members] = np.unique(kept[members], return_inverse=True)
        table[row, zero : zero + len(different)] = different
    return codes, table


# --- decoding --------------------------------------------------------------------------------------------------


def decode(encoded: Encoded) -> Array:
    """The tensor, bit for bit. Raises ValueError if the streams do not fit each other."""
    form, streams = encoded.form, encoded.streams
    shape = form.shape(encoded.attributes, streams["c"].shape if form.width else ())
    size = math.prod(shape)
    _check(encoded, size)
    table = streams["t"]
    index = np.zeros(size, np.int64)
    if form.positions is None:
        if form.width:
            index[:] = unpack_numbers(streams["c"].reshape(-1, group(form.width)[1]), form.width, size)
    else:
        held = _places(encoded, size)
        if form.width is None:
            index[held] = np.arange(1, len(held) + 1)
        else:
            codes = unpack_numbers(streams["c"], form.width, len(held)) if form.width else 0
            index[held] = np.add(codes, 1, dtype=np.int64)
    if form.grouped:
        _, groups, inner = encoded.attributes["groups"]
        index += np.arange(size) // inner % groups * table.shape[1]
    patterns = _patterns(table)
    if size and not 0 <= int(index.max()) < len(patterns):
        raise ValueError(f"code {int(index.max())} is beyond the {len(patterns)} values of the table")
    return patterns[index].view(table.dtype).reshape(shape)


def _check(encoded: Encoded, size: int) -> None:
    """Raise ValueError if streams or attributes cannot be those of a tensor of that size."""
    form, streams, attributes = encoded.form, encoded.streams, encoded.attributes
    if size > MAX_ELEMENTS and not form.rows:
        raise ValueError(f"{size} elements are more than {MAX_ELEMENTS}")
    for letter, width in (("b", 1), ("r", form.positions or 1), ("c", form.width or 1)):
        if letter in streams and streams[letter].shape[-1:] != (group(width)[1],):
            raise ValueError(f"stream {letter} of shape {list(streams[letter].shape)} has no numbers of {width} bits")
    if streams["t"].ndim != 1 + form.grouped or not streams["t"].size:
        raise ValueError(f"the table has shape {list(streams['t'].shape)}")
    if form.positions is None and form.width and streams["c"].size * 8 < size * form.width:
        raise ValueError(f"there are too few codes for {size} elements")
    groups = attributes.get("groups", [1, 1, size])
    fits = len(groups) == 3 and math.prod(groups) == size and (not form.grouped or len(streams["t"]) == groups[1])
    if not fits or len(attributes.get("count", [0])) != 1:
        raise ValueError(f"groups {groups} or the count do not fit {size} elements")


def _places(encoded: Encoded, size: int) -> npt.NDArray[np.int64]:
    """Places of the elements that are not zero. Raises ValueError if one is outside."""
    low = encoded.form.positions or 0
    bits = encoded.streams["b"]
    unary = unpack_numbers(bits, 1, bits.size * 8)
    ones = np.flatnonzero(unary)
    if low:
        count = encoded.attributes["count"][0]
        if len(ones) != count:
            raise ValueError(f"{len(ones)} places where {count} were announced")
        rests = unpack_numbers(encoded.streams["r"], low, count).astype(np.int64)
        quotients = np.diff(ones, prepend=-1) - 1
        ones = np.cumsum((quotients << low) + rests + 1) - 1
    if len(ones) and ones[-1] >= size:
        raise ValueError(f"place {int(ones[-1])} is outside of {size} elements")
    return ones
