"""Layer by layer: where an error comes from, and where it only passes through.

Values of the candidate are matched with values of the original (provenance.py). Each matched value is compared twice:
as the whole candidate computes it (total error), and as the nodes since the last matched values compute it from the
original's values (local error: what this layer adds). Both are noise power / signal power.

Values are fetched in groups that fit a memory budget; nothing is kept but sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.data import Batch, Dataset
from onnxcomp.calibration.runner import expose
from onnxcomp.concrete import concrete_types
from onnxcomp.errors import ModelError
from onnxcomp.extract import extract
from onnxcomp.graph import Model, Node, producer
from onnxcomp.metrics import ErrorStats, measure
from onnxcomp.provenance import Origin, origins
from onnxcomp.runtime import Session, open_session
from onnxcomp.shapes import Shapes, infer

__all__ = ["Layer", "compare_layers"]

Array = npt.NDArray[Any]
Progress = Callable[[float, str], None]
_COPIES = 4  # of a value at once: the original's, what it should be here, the candidate's, the local one


@dataclass(frozen=True)
class Layer:
    """A value of the candidate, what computes it, and its errors. `relation` says how it stands for the original's:
    same, quantized, sliced or scaled.
    """

    value: str
    original: str
    node: str
    op: str
    relation: str
    local: ErrorStats
    total: ErrorStats

    @property
    def amplification(self) -> float | None:
        """Total over local noise: large where the error came from before; None where there is no local noise."""
        local = self.local.noise_ratio
        return self.total.noise_ratio / local if 0 < local < math.inf else None

    def to_json(self) -> dict[str, Any]:
        def plain(value: float | None) -> float | None:
            return value if value is not None and math.isfinite(value) else None

        return {
            "value": self.value, "original": self.original, "node": self.node, "op": self.op,
            "relation": self.relation, "local_noise": plain(_noise(self.local)),
            "local_sqnr_db": plain(self.local.sqnr_db), "total_noise": plain(_noise(self.total)),
            "total_sqnr_db": plain(self.total.sqnr_db), "max_abs": plain(self.total.max_abs),
            "amplification": plain(self.amplification),
        }  # fmt: skip


def compare_layers(
    original: Model,
    candidate: Model,
    data: Dataset,
    *,
    samples: int = 32,
    threads: int = 1,
    memory: int = 1 << 29,
    progress: Progress | None = None,
) -> tuple[Layer, ...]:
    """All layers, the largest local error first, on the first `samples` samples of `data`.

    Both models run as they are written, without ONNX Runtime's optimizations where that is possible: watching a value
    would undo fusions anyway. `memory` bounds the bytes of the values that are held at once.
    """
    matched = _matched(original, candidate)
    rows = _rows(candidate, matched)
    first = next(iter(data.batches(samples)))
    found: list[Layer] = []
    for group in _groups(original, matched, rows, first, memory):
        if progress is not None:
            progress(len(found) / len(rows), "comparing layer by layer")
        try:
            found += _compared(_Probe(original, candidate, matched, group, threads), data.batches(samples))
        except ModelError:  # values that cannot be outputs: one of them at a time
            for row in group if len(group) > 1 else ():
                try:
                    found += _compared(_Probe(original, candidate, matched, [row], threads), data.batches(samples))
                except ModelError:
                    continue
    return tuple(sorted(found, key=lambda row: (-_noise(row.local), -_noise(row.total))))


# --- which value stands for which ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Match:
    origin: Origin
    relation: str
    dtype: np.dtype[Any]
    rank: int


def _matched(original: Model, candidate: Model) -> dict[str, _Match]:
    """Values of the candidate's main graph that stand for one of the original, in order of computation."""
    types, there = infer(original), {}
    for tensor in [*original.graph.inputs, *(t for n in original.graph.nodes for t in n.outputs if t.name)]:
        kind = types[tensor]
        if kind.dtype is not None and kind.dtype.kind == "f" and kind.rank is not None:
            there[tensor.name] = (kind.dtype, kind.rank)
    noted = origins(candidate)
    found: dict[str, _Match] = {}
    values = [*candidate.graph.inputs, *(t for n in candidate.graph.nodes for t in n.outputs if t.name)]
    for tensor in values:
        quantized = _quantized(tensor)
        source = tensor if quantized is None or tensor.name in there else quantized
        before = found.get(source.name) if source is not tensor else None
        origin = noted.get(tensor.name, before.origin if before is not None else Origin(source.name))
        if origin.name in there:
            relation = "scaled" if origin.scale is not None else "sliced" if origin.keep else "same"
            relation = "quantized" if quantized is not None else relation
            found[tensor.name] = _Match(origin, relation, *there[origin.name])
    return found


def _quantized(tensor: Any) -> Any | None:
    """The value that a DequantizeLinear behind a QuantizeLinear gives back."""
    back = producer(tensor)
    there = producer(back.inputs[0]) if back is not None and back.kind == "DequantizeLinear" else None
    return there.inputs[0] if there is not None and there.kind == "QuantizeLinear" else None


