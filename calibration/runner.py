"""One pass over the calibration data: run the model with activations exposed, and hand them to whoever observes.

Memory does not grow with the number of samples: after each batch the activations are gone. Where the exposed
activations of a batch would not fit the memory budget, the batch is cut, and where it cannot be cut they are fetched
in groups, by several runs over the same batch in the same session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxcomp.calibration.batches import take as cut
from onnxcomp.calibration.data import Batch, Dataset
from onnxcomp.calibration.lift import lift
from onnxcomp.calibration.probes import Probe, attach, find_probes
from onnxcomp.calibration.statistics import TensorStatistics
from onnxcomp.concrete import concrete_types
from onnxcomp.errors import DataError
from onnxcomp.graph import Model
from onnxcomp.runtime import Session, open_session
from onnxcomp.serde import export_model
from onnxcomp.shapes import Shapes

__all__ = ["collect", "expose", "observe", "require_finite"]

Array = npt.NDArray[Any]
Progress = Callable[[float, str], None]
Take = Callable[[str, Array, int], None]
_WORKING_SET = 1 << 27  # bytes of observed values in one run; fresh memory costs more than another run


def expose(
    model: Model,
    names: Iterable[str],
    *,
    threads: int = 1,
    optimize: bool = True,
    probes: Mapping[str, Probe] | None = None,
) -> Session:
    """A session of the model with the named values as outputs as well, and the outputs of `probes`.

    A value inside an If or Loop comes out of it as `lift` says. Raises ModelError if there is no such value.
    """
    proto, payloads = export_model(model)
    present = {o.name for o in proto.graph.output}
    wanted = [name for name in dict.fromkeys(names) if name not in present]
    lift(proto.graph, wanted)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    attach(proto.graph, probes or {})
    return open_session((proto, payloads), threads=threads, optimize=optimize, memory_pattern=False)


def observe(
    model: Model,
    data: Dataset,
    names: Sequence[str],
    take: Take,
    *,
    samples: int | None = None,
    threads: int = 1,
    memory: int = 1 << 30,
    progress: Progress | None = None,
    summaries: Mapping[str, TensorStatistics] | None = None,
    after_batch: Callable[[], None] | None = None,
) -> int:
    """Call `take(name, array, count)` for every named value of every batch, or of each of its parts of `count` samples.

    Returns the number of samples. `after_batch` is called when a batch has been seen whole. `summaries` are
    filled for values of which nobody needs more than extremes and histogram: that is cheaper.

    Raises DataError if the data hold no sample.
    """
    watch: _Watch | None = None
    seen = 0
    total = data.length if samples is None or data.length is None else min(samples, data.length)
    for batch in data.batches(samples):
        if watch is None:
            watch = _Watch(model, data, batch, names, take, summaries or {}, threads, memory)
        watch.see(batch)
        if after_batch is not None:
            after_batch()
        seen += batch.count
        if progress is not None and total:
            progress(min(seen / total, 1.0), "calibrating")
    if not seen:
        raise DataError(f"the calibration data {data.source} hold no sample")
    return seen


class _Watch:
    """The session of one pass, what it fetches, and how much memory each value takes.

    Sizes are bytes per byte of the inputs, so that they hold for batches of other sizes, more or less; they are
    inferred for the first batch and corrected by what is seen.
    """

    def __init__(
        self,
        model: Model,
        data: Dataset,
        batch: Batch,
        names: Sequence[str],
        take: Take,
        summaries: Mapping[str, TensorStatistics],
        threads: int,
        memory: int,
    ) -> None:
        known = {name: np.shape(value) for name, value in batch.feeds.items()}
        shapes = concrete_types(model, known=known)
        inputs = {t.name for t in model.graph.inputs}
        self.summaries = {n: s for n, s in summaries.items() if n not in set(names)}
        summarized = [n for n in self.summaries if n not in inputs]
        everything = [n for n in [*names, *summarized] if n not in inputs]
        self.density = _densities(model, shapes, everything, _bytes(batch))
        self.memory = memory
        self.divisible = data.divisible and not any(t.shape and isinstance(t.shape[0], int) for t in model.graph.inputs)
        rows = self._rows(batch)
        self.probes = find_probes(model, summarized, shapes, rows / batch.count)
        self.take = take
        self.given = [n for n in [*names, *self.summaries] if n in inputs]
        self.fetched = [n for n in dict.fromkeys([*names, *self.summaries]) if n not in inputs | self.probes.keys()]
        self.session = expose(model, self.fetched, threads=threads, probes=self.probes)
        self._learn(batch)

    def _learn(self, batch: Batch) -> None:
        """Sizes that could not be inferred, from one run of one sample: in groups of one, each would cost a run."""
        unknown = [name for name in self.fetched if name not in self.density]
        if len(unknown) > 1 and self.divisible and batch.count > 1:
            one = cut(batch, 0, 1)
            for name, value in zip(unknown, self.session.run(one.feeds, unknown), strict=True):
                self.density[name] = getattr(value, "nbytes", 0) / _bytes(one)

    def see(self, batch: Batch) -> None:
        """Run the model on a batch, in parts if need be, and pass on what comes out."""
        for part in self._parts(batch):
            for name in self.given:
                self._pass_on(name, np.asarray(part.feeds[name]), part)
            asked = [n for probe in self.probes.values() for n in probe.outputs]
            for number, group in enumerate(self._groups(part)):
                outputs = [*group, *asked] if number == 0 else group
                values = iter(self.session.run(part.feeds, outputs) if outputs else ())
                for name in group:
                    self._pass_on(name, next(values), part, computed=True)
                for probe in self.probes.values() if number == 0 else ():
                    probe.read([next(values) for _ in probe.outputs], self.summaries[probe.name])

    def _pass_on(self, name: str, value: Any, part: Batch, *, computed: bool = False) -> None:
        if not isinstance(value, np.ndarray):
            return
        if computed:
            self.density[name] = max(self.density.get(name, 0.0), value.nbytes / _bytes(part))
        if name not in self.summaries:
            self.take(name, value, part.count)
        elif value.dtype.kind == "f":
            self.summaries[name].add(value)

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        rows = self._rows(batch)
        for start in range(0, batch.count, rows):
            yield cut(batch, start, min(start + rows, batch.count))

    def _rows(self, batch: Batch) -> int:
        """Samples per run: where batches can be cut, as many as keep all observed values in the working set."""
        needed = sum(self.density.values()) * _bytes(batch)
        limit = min(self.memory, _WORKING_SET)
        if not self.divisible or needed <= limit:
            return batch.count
        return max(1, int(batch.count * limit / needed))

    def _groups(self, batch: Batch) -> list[list[str]]:
        """Names in groups whose values fit the memory budget; one of unknown size is alone. At least one group."""
        groups: list[list[str]] = [[]]
        room, scale = self.memory, _bytes(batch)
        for name in self.fetched:
            size = int(self.density[name] * scale) if name in self.density else self.memory
            if groups[-1] and size > room:
                groups.append([])
                room = self.memory
            groups[-1].append(name)
            room -= size
        return groups


def collect(
    model: Model,
    data: Dataset,
    requests: Mapping[str, int | None],
    *,
    samples: int | None = None,
    threads: int = 1,
    memory: int = 1 << 30,
    histogram: bool = True,
    progress: Progress | None = None,
) -> dict[str, TensorStatistics]:
    """Statistics of named values. A request's value is the channel axis to keep sums for, or None.

    Raises DataError where an activation is not finite: no range can be chosen then.
    """
    found = {name: TensorStatistics() for name in requests}
    whole = [name for name, axis in requests.items() if axis is not None or not histogram]

    def take(name: str, value: Array, count: int) -> None:
        if value.dtype.kind == "f":
            found[name].add(value, requests[name], histogram=histogram)

    summaries = {name: s for name, s in found.items() if name not in set(whole)}
    observe(
        model, data, whole, take,
        samples=samples, threads=threads, memory=memory, progress=progress, summaries=summaries,
    )  # fmt: skip
    require_finite(found, data)
    return found


def require_finite(found: Mapping[str, TensorStatistics], data: Dataset) -> None:
    """Raise DataError where an activation was not finite: no range can be chosen then."""
    for name, statistics in found.items():
        if statistics.count and not (np.isfinite(statistics.minimum) and np.isfinite(statistics.maximum)):
            raise DataError(
                f"the activation {name!r} is not finite on the calibration data {data.source} "
                f"({statistics.minimum} to {statistics.maximum}); check the preprocessing"
            )


def _densities(model: Model, shapes: Shapes, names: Iterable[str], feed_bytes: int) -> dict[str, float]:
    """Bytes of each value per byte of the inputs, as far as they can be inferred."""
    wanted = set(names)
    found = {}
    for node in model.graph.nodes:
        for tensor in node.outputs:
            kind = shapes[tensor]
            if tensor.name in wanted and kind.size is not None and kind.dtype is not None:
                found[tensor.name] = kind.size * kind.dtype.itemsize / feed_bytes
    return found


def _bytes(batch: Batch) -> int:
    return max(1, sum(np.asarray(v).nbytes for v in batch.feeds.values()))
