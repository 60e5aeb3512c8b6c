"""Run a model piece by piece over the same batches, so that a pass can change weights as it goes along.

What is live between two pieces is kept in memory, so that all pieces together cost one run of the model; where that
would not fit the memory budget, the next piece starts where the last one did.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.data import Dataset
from onnxcomp.graph import Constant, Model, Node, Variable, producer
from onnxcomp.manager import Context
from onnxcomp.passes.dead import remove_dead
from onnxcomp.runtime import Session, open_session

__all__ = ["Replay", "piece"]

Array = npt.NDArray[Any]


class Replay:
    """Over `samples` of `data`; nodes of the main graph keep their order while it is used, weights may change."""

    def __init__(self, model: Model, data: Dataset, *, samples: int | None, threads: int, memory: int) -> None:
        self._model = model
        self._data = data
        self._samples = samples
        self._threads = threads
        self._memory = memory
        self._start = 0
        self._kept: list[dict[str, Array]] | None = None  # None: what is live are the model's inputs
        self.batches = sum(1 for _ in data.batches(samples))

    @property
    def position(self) -> int:
        """The number of the node before which values are kept; values that nobody reads from there on are past."""
        return self._start

    def correct(self, name: str, batches: Sequence[Array]) -> None:
        """Take over a value, for each batch, that changed because weights before `position` did."""
        for kept, value in zip(self._kept or (), batches, strict=False):
            if name in kept:
                kept[name] = value

    def before(self, node: Node, names: Sequence[str]) -> Iterator[Mapping[str, Array]]:
        """The named values (computed before `node`) for each batch, with the weights as they are now."""
        stop = self._model.graph.nodes.index(node)
        given = self._live(self._start)
        live = self._live(stop)
        fresh = [n for n in dict.fromkeys([*names, *live]) if n not in given]
        session = piece(self._model, self._types(), fresh, self._threads) if fresh else None
        kept: list[dict[str, Array]] | None = []
        used = 0
        for feeds in self._feeds():
            found: dict[str, Array] = {}
            if session is not None:
                needed = {spec.name: feeds[spec.name] for spec in session.inputs}
                found = dict(zip(fresh, session.run(needed, fresh), strict=True))
            values = {**feeds, **found}
            if kept is not None:
                kept.append({n: np.asarray(values[n]) for n in live})
                used += sum(v.nbytes for v in kept[-1].values())
                if used * self.batches > self._memory * len(kept):
                    kept = None
            yield values
        if kept is not None:
            self._start, self._kept = stop, kept

    def _types(self) -> dict[str, np.dtype[Any]]:
        """Of the values that are kept."""
        return {} if not self._kept else {name: value.dtype for name, value in self._kept[0].items()}

    def _feeds(self) -> Iterator[Mapping[str, Array]]:
        if self._kept is not None:
            yield from self._kept
        else:
            for batch in self._data.batches(self._samples):
                yield batch.feeds

    def _live(self, position: int) -> list[str]:
        """Values that nodes from `position` on read and earlier nodes (or the caller) gave."""
        nodes = self._model.graph.nodes
        earlier = {t for node in nodes[:position] for t in node.outputs} | set(self._model.graph.inputs)
        read = dict.fromkeys(t for node in nodes[position:] for t in node.reads())
        return [t.name for t in read if t in earlier]


def piece(model: Model, given: Mapping[str, np.dtype[Any]], wanted: Sequence[str], threads: int) -> Session:
    """A session that computes `wanted` values of the main graph from `given` ones (or the inputs), and nothing else.

    `given` has the type of the elements of each.
    """
    copy = model.copy()
    values = {t.name: t for node in copy.graph.nodes for t in node.outputs if t.name}
    values.update({t.name: t for t in copy.graph.inputs})
    copy.graph.outputs = [values[name] for name in wanted]
    for tensor in copy.graph.outputs:
        tensor.info = None
    for name, dtype in given.items():
        source = producer(values[name])
        if source is not None and not isinstance(values[name], Constant):
            source.outputs[source.outputs.index(values[name])] = Variable(copy.fresh(f"{name}_before"))
            # What the model declares is the shape of a sample; more may be given.
            values[name].info, values[name].shape, values[name].dtype = None, None, dtype
            copy.graph.inputs.append(values[name])
    remove_dead(copy, Context())
    used = {t for node in copy.graph.nodes for t in node.reads()}
    copy.graph.inputs = [t for t in copy.graph.inputs if t in used]
    return open_session(copy, threads=threads)
