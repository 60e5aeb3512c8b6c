"""Many candidates against one original on the same data, while a search lasts: the original runs once.

What a candidate has to stand is what `verify` asks of lossy ones on the data. Unusual inputs come with `verify` itself,
when the search is done.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.data import Dataset
from onnxcomp.comparison import Pair, compare
from onnxcomp.errors import ModelError
from onnxcomp.graph import Model
from onnxcomp.noise import Noise, measure_noise, tolerances
from onnxcomp.quality import Metric
from onnxcomp.runtime import Session, open_session
from onnxcomp.verdict import Evidence, Verification, judge
from onnxcomp.verification import choose, read_proto

__all__ = ["Trials"]

Array = npt.NDArray[Any]
_LIMIT = 1 << 28  # bytes of the original's outputs that are kept


class Trials:
    """`original` is whatever sessions open; the other arguments are those of `verify`."""

    def __init__(
        self,
        original: Any,
        data: Dataset,
        *,
        max_drop: float,
        metric: Metric | None,
        samples: int,
        exclude: Collection[str],
        threads: int,
    ) -> None:
        self._original = _Remembered(open_session(original, threads=threads))
        self._data = data
        self._max_drop = max_drop
        self._metric = metric
        self._samples = samples
        self._exclude = frozenset(exclude)
        self._threads = threads
        self._floor = tolerances(read_proto(original, "original"), "cpu")
        self._noise: Noise | None = None

    def stands(self, candidate: Model) -> bool:
        """Whether the drop of the candidate's quality is within the budget, and its outputs are in order."""
        try:
            session = open_session(candidate, threads=self._threads)
        except ModelError:
            return False
        self._original.rewind()
        seen, noise = Evidence(), self._own_noise()
        pair = Pair(self._original, session, "lossy", noise, self._floor, (), self._metric, lambda done: None)
        batches = self._data.batches(None if self._exclude else self._samples)
        compare(seen, pair, choose(batches, self._exclude, self._samples, self._original))
        blank = Verification("failed", "lossy", self._data.source, 0, 0, None, {}, {}, ())
        found = judge(blank, seen, noise, metric=self._metric, max_drop=self._max_drop, synthetic=False)
        return found.verdict != "failed"

    def _own_noise(self) -> Noise:
        """What of the original's outputs is random: such outputs do not count."""
        if self._noise is None:
            feeds = [batch.feeds for batch in self._data.batches(1)][:1]
            self._noise = measure_noise(self._original.session, [], feeds, self._floor)
        return self._noise


class _Remembered(Session):
    """A session that gives the outputs of the first time when it is asked the same again, in the same order."""

    def __init__(self, session: Session) -> None:
        super().__init__(session.native, session.provider, session.threads)
        self.session = session
        self._outputs: list[list[Any]] = []
        self._held = 0
        self._next = 0

    def rewind(self) -> None:
        """The next run is the first one again."""
        self._next = 0

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Any]:
        place, self._next = self._next, self._next + 1
        if place < len(self._outputs):
            return self._outputs[place]
        found = self.session.run(feeds, outputs)
        if place == len(self._outputs) and self._held < _LIMIT:
            self._outputs.append(found)
            self._held += sum(np.asarray(v).nbytes for v in found)
        return found
