"""The decoders: model-local functions of standard operators that ONNX Runtime folds when it loads a model.

One function per form (see codec.py). Inputs, as far as the form has them: the bits of the position code, the low parts
of the gaps, the unary parts of ranks, the codes, the table. Attributes: `shape` of the tensor, `count` of the values
that are stored, `groups` [outer, groups, inner], the view of the tensor in which each group has a row of the table.

Only operators of opset 12 are used (so there is no BitwiseAnd), and no operator whose output shape depends on data,
such as NonZero: ONNX Runtime does not fold what it cannot infer. All intermediate numbers are uint8 or int32; values
pass through Gather only, which copies them bit for bit whatever their type.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from onnxcomp.passes.codec import Form
from onnxcomp.passes.codec_bits import group
from onnxcomp.storage import DOMAIN, OPSET

__all__ = ["decoder", "form_of"]

# Names of values: short, as every file carries them, and none of those of inputs and outputs.
_LETTERS = [letter for letter in string.ascii_letters if letter not in "bcirtuy"]


@functools.cache
def _decoder(form: Form) -> onnx.FunctionProto:
    body = _Body()
    if form.rows:
        body.rows(form.width or 8)
    else:
        body.result(form, _indices(body, form))
    return helper.make_function(
        DOMAIN, form.name, list(form.inputs), ["y"], body.nodes, [helper.make_opsetid("", OPSET)], list(form.attributes)
    )


def decoder(form: Form, opset: int) -> onnx.FunctionProto:
    """The function that decodes a form, importing the standard operators in version `opset`, at least `OPSET`."""
    function = onnx.FunctionProto()
    function.CopyFrom(_decoder(form))
    function.opset_import[0].version = opset
    return function


def form_of(function: onnx.FunctionProto) -> Form | None:
    """The form that a function decodes; None if it is not exactly one of these functions."""
    form = Form.parse(function.name)
    imports = [o for o in function.opset_import if o.domain in ("", "ai.onnx")]
    if form is None or function.domain != DOMAIN or len(imports) != 1 or imports[0].version < OPSET:
        return None
    ours = decoder(form, imports[0].version)
    parts = ("input", "output", "attribute", "node")
    return form if all(list(getattr(ours, p)) == list(getattr(function, p)) for p in parts) else None


class _Body:
    """Nodes of a function under construction; each value has the next free letter as its name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.known: dict[Any, str] = {}

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = _LETTERS[len(self.nodes)] if len(self.nodes) < len(_LETTERS) else f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def ints(self, *values: int) -> str:
        """int64 [n]."""
        key = ("ints", values)
        if key not in self.known:
            self.known[key] = self.op("Constant", value_ints=list(values))
        return self.known[key]

    def array(self, values: Sequence[int], dtype: npt.DTypeLike) -> str:
        key = (np.dtype(dtype), tuple(values))
        if key not in self.known:
            self.known[key] = self.op("Constant", value=numpy_helper.from_array(np.asarray(values, dtype)))
        return self.known[key]

    def attribute(self, name: str) -> str:
        """An attribute of the call as int64 [n]."""
        if name not in self.known:
            self.known[name] = self.op("Constant")
            reference = self.nodes[-1].attribute.add()
            reference.name, reference.ref_attr_name, reference.type = "value_ints", name, AttributeProto.INTS
        return self.known[name]

    @property
    def size(self) -> str:
        """Number of elements of the tensor, int64 [1]."""
        if "size" not in self.known:
            self.known["size"] = self.op("ReduceProd", self.attribute("shape"))
        return self.known["size"]

    def int32(self, value: str) -> str:
        return self.op("Cast", value, to=TensorProto.INT32)

    def cumulated(self, value: str) -> str:
        return self.op("CumSum", value, self.ints(0))

    def scattered(self, places: str, values: str, size: str) -> str:
        """int32 [size]: `values` at `places`, 0 elsewhere."""
        empty = self.op("Expand", self.array([0], np.int32), size)
        return self.op("ScatterElements", empty, places, values)

    def numbers(self, packed: str, width: int, count: str | None, shape: str | None = None) -> str:
        """int32 [count], or with what fills the last group, of numbers packed as in codec_bits.py; or of a shape."""
        per_group, size = group(width)
        if width == 8:
            parts = packed
        elif size == 1:
            lefts = [8 - width - width * k for k in range(per_group)]
            parts = self.cut(packed, lefts, 8 - width)
        else:
            parts = self.crossing(packed, width)
        flat = self.op("Reshape", parts, self.ints(-1))
        if count is not None:
            flat = self.op("Slice", flat, self.ints(0), count)
        if shape is not None:  # here, where a number takes one byte
            flat = self.op("Reshape", flat, shape)
        return flat if size > 1 else self.int32(flat)

    def cut(self, value: str, left: Sequence[int], right: int) -> str:
        """Shift out what lies above the wanted bits of a byte, then what lies below."""
        shifted = self.op("BitShift", value, self.array(left, np.uint8), direction="LEFT")
        return self.op("BitShift", shifted, self.array([right], np.uint8), direction="RIGHT")

    def crossing(self, packed: str, width: int) -> str:
        """int32 [groups, numbers] where numbers lie in two bytes: the low bits of each plus its high bits."""
        per_group, size = group(width)
        starts = [width * k for k in range(per_group)]
        first = [s // 8 for s in starts]
        inside = [min(8 - s % 8, width) for s in starts]  # bits in the first byte
        low = self.op("Gather", packed, self.ints(*first), axis=-1)
        up = [8 - s % 8 - n for s, n in zip(starts, inside, strict=True)]
        low = self.op("BitShift", low, self.array(up, np.uint8), direction="LEFT")
        low = self.op("BitShift", low, self.array([8 - n for n in inside], np.uint8), direction="RIGHT")
        high = self.op("Gather", packed, self.ints(*(min(f + 1, size - 1) for f in first)), axis=-1)
        rest = [8 - width + n if n < width else 0 for n in inside]
        shifts = self.array(rest, np.uint8)
        high = self.op("BitShift", high, shifts, direction="LEFT")
        high = self.op("BitShift", high, shifts, direction="RIGHT")
        factors = self.array([1 << n if n < width else 0 for n in inside], np.int32)
        return self.op("Add", self.int32(low), self.op("Mul", self.int32(high), factors))

    def rows(self, width: int) -> None:
        """The values of the rows at some indices; their codes are uint8 [rows, groups, bytes]."""
        index = self.numbers(self.op("Gather", "c", "i"), width, None)
        columns = self.op("Slice", self.op("Shape", "c"), self.ints(1), self.ints(2))
        columns = self.op("Mul", columns, self.ints(group(width)[0]))
        shape = self.op("Concat", self.op("Shape", "i"), columns, axis=0)
        self.nodes.append(helper.make_node("Gather", ["t", self.op("Reshape", index, shape)], ["y"]))

    def result(self, form: Form, index: str) -> None:
        """The values of the table at an index, in the shape of the tensor."""
        if form.positions is not None and not form.grouped:  # values take no more room than indices, mostly
            values = self.op("Gather", "t", index)
            self.nodes.append(helper.make_node("Reshape", [values, self.attribute("shape")], ["y"]))
            return
        table = "t"
        if form.grouped:
            columns = self.op("Slice", self.op("Shape", "t"), self.ints(1), self.ints(2))
            rows = self.op("Slice", self.op("Shape", "t"), self.ints(0), self.ints(1))
            width = self.op("Expand", self.int32(columns), rows)
            starts = self.op("CumSum", width, self.ints(0), exclusive=1)
            starts = self.op("Reshape", starts, self.ints(-1, 1))
            index = self.op("Add", index, starts)
            table = self.op("Reshape", "t", self.ints(-1))
            index = self.op("Reshape", index, self.attribute("shape"))
        self.nodes.append(helper.make_node("Gather", [table, index], ["y"]))


def _indices(body: _Body, form: Form) -> str:
    """For each element its place in the table, or in its row of it.

    int32 of the shape of the tensor if the form is dense, of the view of the groups if it is grouped, else flat.
    """
    view = body.attribute("groups" if form.grouped else "shape")
    if form.positions is None:
        if form.ranks is not None:
            return body.op("Reshape", _ranks(body, form.ranks, body.size), view)
        if form.width == 0:
            return body.op("Expand", body.array([0], np.int32), view)
        return body.numbers("c", form.width or 0, body.size, view)
    index = _sparse_indices(body, form, form.positions)
    return body.op("Reshape", index, view) if form.grouped else index


def _sparse_indices(body: _Body, form: Form, low: int) -> str:
    """int32 [size]: 0 for zeros, for other elements one more than their code, or than the number of those before."""
    one = body.array([1], np.int32)
    if low == 0:
        mask = body.numbers("b", 1, body.size)
        if form.width == 0:
            return mask
        rank = body.op("Mul", body.cumulated(mask), mask)
        if not form.coded:
            return rank
        if form.ranks is not None:
            numbers = _ranks(body, form.ranks, body.attribute("count"))
        else:
            numbers = body.numbers("c", form.low, None)
        codes = body.op("Add", numbers, one)
        return body.op("Gather", body.op("Concat", body.array([0], np.int32), codes, axis=0), rank)
    count = body.attribute("count")
    places = _rice_positions(body, low, count)
    if form.ranks is not None:
        codes = body.op("Add", _ranks(body, form.ranks, count), one)
    elif form.width is None:
        codes = body.cumulated(body.op("Expand", one, count))
    elif form.width == 0:
        codes = body.op("Expand", one, count)
    else:
        codes = body.op("Add", body.numbers("c", form.width, count), one)
    return body.scattered(places, codes, body.size)


def _rice_positions(body: _Body, low: int, count: str) -> str:
    """int32 [count]: places of the values that are not zero, from their Rice-coded gaps (see codec.py)."""
    one = body.array([1], np.int32)
    quotients = _zeros_before(body, "b", count)
    rests = body.cumulated(body.op("Add", body.numbers("r", low, count), one))
    high = body.op("Mul", quotients, body.array([1 << low], np.int32))
    return body.op("Sub", body.op("Add", high, rests), one)


def _zeros_before(body: _Body, stream: str, count: str) -> str:
    """int32 [count]: zeros before the i-th one of the bits, which is the sum of the quotients up to the i-th."""
    one = body.array([1], np.int32)
    bits = body.numbers(stream, 1, None)
    slots = body.op("Mul", body.cumulated(bits), bits)
    zeros = body.cumulated(body.op("Sub", one, bits))
    end = body.op("Add", count, body.ints(1))
    return body.op("Slice", body.scattered(slots, zeros, end), body.ints(1), end)


def _ranks(body: _Body, low: int, count: str) -> str:
    """int32 [count]: Rice-coded ranks."""
    sums = _zeros_before(body, "u", count)
    before = body.op("Slice", sums, body.ints(0), body.ints(-1))
    quotients = body.op("Sub", sums, body.op("Concat", body.array([0], np.int32), before, axis=0))
    if not low:
        return quotients
    high = body.op("Mul", quotients, body.array([1 << low], np.int32))
    return body.op("Add", high, body.numbers("c", low, count))
