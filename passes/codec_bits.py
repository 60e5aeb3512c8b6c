"""Numbers of 1 to 8 bits, packed without a gap.

Numbers lie one behind the other, lowest bit first: number i has the bits from i*w on. They come in groups that end
with a byte: of lcm(w, 8) bits, 8 / gcd(w, 8) numbers in w / gcd(w, 8) bytes. The packed form is an array
[groups, bytes], whose last group is filled up with zeros, so that standard operators can take it apart by columns.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["group", "pack_numbers", "packed_shape", "unpack_numbers"]

Numbers = npt.NDArray[np.uint8]


def group(width: int) -> tuple[int, int]:
    """Numbers and bytes of a group of numbers of `width` bits, 1 to 8."""
    common = math.gcd(width, 8)
    return 8 // common, width // common


def packed_shape(count: int, width: int) -> tuple[int, int]:
    """Shape of the packed form of `count` numbers."""
    numbers, size = group(width)
    return -(-count // numbers), size


def pack_numbers(numbers: npt.NDArray[Any], width: int) -> Numbers:
    """Integers [n] below 2^width as uint8 [groups, bytes]."""
    per_group, size = group(width)
    groups, _ = packed_shape(len(numbers), width)
    padded = np.zeros(groups * per_group, np.uint8)
    padded[: len(numbers)] = numbers
    columns = padded.reshape(groups, per_group)
    if width == 1:
        return np.packbits(columns, axis=1, bitorder="little")
    if width == 8:
        return columns
    words = np.zeros(groups, "<u8")
    for place in range(per_group):
        words |= columns[:, place].astype("<u8") << np.uint64(place * width)
    return np.ascontiguousarray(words.view(np.uint8).reshape(groups, 8)[:, :size])


def unpack_numbers(packed: Numbers, width: int, count: int) -> Numbers:
    """The first `count` numbers, uint8 [count], of a packed form."""
    if width == 1:
        return np.unpackbits(packed.reshape(-1), bitorder="little")[:count]
    if width == 8:
        return packed.reshape(-1)[:count]
    per_group, size = group(width)
    wide = np.zeros((len(packed), 8), np.uint8)
    wide[:, :size] = packed
    words = wide.view("<u8").reshape(-1)
    columns = np.empty((len(packed), per_group), np.uint8)
    for place in range(per_group):
        columns[:, place] = (words >> np.uint64(place * width)) & np.uint64((1 << width) - 1)
    return columns.reshape(-1)[:count]
