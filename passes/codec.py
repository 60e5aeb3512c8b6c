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

from onnxcomp.passes.codec_bits import group, pack_numbers, unpack_numbers

__all__ = ["MAX_CODES", "MAX_ELEMENTS", "Encoded", "Form", "Plan", "decode", "encode", "patterns"]

Array = npt.NDArray[Any]
MAX_CODES = 256
# Elements of a tensor that is decoded as a whole: ONNX Runtime folds no node that gives more than 1 GiB, here of int32.
MAX_ELEMENTS = 1 << 28
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


def patterns(values: Array) -> Array:
    """The elements as unsigned integers, flat."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return flat.view(f"u{flat.itemsize}")


# --- encoding --------------------------------------------------------------------------------------------------


def encode(values: Array, plan: Plan) -> Encoded:
    """The streams of a tensor for one of its plans."""
    form, bits = plan.form, patterns(values)
    streams: dict[str, Array] = {}
    attributes: dict[str, list[int]] = {} if form.rows else {"shape": list(values.shape)}
    held: Array = np.arange(bits.size) if form.positions is None else np.flatnonzero(bits)
    if form.positions is not None:
        gaps = np.diff(held, prepend=-1) - 1
        length = bits.size if form.positions == 0 else _unary_bits(gaps, form.positions)
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


def _unary_bits(gaps: npt.NDArray[np.int64], low: int) -> int:
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
    known = patterns(table)
    if size and not 0 <= int(index.max()) < len(known):
        raise ValueError(f"code {int(index.max())} is beyond the {len(known)} values of the table")
    return known[index].view(table.dtype).reshape(shape)


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
