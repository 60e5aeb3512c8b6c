"""What the removal from one group alone does to the model's outputs, once what lies next behind it is solved anew.

Predicted errors of operators say little about outputs: an error early in a residual stream is corrected by all that
follows, one at the end by nothing. So every group is narrowed alone to a few widths, and every residual branch taken
out; the next operators are repaired on a few samples, and the noise on the outputs is measured on others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxcomp.calibration.data import Dataset
from onnxcomp.calibration.split import limited
from onnxcomp.passes.dim_plan import levels
from onnxcomp.passes.dim_readers import Reader
from onnxcomp.passes.dims import Coupling
from onnxcomp.passes.importance import Curve
from onnxcomp.passes.judge import Judge
from onnxcomp.passes.repair import compensate, resolve
from onnxcomp.passes.surgery import remove

__all__ = ["Sensitivity", "affordable", "longest"]

_PROBES = (0.3, 0.65)  # shares of a group that go when it is measured alone
_ROWS = 8192  # output positions that an operator is fitted on here
_NEAREST = 6  # operators that are repaired; the error of a removed branch falls little beyond (measured on ResNet-20)
_MOST_SAMPLES, _LEAST_SAMPLES = 128, 8
_RUNS = 3  # of the model for a sample of a measurement: the original's and the pruned one's to fit, the latter to judge
_WORK = 6e12  # multiplications for all measurements: some minutes on one core
_SOLVED = 4  # times that an operator's normal equations are solved, about
_LENGTHS = range(256, 8193, 64)
_WORST = 1e6


def affordable(macs: float, groups: int) -> int:
    """Samples per measurement for a model of so many multiplications per sample and so many groups."""
    return int(np.clip(_WORK / (_RUNS * len(_PROBES) * max(groups, 1) * max(macs, 1.0)), _LEAST_SAMPLES, _MOST_SAMPLES))


def longest(groups: int) -> int:
    """Entries of the rows of operators that are repaired here: K of them take R K^2 + S K^3 multiplications."""
    each = _WORK / (len(_PROBES) * max(groups, 1) * _NEAREST)
    return max((k for k in _LENGTHS if _ROWS * k**2 + _SOLVED * k**3 <= each), default=_LENGTHS.start)


@dataclass(frozen=True)
class Sensitivity:
    """Measures curves of groups of `coupling`: fits on up to `samples` of `data`, judges with `judge`."""

    coupling: Coupling
    sites: Sequence[Reader]
    grams: Mapping[Any, Any]
    data: Dataset
    judge: Judge
    samples: int
    longest: int
    threads: int
    memory: int
    seed: int
    repaired: bool

    def measure(
        self, found: Sequence[Curve], grid: int, least: int, progress: Callable[[float, str], None]
    ) -> list[Curve]:
        scaled = []
        for number, curve in enumerate(found):
            progress(number / len(found), f"sensitivity of {curve.group.name}")
            scaled.append(self._measured(curve, levels(curve.group, grid, least)[1:]))
        return scaled

    def _measured(self, curve: Curve, choices: Sequence[int]) -> Curve:
        """The curve scaled, at some widths and in between, to the noise that the removal alone puts on the outputs."""
        if not choices:
            return curve
        counts = sorted({min(choices, key=lambda n: abs(n - share * curve.group.width)) for share in _PROBES})
        factors = [self._noise(curve.order[:count]) / max(float(curve.errors[count]), 1e-12) for count in counts]
        scale = np.interp(np.arange(curve.group.width + 1), counts, factors)
        return replace(curve, errors=np.maximum.accumulate(curve.errors * scale))

    def _noise(self, units: Sequence[int]) -> float:
        """Noise power over signal power."""
        cut = remove(self.coupling, units)
        compensate(cut, self.sites, self.grams)
        if self.repaired:
            few = limited(self.data, self.samples)
            resolve(
                cut, few, samples=None, threads=self.threads, seed=self.seed, memory=self.memory, nearest=_NEAREST,
                longest=self.longest, rows=_ROWS,
            )  # fmt: skip
        return min(10 ** (-self.judge.score(cut.model)[0] / 10), _WORST)
