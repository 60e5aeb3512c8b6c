"""Lossless encodings of weight tensors, after "Deep Compression" (Han et al., ICLR 2016). Pure numpy, bit-exact.

A tensor is seen as n bit patterns, so that -0.0, denormals and NaN payloads come back as they were; "zero" is the
pattern of +0.0. An encoding stores a table of values and, for each element, a place in it:

* dense: a code of w = ceil(log2 K) bits for each element, K the number of different values (w = 0: one value);
* sparse: the places of the m elements that are not zero, and for these a code, or the values as they are;
* grouped: a row of the table for each group of slices along one axis (codebooks per output channel, for one);
* ranks: in place of codes of one width, the rank of each value among those of the table by frequency, Rice-coded.

The Rice code of a number g (Rice and Plaunt, 1971) is the quotient g >> l in unary (that many zeros and a one) and the
low l bits; m numbers take m (1 + l) + sum(g >> l) bits. Places are coded as gaps, the number of zeros before each
value. With l = 0 that is the bitmap of the tensor; at random places and the best l, it is within 4 % of the entropy
n H(m/n) from 50 % zeros up. Values around zero on an even grid have frequencies that fall about geometrically with
their rank, for which Rice codes are nearly the best there are (Gallager and Van Voorhis, 1975): they take the place of
the Huffman codes of Deep Compression, which standard operators could not decode in a few steps.
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

__all__ = ["MAX_CODES", "MAX_ELEMENTS", "MAX_RANKED", "Encoded", "Form", "Plan", "decode", "encode", "patterns"]

Array = npt.NDArray[Any]
MAX_CODES = 256
# Elements of a tensor that is decoded as a whole: ONNX Runtime folds no node that gives more than 1 GiB, here of int32.
MAX_ELEMENTS = 1 << 28
# Elements of all tensors of a model that are stored as ranks. ONNX Runtime keeps what it folds until the model is
# loaded: 100 bytes for each of them, twice those of codes of one width.
MAX_RANKED = 1 << 25
_NAME = re.compile(r"(?:(Bitmap)|(Rows)|Rice([1-8]))?(?:Values|Codes([0-8])|Ranks([0-7]))(Grouped)?")


@dataclass(frozen=True, order=True)
class Form:
    """What a decoder has to know. `positions`: None for a dense form, else l; `width`: bits of a code, or None for
    ranks of which `ranks` is l, or else for values as they are (sparse only). `rows`: a dense table of which single
    rows are decoded, when they are looked up.
    """

    positions: int | None
    width: int | None
    grouped: bool = False
    rows: bool = False
    ranks: int | None = None

    @property
    def name(self) -> str:
        places = "Rows" if self.rows else ""
        if self.positions is not None:
            places = f"Rice{self.positions}" if self.positions else "Bitmap"
        values = "Values" if self.width is None else f"Codes{self.width}"
        if self.ranks is not None:
            values = f"Ranks{self.ranks}"
        return places + values + ("Grouped" if self.grouped else "")

    @classmethod
    def parse(cls, name: str) -> Self | None:
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        bitmap, rows, low, width, ranks, grouped = match.groups()
        positions = 0 if bitmap else int(low) if low else None
        one_width, ranked = int(width) if width else None, int(ranks) if ranks else None
        form = cls(positions, one_width, bool(grouped), bool(rows), ranked)
        sensible = form.coded or (form.positions is not None and not form.grouped)
        if form.rows:
            sensible = bool(form.width) and not form.grouped
        return form if sensible and not (ranks and grouped) else None

    @property
    def coded(self) -> bool:
        """Whether there are codes or ranks, and not values as they are."""
        return self.width is not None or self.ranks is not None

    @property
    def low(self) -> int:
        """Bits of each number of the codes: all of them, or those of a rank that are not in unary."""
        return self.width or self.ranks or 0

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams: b(its of the places), r(ests of the gaps), u(nary parts), c(odes), t(able)."""
        places, gaps = self.positions is not None, bool(self.positions)
        used = {"b": places, "r": gaps, "u": self.ranks is not None, "c": bool(self.low), "t": True}
        return tuple(name for name, there in used.items() if there)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The streams, and the i(ndices) of rows."""
        return (*self.streams, "i") if self.rows else self.streams

    @property
    def attributes(self) -> tuple[str, ...]:
        counted = bool(self.positions) or (self.positions is not None and self.ranks is not None)
        used = {"shape": not self.rows, "count": counted, "groups": self.grouped}
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
        streams["b"], rests = _rice(gaps, form.positions, at_least=0 if form.positions else bits.size)
        if form.positions:
            streams["r"] = pack_numbers(rests, form.positions)
        if "count" in form.attributes:
            attributes["count"] = [len(held)]
    if plan.groups is not None:
        attributes["groups"] = list(plan.groups)
    codes, table = _coded(bits if form.positions is None else bits[held], held, plan)
    if form.ranks is not None:
        streams["u"], codes = _rice(codes, form.ranks)
    if form.low:
        streams["c"] = pack_numbers(codes, form.low)
        if form.rows:
            streams["c"] = streams["c"].reshape(plan.shapes["c"])
    streams["t"] = table.view(values.dtype)
    return Encoded(form, streams, attributes)


def _rice(numbers: npt.NDArray[np.int64], low: int, *, at_least: int = 0) -> tuple[Array, Array]:
    """The quotients of Rice codes as a packed stream (filled up with zeros to `at_least` bits), and the low parts."""
    quotients = numbers >> low
    unary = np.zeros(max(int(quotients.sum()) + len(numbers), at_least), np.uint8)
    unary[np.cumsum(quotients + 1) - 1] = 1
    return pack_numbers(unary, 1), numbers & ((1 << low) - 1)


def _coded(kept: Array, held: Array, plan: Plan) -> tuple[Array, Array]:
    """Codes of the elements that are stored, and the table, in which zero comes first if the form is sparse."""
    zero = int(plan.form.positions is not None)
    table = np.zeros(plan.shapes["t"], kept.dtype)
    if not plan.form.coded:
        table[1:] = kept
        return np.empty(0, np.uint8), table
    if plan.groups is None:
        values, codes, counts = np.unique(kept, return_inverse=True, return_counts=True)
        order = np.arange(len(values)) if plan.form.ranks is None else np.argsort(-counts, kind="stable")
        table[zero:] = values[order]
        return np.argsort(order)[codes], table
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
        index[:] = _codes(encoded, size)
    else:
        held = _places(encoded, size)
        index[held] = _codes(encoded, len(held)) + 1 if form.coded else np.arange(1, len(held) + 1)
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
    for letter, width in (("b", 1), ("r", form.positions or 1), ("u", 1), ("c", form.low or 1)):
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


def _codes(encoded: Encoded, count: int) -> npt.NDArray[np.int64]:
    """Codes of the elements that are stored, ranks among them. Raises ValueError if they are not so many."""
    form, streams = encoded.form, encoded.streams
    if form.ranks is not None:
        return _numbers(streams["u"], streams.get("c"), form.ranks, count)
    if not form.width:
        return np.zeros(count, np.int64)
    return unpack_numbers(streams["c"].reshape(-1, group(form.width)[1]), form.width, count).astype(np.int64)


def _places(encoded: Encoded, size: int) -> npt.NDArray[np.int64]:
    """Places of the elements that are not zero. Raises ValueError if one is outside."""
    streams, low = encoded.streams, encoded.form.positions or 0
    count = encoded.attributes["count"][0] if "count" in encoded.form.attributes else None
    places = np.cumsum(_numbers(streams["b"], streams.get("r"), low, count) + 1) - 1
    if len(places) and places[-1] >= size:
        raise ValueError(f"place {int(places[-1])} is outside of {size} elements")
    return places


def _numbers(unary: Array, rests: Array | None, low: int, count: int | None) -> npt.NDArray[np.int64]:
    """Numbers from their Rice codes. Raises ValueError if they are not as many as announced."""
    ones = np.flatnonzero(unpack_numbers(unary, 1, unary.size * 8))
    if count is not None and len(ones) != count:
        raise ValueError(f"{len(ones)} numbers where {count} were announced")
    quotients = np.diff(ones, prepend=-1) - 1
    if rests is None:
        return quotients
    if rests.size * 8 < len(ones) * low:
        raise ValueError(f"there are low bits for fewer than the {len(ones)} numbers that were announced")
    return np.asarray((quotients << low) + unpack_numbers(rests, low, len(ones)))
