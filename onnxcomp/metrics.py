"""How far a candidate's outputs are from the original's, as streaming statistics.

`measure` turns a batch of one output into an OutputStats; OutputStats add up (`+`) in any order and split, so
memory does not grow with the number of samples. Sums are float64; maxima and counts are exact whatever the
split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from onnxcomp.class_metrics import Z95, ClassStats, class_labels, class_rows, compare_decisions, compare_scores

__all__ = ["FLOATS", "ErrorStats", "OutputStats", "Role", "Tolerance", "measure"]

Array = npt.NDArray[Any]
Float = npt.NDArray[np.float64]
Role = Literal["classes", "predictions", "positions", "values", "scores", "discrete"]
FLOATS: tuple[Role, ...] = ("classes", "positions", "values", "scores")  # the roles of floats

_MAXIMA = frozenset({"max_abs", "max_rel", "excess", "worst"})


@dataclass(frozen=True)
class Tolerance:
    """Elements may differ by max(4*noise, atol_rel*rms + rtol*|ref|); rms is that of the sample's output."""

    noise: float = 0.0
    atol_rel: float = 0.0
    rtol: float = 0.0


@dataclass(frozen=True)
class ErrorStats:
    """Element-wise statistics of one output; sums and maxima run over positions where both sides are finite.

    `signal`, `power`, `noise` and `dot` are the sums of ref², cmp², (ref-cmp)² and ref*cmp. `max_rel` is
    |ref-cmp| / max(|ref|, rms of the sample). `excess` is the largest error as a multiple of its tolerance.
    `new_nan` and `new_inf` count positions where the original is finite, `lost` those where only the original
    was not finite or the kinds differ. Signed zeros are equal, and so are two NaN. `worst_sample` is the
    first sample with the largest error `worst`: `max_abs`, inf where there is a new NaN or infinity, and for
    integers and strings 1 where an element changed. Over the `rows` samples, `noise2`, `signal2` and `cross` sum
    n², s² and n*s with n and s the noise and the signal of one sample.
    """

    elements: int = 0
    unequal: int = 0
    signal: float = 0.0
    power: float = 0.0
    noise: float = 0.0
    dot: float = 0.0
    max_abs: float = 0.0
    max_rel: float = 0.0
    excess: float = 0.0
    new_nan: int = 0
    new_inf: int = 0
    lost: int = 0
    worst: float = 0.0
    worst_sample: int = 0
    rows: int = 0
    noise2: float = 0.0
    signal2: float = 0.0
    cross: float = 0.0

    def __add__(self, other: ErrorStats) -> ErrorStats:
        if not (self.elements and other.elements):
            return self if self.elements else other
        merged = {
            f.name: (max if f.name in _MAXIMA else sum)((getattr(self, f.name), getattr(other, f.name)))
            for f in fields(self)
        }
        merged["worst_sample"] = min((self, other), key=lambda s: (-s.worst, s.worst_sample)).worst_sample
        return ErrorStats(**merged)

    @property
    def noise_ratio(self) -> float:
        """Noise power over signal power; 0 when equal, inf when only the original is all zeros."""
        return self.noise / self.signal if self.signal > 0 else (math.inf if self.noise > 0 else 0.0)

    @property
    def noise_ratio_ci(self) -> tuple[float, float] | None:
        """95 % interval of the noise ratio R = sum n / sum s over samples like these; None for fewer than two.

        R ± 1.96 sqrt(m/(m-1) sum (n - R s)²) / sum s: ratio estimation, Cochran, Sampling Techniques, section 6.3.
        """
        ratio = self.noise_ratio
        if self.rows < 2 or not math.isfinite(ratio) or self.signal <= 0:
            return None
        scatter = max(0.0, self.noise2 - 2 * ratio * self.cross + ratio**2 * self.signal2)
        half = Z95 * math.sqrt(self.rows / (self.rows - 1) * scatter) / self.signal
        return max(0.0, ratio - half), ratio + half

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio 10*log10(signal/noise) in dB; inf when there is no noise."""
        if self.noise == 0:
            return math.inf
        return 10 * (math.log10(self.signal) - math.log10(self.noise)) if self.signal > 0 else -math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two outputs, each seen as one long vector."""
        length = math.sqrt(self.signal) * math.sqrt(self.power)
        return self.dot / length if length > 0 else float(self.noise == 0)

    @property
    def equal(self) -> float:
        """Share of equal elements."""
        return 1 - self.unequal / self.elements if self.elements else 1.0


