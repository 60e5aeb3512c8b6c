"""Many candidates against one original on the same data, while a search lasts: the original runs once.

What a candidate has to stand is what `verify` asks of lossy ones on the data. Unusual inputs come with `verify` itself,
when the search is done.
"""

from __future__ import annotations

from collections.abc import Collection

from onnxcomp.calibration.data import Dataset
from onnxcomp.comparison import Pair, compare
from onnxcomp.errors import ModelError
from onnxcomp.graph import Model
from onnxcomp.quality import Metric
from onnxcomp.reference import Reference
from onnxcomp.runtime import open_session
from onnxcomp.verdict import Evidence, Verification, judge
from onnxcomp.verification import choose

__all__ = ["Trials"]


class Trials:
    """The arguments are those of `verify`."""

    def __init__(
        self,
        original: Reference,
        data: Dataset,
        *,
        max_drop: float,
        metric: Metric | None,
        samples: int,
        exclude: Collection[str],
    ) -> None:
        self._original = original
        self._data = data
        self._max_drop = max_drop
        self._metric = metric
        self._samples = samples
        self._exclude = frozenset(exclude)

    def stands(self, candidate: Model) -> bool:
        """Whether the drop of the candidate's quality is within the budget, and its outputs are in order."""
        try:
            session = open_session(candidate, threads=self._original.threads)
        except ModelError:
            return False
        side, seen = self._original.session(optimize=True), Evidence()
        # What of the original's outputs is random: such outputs do not count.
        first = [batch.feeds for batch in self._data.batches(1)][:1]
        noise = self._original.noise(first, optimize=True, vary=False)
        pair = Pair(side, session, "lossy", noise, self._original.floor, (), self._metric, lambda done: None)
        batches = self._data.batches(None if self._exclude else self._samples)
        compare(seen, pair, choose(batches, self._exclude, self._samples, side))
        blank = Verification("failed", "lossy", self._data.source, 0, 0, None, {}, {}, ())
        found = judge(blank, seen, noise, metric=self._metric, max_drop=self._max_drop, synthetic=False)
        return found.verdict != "failed"
