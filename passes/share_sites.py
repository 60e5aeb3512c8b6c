"""The weights that can be shared, as rows [groups, outputs, K] of products with vectors, and the moments of these.

    Conv, ConvTranspose, Gemm, MatMul   as in rounding.py; x is the patch, or the row of the input
    LSTM, GRU, RNN   W [dirs, n, I] multiplies the input sequence, R [dirs, n, H] the hidden states, which Y holds
    tables, anything else               rows along the last axis, no x: every weight counts alike

A tensor that several nodes read is one weight: the moments of its readers add up.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.data import Dataset
from onnxcomp.calibration.gram import Gram, pick, rows_of
from onnxcomp.calibration.runner import observe
from onnxcomp.graph import Constant, Model, Node
from onnxcomp.linear import linear
from onnxcomp.pass_options import matches
from onnxcomp.passes.dim_sites import Site
from onnxcomp.passes.dim_transposed import equivalent, representable, turned_back
from onnxcomp.passes.rounding import as_rows, from_rows
from onnxcomp.passes.share_storage import Key, by_key
from onnxcomp.passes.sparse_patterns import held_zeros

__all__ = ["Reader", "Weight", "find_weights", "moments"]

Array = npt.NDArray[Any]
_MIN_ELEMENTS = 256  # below, a codebook takes more room than it saves
_MAX_LENGTH = 4608
_ROWS_PER_ENTRY, _MOST_ROWS = 12, 24000
_RECURRENT = ("LSTM", "GRU", "RNN")
# In the constants of other operators (a window, a table of positions) every single entry may count.
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", *_RECURRENT})


class Layout(Protocol):
    """How a weight is laid out as rows of products."""

    def rows(self, values: Array) -> Array: ...
    def back(self, rows: Array) -> Array: ...


@dataclass(frozen=True)
class _LinearLayout:
    site: Site

    def rows(self, values: Array) -> Array:
        view = self.site.view
        if view.op == "ConvTranspose":
            held = Constant(view.weight.name, values)
            view = equivalent(type(view)(view.node, held, None))
            values = view.weight.values
        return as_rows(view, values)

    def back(self, rows: Array) -> Array:
        native = from_rows(self.site.form, rows)
        return turned_back(self.site.view, native) if self.site.view.op == "ConvTranspose" else native


@dataclass(frozen=True)
class _RowLayout:
    """The last axis is K, the first `groups` are groups, everything between is outputs."""

    shape: tuple[int, ...]
    groups: int = 1

    def rows(self, values: Array) -> Array:
        return values.reshape(self.groups, -1, self.shape[-1])

    def back(self, rows: Array) -> Array:
        return rows.reshape(self.shape)


@dataclass(frozen=True)
class Reader:
    """A node that uses a weight; `source` is the value that the rows are multiplied with, "" if there is none.

    `vectors(x, count, rng)` gives [groups, at most `count`, K] of them.
    """

    node: Node
    layout: Layout
    source: str = ""
    vectors: Callable[[Array, int, np.random.Generator], Array] | None = None
    site: Site | None = None


@dataclass(frozen=True)
class Weight:
    """A weight of the plain form and all nodes that read it. `scope` is the position of its scope."""

    key: Key
    constant: Constant
    readers: tuple[Reader, ...]

    @property
    def name(self) -> str:
        return self.key[1].removesuffix("_plain")

    @property
    def what(self) -> str:
        """What a pass asks leave for."""
        return f"{self.name} shares values"

    @property
    def layout(self) -> Layout:
        return self.readers[0].layout

    @property
    def rows(self) -> Array:
        """float64 [groups, outputs, K]."""
        return self.layout.rows(self.constant.values.astype(np.float64))

    @property
    def free(self) -> Array | None:
        """Where the weight is not zero, in rows, if its zeros were put there on purpose: see `held_zeros`."""
        zeros = held_zeros(self.layout.rows(self.constant.values))
        return None if zeros is None else ~zeros

    @property
    def site(self) -> Site | None:
        """The operator, if the weight has one reader and that is a linear one."""
        return self.readers[0].site if len(self.readers) == 1 else None


def find_weights(model: Model, only: tuple[str, ...] = (), skip: tuple[str, ...] = ()) -> list[Weight]:
    """Finite float weights of all scopes with at least two axes; patterns such as "*/fc*/weight" may choose names."""
    outputs, found = model.outputs(), []
    for key, (_, item) in by_key(model).items():
        large = item.dtype.kind == "f" and len(item.shape) >= 2 and item.weight.size >= _MIN_ELEMENTS
        if not large or item.sparse is not None or item in outputs or not item.outputs:
            continue
        name = key[1].removesuffix("_plain")
        nodes: list[Node] = list(dict.fromkeys(item.outputs))
        if any(node.op not in _WEIGHTED or node.domain for node in nodes):
            continue
        if not np.isfinite(item.values).all():
            continue
        readers = tuple(_reader(model, node, item) for node in nodes)
        names = [name, *(r.node.label for r in readers)]
        if (only and not matches(names, only)) or matches(names, skip):
            continue
        found.append(Weight(key, item, readers))
    return found


def _reader(model: Model, node: Node, item: Constant) -> Reader:
    if not node.inputs or isinstance(node.inputs[0], Constant):
        return Reader(node, _RowLayout(item.shape))
    view = linear(model, node)
    if view is not None and view.weight is item and (view.op != "ConvTranspose" or representable(view)):
        site = Site(view, 0)
        return Reader(node, _LinearLayout(site), node.inputs[0].name, site.patches, site)
    if node.op in _RECURRENT and not node.domain and len(item.shape) == 3:
        return _recurrent(node, item)
    return Reader(node, _RowLayout(item.shape))


def _recurrent(node: Node, item: Constant) -> Reader:
    directions, _, length = item.shape
    if len(node.inputs) > 1 and node.inputs[1] is item:
        def sequence(x: Array, count: int, rng: np.random.Generator) -> Array:
            flat = x.reshape(1, -1, length)
            return flat[:, pick(flat.shape[1], count, rng)]

        return Reader(node, _RowLayout(item.shape), node.inputs[0].name, sequence)

    def states(y: Array, count: int, rng: np.random.Generator) -> Array:
        flat = np.moveaxis(y, -3, 0).reshape(directions, -1, length)
        return flat[:, pick(flat.shape[1], count, rng)]

    has_states = len(node.inputs) > 2 and node.inputs[2] is item and node.outputs and node.outputs[0].name
    plain_order = node.attrs.get("layout", 0) == 0
    if not has_states or not plain_order:
        return Reader(node, _RowLayout(item.shape, directions))
    return Reader(node, _RowLayout(item.shape, directions), node.outputs[0].name, states)


def moments(
    model: Model,
    weights: list[Weight],
    data: Dataset,
    *,
    threads: int,
    memory: int,
    seed: int,
    progress: Callable[[float, str], None],
) -> dict[Key, Gram]:
    """Second moments of what each weight is multiplied with, as far as the memory goes (short vectors first)."""
    found: dict[Key, Gram] = {}
    wanted: dict[str, list[tuple[Weight, Reader]]] = {}
    left = memory
    for weight in sorted(weights, key=lambda w: w.rows.shape[2]):
        groups, _, length = weight.rows.shape
        cost = 8 * groups * length**2
        if length > _MAX_LENGTH or cost > left:
            continue
        left -= cost
        for reader in weight.readers:
            if reader.source and reader.layout.rows(weight.constant.values).shape == (groups, *weight.rows.shape[1:]):
                wanted.setdefault(reader.source, []).append((weight, reader))

    def take(name: str, value: Array, count: int) -> None:
        for weight, reader in wanted[name]:
            assert reader.vectors is not None
            groups, _, length = weight.rows.shape
            rows = rows_of(min(_ROWS_PER_ENTRY * length, _MOST_ROWS), count, data.length)
            state = [seed, zlib.crc32(weight.name.encode()), zlib.crc32(value.reshape(-1)[::97].tobytes())]
            x = reader.vectors(value.astype(np.float32, copy=False), rows, np.random.default_rng(state))
            if np.isfinite(x).all():
                found.setdefault(weight.key, Gram.empty(groups, length)).add(x)

    if wanted:
        observe(model, data, list(wanted), take, threads=threads, memory=memory, progress=progress)
    return found
