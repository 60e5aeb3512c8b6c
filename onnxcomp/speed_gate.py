"""Whether a candidate is progress over the model before it: timed side by side, with the original along."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from onnxcomp.bench import Benchmark, ModelTiming, benchmark
from onnxcomp.graph import Model
from onnxcomp.options import Options
from onnxcomp.samples import Samples
from onnxcomp.tried import Tried

__all__ = ["LEAST_GAIN", "SpeedGate"]

LEAST_GAIN = 1.03  # times as fast as float that 8-bit arithmetic has to be, if the choice is ours


class SpeedGate:
    """Times models of one job; `original` is what every measurement is relative to. `tried` holds all of them."""

    def __init__(
        self, original: Any, samples: Samples, options: Options, progress: Callable[[float, str], None]
    ) -> None:
        self._original = original
        self._samples = samples
        self._options = options
        self._progress = progress
        self.tried = Tried()

    def no_progress(
        self,
        names: tuple[str, str],
        old: Model,
        new: Model,
        *,
        least: float = 0.0,
        smaller: bool = True,
        drop: float | None = None,
    ) -> tuple[str | None, Benchmark | None]:
        """Why `new` is no progress over `old`, and the original timed against the winner.

        It is none if it is slower, less than `least` times as fast, or (if it is to be `smaller`) larger and no faster;
        then the reason says so, else it is None. Without time for a benchmark everything is progress. `names` are what
        the report calls the two, `drop` is the quality that the new one loses.
        """
        if self._options.bench_seconds <= 0:
            return None, None
        found = self.time([self._original, old, new])
        original, before, after = found.models
        self.tried.add(names[0], before)
        self.tried.add(names[1], after, drop)
        ratio = (after.speedup or 1.0) / (before.speedup or 1.0)
        # The same kernels do the same work: what differs then is the machine's mood.
        slower = ratio < 1 / (1 + max(found.noise_floor, 0.01)) and _kernels(before) != _kernels(after)
        reason = None
        if slower or ratio < least:
            asked = f", less than the {least:g}x that it takes," if ratio >= 1 else ","
            reason = f"it runs at {ratio:.2f}x the speed of the model before{asked} on this machine"
        elif smaller and ratio < LEAST_GAIN and after.file_bytes >= before.file_bytes:
            reason = f"its file has {after.file_bytes:,} bytes, {before.file_bytes:,} before, and it is no faster"
        return reason, replace(found, models=(original, after if reason is None else before))

    def time(self, models: list[Any]) -> Benchmark:
        self._progress(0.0, "timing")
        return benchmark(
            models,
            feeds=self._samples.feeds,
            provider=self._options.target,
            threads=self._options.threads,
            seconds=self._options.bench_seconds,
            seed=self._options.seed,
            progress=self._progress,
        )


def _kernels(timed: ModelTiming) -> dict[tuple[str, str], float]:
    return {(k.provider, k.op): k.count for k in timed.kernels}