@dataclass(frozen=True)
class _Row:
    value: str
    node: Node


def _rows(candidate: Model, matched: Mapping[str, _Match]) -> list[_Row]:
    """For each value of the original the last of the candidate that stands for it."""
    last: dict[str, _Row] = {}
    for node in candidate.graph.nodes:
        for tensor in node.outputs:
            if tensor.name in matched:
                origin = matched[tensor.name].origin.name
                last.pop(origin, None)
                last[origin] = _Row(tensor.name, node)
    return list(last.values())


def _groups(
    original: Model, matched: Mapping[str, _Match], rows: Sequence[_Row], batch: Batch, memory: int
) -> Iterator[list[_Row]]:
    """Rows in order, as many at a time as fit the memory; a value of unknown size is alone."""
    shapes: Shapes = concrete_types(original, known={n: np.shape(v) for n, v in batch.feeds.items()})
    sizes = {t.name: shapes[t].size for n in original.graph.nodes for t in n.outputs}
    group: list[_Row] = []
    room = memory
    for row in rows:
        match = matched[row.value]
        count = sizes.get(match.origin.name)
        size = memory if count is None else _COPIES * count * match.dtype.itemsize
        if group and size > room:
            yield group
            group, room = [], memory
        group.append(row)
        room -= size
    if group:
        yield group


# --- running ------------------------------------------------------------------------------------------------------


@dataclass
class _Probe:
    """The three sessions of a group of rows, and the sums."""

    original: Model
    candidate: Model
    matched: Mapping[str, _Match]
    rows: Sequence[_Row]
    threads: int
    local: dict[str, ErrorStats] = field(default_factory=dict)
    total: dict[str, ErrorStats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [row.value for row in self.rows]
        given = {n: (m.dtype, [None] * m.rank) for n, m in self.matched.items()}
        part, self.outputs = extract(self.candidate, given, names)
        self.inputs = [t.name for t in part.graph.inputs if t.name in self.matched]
        self.others = [t.name for t in part.graph.inputs if t.name not in self.matched]
        wanted = dict.fromkeys(self.matched[n].origin.name for n in [*self.inputs, *names])
        entering = {t.name for t in self.original.graph.inputs}
        self.wanted = [n for n in wanted if n not in entering]
        self.part = _open(lambda optimize: open_session(part, threads=self.threads, optimize=optimize))
        self.before = _open(lambda o: expose(self.original, self.wanted, threads=self.threads, optimize=o))
        self.after = _open(lambda o: expose(self.candidate, names, threads=self.threads, optimize=o))

    def see(self, batch: Batch) -> None:
        feeds = batch.feeds
        values = self.before.run(feeds, self.wanted) if self.wanted else []
        known = {**{n: np.asarray(v) for n, v in feeds.items()}, **dict(zip(self.wanted, values, strict=True))}
        given = {n: self.expected(n, known) for n in self.inputs}
        alone = self.part.run({**given, **{n: feeds[n] for n in self.others}}, self.outputs)
        whole = self.after.run(feeds, [row.value for row in self.rows])
        for row, one, all_ in zip(self.rows, alone, whole, strict=True):
            reference = self.expected(row.value, known)
            for sums, value in ((self.local, one), (self.total, all_)):
                if value.shape == reference.shape:
                    stats = measure("values", reference, value, count=batch.count).errors
                    sums[row.value] = sums[row.value] + stats if row.value in sums else stats

    def expected(self, name: str, known: Mapping[str, Array]) -> Array:
        """What the candidate's value should be, from the original's."""
        match = self.matched[name]
        try:
            return match.origin.apply(known[match.origin.name])
        except (IndexError, ValueError) as error:
            raise ModelError(f"the provenance of {name!r} does not fit {match.origin.name!r}: {error}") from error


def _open(opener: Callable[[bool], Session]) -> Session:
    try:
        return opener(False)
    except ModelError:
        return opener(True)  # some operators run only after the optimizer has inserted casts


def _compared(probe: _Probe, batches: Iterator[Batch]) -> Iterator[Layer]:
    for batch in batches:
        try:
            probe.see(batch)
        except ModelError:
            raise
        except Exception as error:  # ONNX Runtime's exception types share no base class
            raise ModelError(f"the layers cannot be compared: {' '.join(str(error).split())[:300]}") from error
    for row in probe.rows:
        match = probe.matched[row.value]
        if row.value in probe.local and row.value in probe.total:
            sums = (probe.local[row.value], probe.total[row.value])
            node = _operator(row)
            yield Layer(row.value, match.origin.name, node.label, node.kind, match.relation, *sums)


def _operator(row: _Row) -> Node:
    """The node that computes the value; behind Q and DQ the one in front of them."""
    quantized = _quantized(row.node.outputs[0])
    before = producer(quantized) if quantized is not None else None
    return before or row.node


def _noise(errors: ErrorStats) -> float:
    return math.inf if errors.new_nan or errors.new_inf else errors.noise_ratio