@dataclass(frozen=True)
class OutputStats:
    """All that is known of one output; `classes` is set for the roles classes, predictions and positions."""

    role: Role
    errors: ErrorStats
    classes: ClassStats | None = None

    def __add__(self, other: OutputStats) -> OutputStats:
        both = [s.classes for s in (self, other) if s.classes is not None]
        return OutputStats(self.role, self.errors + other.errors, sum(both[1:], both[0]) if both else None)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; an infinite one (the SQNR of equal outputs) is None, as JSON has no infinity."""
        e = self.errors
        out: dict[str, Any] = {"role": self.role, "equal": e.equal, "worst_sample": e.worst_sample}
        if self.role in FLOATS:
            numbers = {"max_abs": e.max_abs, "max_rel": e.max_rel, "sqnr_db": e.sqnr_db, "cosine": e.cosine}
            out |= {k: v if math.isfinite(v) else None for k, v in numbers.items()}
            out |= {"new_nan": e.new_nan, "new_inf": e.new_inf, "noise_ratio": e.noise_ratio}
            if not math.isfinite(e.noise_ratio):
                out["noise_ratio"] = None
            if e.noise_ratio_ci is not None:
                out["noise_ratio_ci"] = list(e.noise_ratio_ci)
        return out | (self.classes.to_json() if self.classes and self.classes.rows else {})


def measure(
    role: Role,
    ref: Array,
    cmp: Array,
    *,
    count: int,
    first: int = 0,
    tolerance: Tolerance | None = None,
    labels: Array | None = None,
) -> OutputStats:
    """Statistics of one output, of equal shape on both sides, for samples first ... first+count-1.

    Axis 0 holds the samples when its size is `count`; otherwise the whole array counts as sample `first`.
    `labels` are class numbers (for predictions: what the model predicts), one per sample.
    Raises DataError when a label is not the position of a class.
    """
    limit = tolerance or Tolerance()
    rows = count if ref.ndim and ref.shape[0] == count else 1
    if role in ("predictions", "discrete"):
        errors = _discrete_errors(ref, cmp, rows, first)
    else:
        errors = _float_errors(ref, cmp, rows, first, limit)
    known = class_labels(labels, count)
    if role == "predictions":
        return OutputStats(role, errors, compare_decisions(ref.reshape(-1), cmp.reshape(-1), known))
    if role in ("classes", "positions"):
        known = known if role == "classes" else None
        return OutputStats(role, errors, compare_scores(class_rows(ref), class_rows(cmp), known, limit.noise))
    return OutputStats(role, errors)


def _float_errors(ref: Array, cmp: Array, rows: int, first: int, limit: Tolerance) -> ErrorStats:
    a, b = (x.astype(np.float64).reshape(rows, -1) for x in (ref, cmp))
    if not a.size:
        return ErrorStats()
    with np.errstate(invalid="ignore", over="ignore"):
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        finite = np.isfinite(a)
        both = finite & np.isfinite(b)
        x, y = np.where(both, a, 0.0), np.where(both, b, 0.0)
        size, error = np.abs(x), np.abs(x - y)
        rms = np.sqrt(np.mean(x * x, axis=1, keepdims=True))
        allowed = np.maximum(4 * limit.noise, limit.atol_rel * rms + limit.rtol * size)
        per_sample = np.where((finite & ~both).any(axis=1), np.inf, error.max(axis=1))
        signal, noise = (x * x).sum(axis=1), (error * error).sum(axis=1)
        return ErrorStats(
            elements=a.size,
            unequal=int(np.count_nonzero(~same)),
            signal=float(signal.sum()),
            power=float((y * y).sum()),
            noise=float(noise.sum()),
            dot=float((x * y).sum()),
            max_abs=float(error.max()),
            max_rel=_largest_ratio(error, np.maximum(size, rms)),
            excess=_largest_ratio(error, allowed),
            new_nan=int(np.count_nonzero(finite & np.isnan(b))),
            new_inf=int(np.count_nonzero(finite & np.isinf(b))),
            lost=int(np.count_nonzero(~finite & ~same)),
            worst=float(per_sample.max()),
            worst_sample=first + int(per_sample.argmax()),
            rows=rows,
            noise2=float(noise @ noise),
            signal2=float(signal @ signal),
            cross=float(noise @ signal),
        )


def _largest_ratio(error: Float, scale: Float) -> float:
    unbounded = np.where(error > 0, np.inf, 0.0)
    return float(np.divide(error, scale, out=unbounded, where=scale > 0).max())


def _discrete_errors(ref: Array, cmp: Array, rows: int, first: int) -> ErrorStats:
    changed = np.asarray(ref != cmp, dtype=bool).reshape(rows, -1)
    if not changed.size:
        return ErrorStats()
    per_sample = changed.any(axis=1)
    return ErrorStats(
        elements=changed.size,
        unequal=int(np.count_nonzero(changed)),
        worst=float(per_sample.max()),
        worst_sample=first + int(per_sample.argmax()),
    )
