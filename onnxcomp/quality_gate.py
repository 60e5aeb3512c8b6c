"""Which models of a job do the work of the original."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnxcomp import io
from onnxcomp.graph import Model
from onnxcomp.options import Options
from onnxcomp.quality import Metric
from onnxcomp.reference import Reference
from onnxcomp.samples import Samples
from onnxcomp.verdict import Effect, Verification
from onnxcomp.verification import verify

__all__ = ["QualityGate"]

_QUICK = 16  # samples of the check after a lossless pass
_ALL = 2048  # samples of the check after a lossy pass, and of the last one
_KEEP = 1 << 27  # bytes of the original's outputs that are remembered from check to check
_SMALL = 1 << 28  # bytes of an original that stays open from check to check


class QualityGate:
    """Verifies models of one job; `original` is its path, or its bytes. `metric` counts for lossy effects."""

    def __init__(
        self,
        original: Any,
        samples: Samples,
        options: Options,
        metric: Metric | None,
        progress: Callable[[float, str], None],
    ) -> None:
        self._original = original
        self._samples = samples
        self._options = options
        self._metric = metric
        self._progress = progress

    def verify(self, model: Model, effect: Effect, *, original: Any = None, quick: bool = False) -> Verification:
        """The verdict on a model against `original`, the job's own if it is not given; `quick` on few samples."""
        samples = _QUICK if quick else _ALL
        return self._verify(model, effect, original=original, samples=samples, progress=self._progress)

    def stands(self, model: Model) -> bool:
        """What a search asks about its candidates: unusual inputs come when it is done."""
        return self._verify(model, "lossy", original=self._remembered, samples=_ALL, edges=False).verdict != "failed"

    def _verify(self, model: Model, effect: Effect, *, original: Any, samples: int, **more: Any) -> Verification:
        if original is None:
            original = self._remembered if self._small else self._original
        return verify(
            original,
            model,
            self._samples.verification,
            effect=effect,
            max_drop=self._options.max_drop,
            metric=self._metric if effect == "lossy" else None,
            samples=samples,
            exclude=self._samples.calibration_hashes,
            threads=self._options.threads,
            seed=self._options.seed,
            **more,
        )

    @functools.cached_property
    def _small(self) -> bool:
        """Whether the original may stay in memory from check to check."""
        path = self._original if isinstance(self._original, Path) else None
        return (len(self._original) if path is None else io.model_bytes(path)) < _SMALL

    @functools.cached_property
    def _remembered(self) -> Reference:
        return Reference(self._original, threads=self._options.threads, keep=_KEEP)
