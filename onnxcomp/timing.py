"""Statistics of timing comparisons: pure functions on arrays of measurements.

A comparison is made of pairs: the baseline and a rival timed side by side on the same inputs. A pair's log
ratio log(t_baseline / t_rival) is positive where the rival is faster. Pairs come in rounds, one process each,
because memory layout and thread placement differ between processes and not between pairs of one process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "FASTER", "SAME", "SLOWER", "PairedRatio", "latency_quantiles", "median_half_width", "paired_ratio",
    "student_quantile", "verdict",
]  # fmt: skip

Floats = npt.NDArray[np.float64]

FASTER, SLOWER, SAME = "faster", "slower", "no measurable difference"
SMALLEST_EFFECT = math.log(1.01)  # a smaller speed-up is of no use to anybody and hard to reproduce
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_Z95 = 1.959964  # two-sided 95 % point of the normal distribution
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # the same by degrees of freedom, from 1


@dataclass(frozen=True)
class PairedRatio:
    """Median log ratio of paired times with its 95 % interval, from `pairs` pairs in `rounds` processes."""

    log: float
    low: float
    high: float
    pairs: int
    rounds: int

    @property
    def speedup(self) -> float:
        return math.exp(self.log)

    @property
    def ci(self) -> tuple[float, float]:
        """The 95 % interval of the speed-up."""
        return math.exp(self.low), math.exp(self.high)

    @property
    def half_width(self) -> float:
        """Half the width of the interval of the log ratio: 0.01 is about ±1 % of the speed-up."""
        return (self.high - self.low) / 2

    @property
    def bound(self) -> float:
        """The largest size of effect that the interval allows. Of a model against itself: the noise floor."""
        return max(abs(self.low), abs(self.high))


def paired_ratio(rounds: Sequence[Floats], rng: np.random.Generator, resamples: int = 2000) -> PairedRatio:
    """Median of the log ratios of all rounds with a 95 % cluster-bootstrap interval for few clusters.

    `rounds` holds one array (pairs,) of log ratios per round. Every resample draws as many rounds as there
    are, with replacement, then from each of them as many pairs as it has, and takes the median; the quantiles
    2.5 % and 97.5 % of these medians make an interval (Davison and Hinkley 1997, section 3.8). Of n rounds that is
    too narrow by √((n - 1) / n) and by the ratio of the normal to Student's distribution with n - 1 degrees of
    freedom, so its ends are moved away from the median by √(n / (n - 1)) · t₀.₉₇₅ / z₀.₉₇₅ (the correction behind
    the expanded percentile interval: Hesterberg, The American Statistician 69(4), 2015). One round
    alone says nothing about differences between processes; its interval is left as it is.
    """
    filled = [np.asarray(r, np.float64) for r in rounds if len(r)]
    if not filled:
        raise ValueError("a paired ratio needs at least one pair")
    medians = np.empty(resamples, np.float64)
    for i in range(resamples):
        drawn = rng.integers(len(filled), size=len(filled))
        medians[i] = np.median(np.concatenate([rng.choice(filled[j], size=filled[j].size) for j in drawn]))
    low, high = np.quantile(medians, [0.025, 0.975])
    everything = np.concatenate(filled)
    centre, wider = float(np.median(everything)), _few_clusters(len(filled))
    return PairedRatio(
        log=centre,
        low=centre - wider * (centre - float(low)),
        high=centre + wider * (float(high) - centre),
        pairs=everything.size,
        rounds=len(filled),
    )


def _few_clusters(count: int) -> float:
    """How much wider an interval from `count` clusters has to be than the bootstrap's."""
    if count < 2:
        return 1.0
    return math.sqrt(count / (count - 1)) * student_quantile(count - 1) / _Z95


def student_quantile(degrees: int) -> float:
    """The two-sided 95 % point of Student's distribution: a table up to 9 degrees of freedom, then the
    Cornish-Fisher expansion (Abramowitz and Stegun 1964, 26.7.5), good to 0.003.
    """
    if degrees <= len(_STUDENT):
        return _STUDENT[degrees - 1]
    z, n = _Z95, degrees
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / n + second / n**2


def verdict(ratio: PairedRatio, noise_floor: float) -> str:
    """`FASTER` or `SLOWER` where the interval excludes no difference and the effect exceeds noise; else
    `SAME`.

    `noise_floor` is a log ratio: the largest effect that a model shows against itself (`PairedRatio.bound`).
    Below six pairs there is no difference: five agree in sign by chance in 2 / 2⁵ = 6 % of the cases. Nor is there
    in a single process, whose memory layout may favour either.
    """
    unclear = ratio.pairs < 6 or ratio.rounds < 2 or ratio.low <= 0.0 <= ratio.high
    if unclear or abs(ratio.log) <= max(noise_floor, SMALLEST_EFFECT):
        return SAME
    return FASTER if ratio.log > 0 else SLOWER


def median_half_width(values: npt.ArrayLike) -> float:
    """Half the width of the distribution-free 95 % interval of the median; infinite for fewer than 8 values.

    The interval reaches from the k-th smallest to the k-th largest value, k = ⌊(n - 1.96 √n) / 2⌋ (Conover
    1999, section 3.2). It costs one sort, so it can be asked after every pair.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    k = int((ordered.size - _Z95 * math.sqrt(ordered.size)) / 2)
    return float(ordered[-k] - ordered[k - 1]) / 2 if k >= 1 else math.inf


def latency_quantiles(times: npt.NDArray[Any]) -> dict[str, float | None]:
    """Order statistics p50, p90, p99 of `times` (n,), in its unit; None for a tail that n values do not
    reach.

    A quantile q above the median is given only where the largest of n values lies above it with 95 %
    probability, 1 - qⁿ >= 0.95: from 29 values for p90, from 299 for p99.
    """
    ordered = np.sort(np.asarray(times, np.float64))
    found: dict[str, float | None] = {}
    for name, q in _QUANTILES.items():
        enough = ordered.size >= 1 and (q == 0.5 or q**ordered.size <= 0.05)
        found[name] = float(ordered[max(0, math.ceil(q * ordered.size) - 1)]) if enough else None
    return found
