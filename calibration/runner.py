"""One pass over the calibration data: run the model with activations exposed, and hand them to whoever observes.

Memory does not grow with the number of samples: after each batch the activations are gone. Where the exposed
activations of a batch would not fit the memory budget, they are fetched in groups, by several runs over the same batch
in the same session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxcomp.calibration.data import Dataset
from onnxcomp.calibration.statistics import TensorStatistics
from onnxcomp.errors import DataError
from onnxcomp.graph import Model
from onnxcomp.runtime import Session, open_session
from onnxcomp.serde import export_model, inline

__all__ = ["collect", "expose", "observe", "require_finite"]

Array = npt.NDArray[Any]
Progress = Callable[[float, str], None]


def expose(model: Model, names: Iterable[str], *, threads: int = 1, optimize: bool = True) -> Session:
    """A session of the model with the named values of its main graph as outputs as well."""
    proto, payloads = export_model(model)
    inline(proto, payloads)
    present = {o.name for o in proto.graph.output}
    for name in names:
        if name not in present:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
            present.add(name)
    return open_session(proto, threads=threads, optimize=optimize)


def observe(
    model: Model,
    data: Dataset,
    names: Sequence[str],
    take: Callable[[str, Array], None],
    *,
    samples: int | None = None,
    threads: int = 1,
    memory: int = 1 << 30,
    progress: Progress | None = None,
) -> int:
    """Call `take(name, array)` for every named value of every batch. Returns the number of samples.

    Raises DataError if the data hold no sample.
    """
    session = expose(model, names, threads=threads)
    inputs = {i.name for i in session.inputs}
    fetched = [n for n in names if n not in inputs]
    groups: list[list[str]] = [fetched]
    sized = False
    seen = 0
    total = data.length if samples is None or data.length is None else min(samples, data.length)
    for batch in data.batches(samples):
        if not sized:
            groups, sized = _groups(session, batch.feeds, fetched, memory), True
        for name in names:
            if name in inputs:
                take(name, batch.feeds[name])
        for group in groups:
            for name, value in zip(group, session.run(batch.feeds, group), strict=True) if group else ():
                take(name, value)
        seen += batch.count
        if progress is not None and total:
            progress(min(seen / total, 1.0), "calibrating")
    if not seen:
        raise DataError(f"the calibration data {data.source} hold no sample")
    return seen


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

    def take(name: str, value: Array) -> None:
        if value.dtype.kind == "f":
            found[name].add(value, requests[name], histogram=histogram)

    observe(model, data, list(requests), take, samples=samples, threads=threads, memory=memory, progress=progress)
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


def _groups(session: Session, feeds: Mapping[str, Array], names: list[str], memory: int) -> list[list[str]]:
    """Names in groups whose values for one batch fit the memory budget, measured by one run."""
    groups: list[list[str]] = []
    room = 0
    for name, value in zip(names, session.run(feeds, names), strict=True) if names else ():
        if not groups or value.nbytes > room:
            groups.append([])
            room = memory
        groups[-1].append(name)
        room -= value.nbytes
    return groups
