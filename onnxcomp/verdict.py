"""The verdict on a candidate: from what a comparison saw to a verdict with its reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from onnxcomp.class_metrics import Z95
from onnxcomp.errors import InconclusiveError, VerificationError
from onnxcomp.metrics import FLOATS, OutputStats, Role
from onnxcomp.mixed_outputs import Part
from onnxcomp.noise import Noise
from onnxcomp.quality import Metric, Quality, custom_quality, quality

if TYPE_CHECKING:
    from onnxcomp.layerwise import Layer

__all__ = ["Effect", "Evidence", "Verdict", "Verification", "judge"]

Array = npt.NDArray[Any]
Effect = Literal["exact", "float", "lossy"]
Verdict = Literal["equivalent", "within budget", "unverified on real data", "inconclusive", "failed"]

MIN_SAMPLES = 8  # below, a share of samples or a power ratio says too little about data not seen


@dataclass(frozen=True)
class Verification:
    """What was compared, what was found, and what follows. `passed` is False for failed and inconclusive.

    `outputs` has the statistics of each output, `noise` the original's own largest deviation per output when
    only the way of computing changes. `reasons` are sentences for people: why it failed, what to keep in mind
    if it did not. `layers` is the comparison layer by layer, where it was asked for.
    """

    verdict: Verdict
    effect: Effect
    data: str
    samples: int
    excluded: int
    quality: Quality | None
    outputs: Mapping[str, OutputStats]
    noise: Mapping[str, float]
    reasons: tuple[str, ...]
    layers: tuple[Layer, ...] | None = None

    @property
    def passed(self) -> bool:
        return self.verdict not in ("failed", "inconclusive")

    def to_json(self) -> dict[str, Any]:
        """The `verification` object of the report; None for numbers that are infinite or do not exist."""
        q = self.quality
        return {
            "verdict": self.verdict, "passed": self.passed, "effect": self.effect, "data": self.data,
            "samples": self.samples, "excluded": self.excluded,
            "metrics": {name: stats.to_json() for name, stats in self.outputs.items()},
            "metric": q.kind if q else None, "output": q.output if q else None,
            "original": q.original if q else None, "optimized": q.optimized if q else None,
            "drop": q.drop if q and math.isfinite(q.drop) else None,
            "ci": list(q.ci) if q and q.ci else None,
            "noise": dict(self.noise), "reasons": list(self.reasons),
            **({} if self.layers is None else {"layers": [layer.to_json() for layer in self.layers]}),
        }  # fmt: skip

    def raise_if_failed(self) -> None:
        """Raise VerificationError if failed, InconclusiveError if inconclusive, with the first reasons."""
        if not self.passed:
            kind = VerificationError if self.verdict == "failed" else InconclusiveError
            raise kind("; ".join(self.reasons[:2]))


@dataclass
class Evidence:
    """What a comparison has seen so far.

    `kept` has (outputs of the original, outputs of the candidate, labels) of every batch, for a user's metric
    only. `failures` are reasons that no number can outweigh, such as a missing output; `notes` do not change
    the verdict. `parts` are the quantities of different units that share an output: `stats` has each of them, too.
    """

    stats: dict[str, OutputStats] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    parts: dict[str, list[Part]] = field(default_factory=dict)
    samples: int = 0
    excluded: int = 0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kept: list[tuple[dict[str, Array], dict[str, Array], Array | None]] = field(default_factory=list)

    def add(self, name: str, stats: OutputStats) -> None:
        """Statistics of further samples of an output, or of a part of one."""
        self.stats[name] = self.stats[name] + stats if name in self.stats else stats


def judge(
    blank: Verification,
    seen: Evidence,
    noise: Noise,
    *,
    metric: Metric | None,
    max_drop: float,
    synthetic: bool,
) -> Verification:
    """The verdict for `blank.effect`, and `blank` filled in. `synthetic`: the inputs were made from the
    graph.

    A share of samples passes on its point estimate; that its interval reaches beyond the budget is a note.
    Only too few samples and outputs that are random in the original make a verdict inconclusive.
    """
    lossy = blank.effect == "lossy"
    stable = {name: s for name, s in seen.stats.items() if name not in noise.random}
    failures = [f for name, s in seen.stats.items() for f in _output_failures(name, s, blank.effect, noise)]
    failures += seen.failures
    found = _quality(seen, stable, None if failures else metric)
    doubts = [f"output {name!r} of the original changes between two equal runs" for name in noise.random]
    if seen.samples == 0 and not failures:
        doubts.append(f"all {seen.excluded} samples were used for calibration; give others with --eval")
    if lossy and synthetic:
        failures += _wild_outputs(stable)
    elif lossy and found is not None:
        few = seen.samples < MIN_SAMPLES
        doubts += [_too_few(found, seen.samples, max_drop)] if few else []
        # A power ratio says much even on one sample; a share of a few samples does not.
        if found.drop > max_drop and not (few and found.kind != "sqnr"):
            failures.append(_too_much(found, stable, max_drop))
    verdict: Verdict = "within budget" if lossy else "equivalent"
    if failures:
        verdict = "failed"
    elif doubts:
        verdict = "inconclusive"
    elif synthetic:
        verdict = "unverified on real data"
    notes = list(seen.notes)
    if verdict == "within budget" and found is not None and found.ci is not None and found.ci[1] > max_drop:
        notes.append(_straddles(found, seen.samples, max_drop))
    return replace(
        blank,
        verdict=verdict,
        samples=seen.samples,
        excluded=seen.excluded,
        quality=found,
        outputs=dict(seen.stats),
        noise={**noise.share, **noise.absolute},
        reasons=tuple(failures + doubts + notes),
    )


def _quality(seen: Evidence, stable: Mapping[str, OutputStats], metric: Metric | None) -> Quality | None:
    if metric is not None and seen.kept:
        labels = [labels for _, _, labels in seen.kept if labels is not None]
        together = np.concatenate(labels) if len(labels) == len(seen.kept) else None
        return custom_quality(metric, [k[0] for k in seen.kept], [k[1] for k in seen.kept], together)
    return quality(stable) if stable else None


def _output_failures(name: str, stats: OutputStats, effect: Effect, noise: Noise) -> list[str]:
    e = stats.errors
    where = f"worst at sample {e.worst_sample}"
    if e.new_nan or e.new_inf:
        return [f"output {name!r} has {e.new_nan} new NaN and {e.new_inf} new infinities, {where}"]
    if effect == "lossy" or name in noise.random:
        return []
    discrete = stats.role in ("predictions", "discrete")
    if (effect == "exact" and e.unequal) or (discrete and 1 - e.equal > 4 * noise.share.get(name, 0.0)):
        return [f"output {name!r} differs in {e.unequal} of {e.elements} elements, {where}"]
    if effect == "float" and (e.excess > 1 or e.lost):
        own = noise.absolute.get(name, 0.0)
        return [
            f"output {name!r} is off by up to {e.max_abs:.3g}, {e.excess:.3g} times what the original's own "
            f"noise of {own:.3g} and its type allow, {where}"
        ]
    return []


def _wild_outputs(stats: Mapping[str, OutputStats]) -> list[str]:
    floats = {n: s for n, s in stats.items() if s.role in FLOATS}
    wild = [n for n, s in floats.items() if s.errors.noise_ratio > 1]
    return [f"output {n!r} has more error than signal on inputs synthesized from the graph" for n in wild]


def _too_much(found: Quality, stats: Mapping[str, OutputStats], max_drop: float) -> str:
    where = f" of output {found.output!r}" if found.output else ""
    worst = f", worst at sample {stats[found.output].errors.worst_sample}" if found.output in stats else ""
    lost = f"drops by {found.drop:.4g}, more than the {max_drop:.4g} allowed"
    return f"quality ({found.kind}){where} {lost}{worst}"


def _too_few(found: Quality, samples: int, max_drop: float) -> str:
    wanted = MIN_SAMPLES if found.kind in ("sqnr", "custom") else _sure_samples(max_drop)
    better = f", better {wanted - samples} more" if wanted > MIN_SAMPLES else ""
    return f"{samples} samples are too few for a verdict: give at least {MIN_SAMPLES - samples} more{better}"


def _sure_samples(max_drop: float) -> int:
    """Samples without a single change after which the upper Wilson bound is `max_drop`: z²(1-d)/d."""
    return max(MIN_SAMPLES, math.ceil(Z95**2 * (1 - min(max_drop, 1)) / max(max_drop, 1e-4)))


def _straddles(found: Quality, samples: int, max_drop: float) -> str:
    upper = found.ci[1] if found.ci else found.drop
    room = max_drop - found.drop
    hint = "more samples may settle it"
    if found.drop <= 0 and found.kind == "agreement":
        hint = f"about {_sure_samples(max_drop)} samples would settle it"
    elif room > 0:  # the interval shrinks with the square root of the number of samples
        wanted = math.ceil(samples * ((upper - found.drop) / room) ** 2)
        hint = f"about {wanted} samples would settle it"
    return f"the 95 % interval of the drop reaches {upper:.3g}, above the {max_drop:.3g} allowed; {hint}"
