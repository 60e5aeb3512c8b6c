"""`bisect`: the first rewrites of a pipeline that break the tolerance, and a folder that shows it.

Passes run one after the other. A lossless pass is compared with the model that it was given, a lossy one with the
original. In the first pass that fails, a binary search over the number of allowed rewrites finds the first that breaks;
where denying it alone is not enough, delta debugging finds the fewest that have to go (blame.py).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnxcomp import io
from onnxcomp.blame import Clock, first_bad, guilty
from onnxcomp.errors import UsageError
from onnxcomp.graph import Model
from onnxcomp.manager import Context, Pass
from onnxcomp.options import Options
from onnxcomp.pipelines import chosen_pipeline
from onnxcomp.probe import probe
from onnxcomp.quality import load_metric, output_error
from onnxcomp.reproducer import Reproducer, Trial, Try, reproduce
from onnxcomp.rollback import Done, Step
from onnxcomp.runtime import open_session
from onnxcomp.samples import Samples
from onnxcomp.verdict import Verification
from onnxcomp.verification import verify

__all__ = ["Bisection", "Culprit", "bisect"]

_SAMPLES = 128  # that every trial is compared on, by default
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Culprit:
    """A guilty rewrite: the `number`-th (from 1) of its pass; 0 if the pass changes results outside its rewrites.

    `before` and `after` are the errors of the model after the pass, without and with this rewrite, the other culprits
    left out: noise power / signal power of the worst output, infinite where there is nothing to compare.
    """

    number: int
    text: str
    before: float
    after: float
    reason: str


@dataclass(frozen=True)
class Bisection:
    """`position` is that of the guilty pass in the pipeline, from 1, with how many `rewrites` it made; 0 if none is
    guilty. `exact` says that there was time to narrow it down to single rewrites.
    """

    pipeline: str
    passes: int
    data: str
    position: int = 0
    guilty_pass: str = ""
    rewrites: int = 0
    culprits: tuple[Culprit, ...] = ()
    exact: bool = True
    reproducer: Reproducer | None = None
    trials: int = 0
    seconds: float = 0.0

    @property
    def sentence(self) -> str:
        """The result in words."""
        if not self.position:
            return f"no rewrite is guilty: all {self.passes} passes keep what they promise on {self.data}"
        what = f"pass {self.position}/{self.passes} {self.guilty_pass}"
        if not self.culprits[0].number:
            return f"{what} changes results outside of its {self.rewrites} rewrites: {self.culprits[0].reason}"
        listed = ", ".join(f"{c.number} ({c.text})" for c in self.culprits[:3])
        more = f" and {len(self.culprits) - 3} more" if len(self.culprits) > 3 else ""
        about = "" if self.exact else "; there was no time to narrow it down further"
        return f"{what}: guilty is rewrite {listed}{more} of {self.rewrites}: {self.culprits[0].reason}{about}"

    def to_json(self) -> dict[str, Any]:
        """Plain data; an infinite error is None."""

        def plain(value: float) -> float | None:
            return value if math.isfinite(value) else None

        culprits = [
            {"number": c.number, "rewrite": c.text, "error_before": plain(c.before), "error_after": plain(c.after),
             "reason": c.reason} for c in self.culprits
        ]  # fmt: skip
        return {
            "guilty": bool(self.position), "pipeline": self.pipeline, "data": self.data, "position": self.position,
            "pass": self.guilty_pass, "rewrites": self.rewrites, "culprits": culprits, "exact": self.exact,
            "reproducer": None if self.reproducer is None else self.reproducer.to_json(),
            "trials": self.trials, "seconds": self.seconds, "sentence": self.sentence,
        }  # fmt: skip


def bisect(
    model: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    tolerance: float | None = None,
    seconds: float = 300.0,
    samples: int = _SAMPLES,
    progress: Progress | None = None,
    **options: Any,
) -> Bisection:
    """The first rewrites of a pipeline after which `model` no longer does the job of the original.

    `options` are those of `onnxcomp.optimize` that choose passes and data: passes, calib, eval, preprocess, max_drop,
    metric, target, seed, threads, memory, allow_symlinks, force. Lossless passes have to stay within the original's own
    noise, or with `tolerance` every pass within this error relative to the size of the element or the rms of its
    output. `samples` limits what is compared. A reproducer is written to the folder `output`, if it is given and a
    culprit was found. After `seconds` the search ends with what it knows.

    Raises UsageError, ModelError or DataError for what their names say.
    """
    if not seconds > 0 or samples < 1 or (tolerance is not None and not tolerance >= 0):
        raise UsageError(f"cannot bisect with seconds {seconds!r}, samples {samples!r}, tolerance {tolerance!r}")
    chosen = Options.make(None, **options)
    if output is not None and os.path.lexists(output) and not chosen.force:
        raise UsageError(f"{os.fspath(output)} exists; choose another folder, or overwrite its files with --force")
    search = _Search(model, chosen, tolerance, samples, Clock(seconds), progress or (lambda share, what: None))
    begin = time.monotonic()
    found = search.run(None if output is None else Path(output))
    return replace(found, trials=search.trials, seconds=time.monotonic() - begin)


class _Search:
    def __init__(
        self, given: Any, options: Options, tolerance: float | None, samples: int, clock: Clock, progress: Progress
    ) -> None:
        if isinstance(given, (str, os.PathLike)):
            probe(given, allow_symlinks=options.allow_symlinks)
        self.options = options
        self.tolerance = tolerance
        self.limit = samples
        self.clock = clock
        self.progress = progress
        self.source = io.load(given, allow_symlinks=options.allow_symlinks)
        self.metric = load_metric(options.metric)
        self.pipeline = chosen_pipeline(options)
        self.samples = Samples(options, open_session(self.source, threads=options.threads), self.source)
        self.trials = 0
        self.edges = False

    def run(self, folder: Path | None) -> Bisection:
        model, data = self.source.copy(), self.samples.verification
        blank = Bisection(
            str(self.pipeline), len(self.pipeline.passes), "inputs made from the graph" if data is None else data.source
        )
        for position, one in enumerate(self.pipeline.passes, 1):
            self.progress((position - 1) / blank.passes, f"pass {position}/{blank.passes} {one.name}")
            step = Step(one, model, self._context)
            done = step.run(model)
            whole = self._first_look(step, done)
            if whole.reason:
                found = replace(blank, position=position, guilty_pass=str(one), rewrites=len(done.rewrites))
                return self._narrow(found, step, done, whole, folder)
            model = done.model
        return blank

    def _first_look(self, step: Step, done: Done) -> Trial:
        """On the data, then on unusual inputs as well; what showed the fault is what the search looks at."""
        found = Trial(0.0, "")
        for edges in (False, True):
            if done.rewrites and not found.reason:
                self.edges = edges
                found = self._try(step, done.model)
        return found

    def _narrow(self, found: Bisection, step: Step, done: Done, whole: Trial, folder: Path | None) -> Bisection:
        def prefix(count: int) -> Trial:
            self.progress(0.0, f"trying the first {count} of {found.rewrites} rewrites of {step.one.name}")
            return self._try(step, step.run(limit=count).model)

        def denied(texts: frozenset[str]) -> Trial:
            self.progress(0.0, f"trying {step.one.name} without {len(texts)} rewrites")
            return self._try(step, step.run(deny=frozenset(texts)).model)

        nothing = prefix(0)
        if nothing.reason:
            return replace(found, culprits=(Culprit(0, "", 0.0, nothing.error, nothing.reason),))
        low, high = first_bad(found.rewrites, lambda n: not prefix(n).reason, self.clock)
        exact, first = high == low + 1, done.rewrites[high - 1]
        texts: frozenset[str] | None = frozenset({first})
        if exact and denied(frozenset({first})).reason:
            texts = guilty(done.rewrites, lambda some: not denied(some).reason, self.clock)
        texts = frozenset({first}) if texts is None else texts
        rest = denied(texts)
        culprits: list[Culprit] = []
        for number, text in enumerate(done.rewrites, 1):
            if text in texts and text not in [c.text for c in culprits]:
                alone = whole if len(texts) == 1 else denied(texts - {text})
                culprits.append(Culprit(number, text, rest.error, alone.error, alone.reason or whole.reason))
        found = replace(found, culprits=tuple(culprits), exact=exact and not self.clock.up)
        if folder is None:
            return found
        self.progress(0.0, "writing a reproducer")
        attempt = Try(step, frozenset({culprits[0].text}), self.samples, self.options, self._verdict)
        return replace(found, reproducer=reproduce(attempt, folder, self.tolerance, self.clock))

    def _context(self) -> Context:
        o = self.options
        return Context(
            data=self.samples.calibration, target=o.target, threads=o.threads, seed=o.seed, memory=o.memory,
            max_drop=o.max_drop,
        )  # fmt: skip

    def _try(self, step: Step, changed: Model) -> Trial:
        self.trials += 1
        reference = self.source if step.one.effect == "lossy" else step.before()
        return self._verdict(step.one, reference, changed, self.samples.verification)

    def _verdict(self, one: Pass, reference: Any, changed: Any, data: Any) -> Trial:
        """The error of a model that a pass made, and the reason why it is too large, if it is."""
        judged = one.effect if self.tolerance is None else "lossy"
        found = verify(
            reference,
            changed,
            data,
            effect="lossy" if judged == "lossy" else "float",
            max_drop=self.options.max_drop if self.tolerance is None else math.inf,
            metric=self.metric if judged == "lossy" and self.tolerance is None else None,
            samples=None if data is None else self.limit,
            exclude=self.samples.calibration_hashes if data is self.samples.verification else (),
            edges=self.edges,
            threads=self.options.threads,
            seed=self.options.seed,
        )
        return _trial(found, self.tolerance)


def _trial(found: Verification, tolerance: float | None) -> Trial:
    outputs = found.outputs
    broken = any(s.errors.new_nan or s.errors.new_inf for s in outputs.values())
    error = math.inf if broken else max(map(output_error, outputs.values()), default=math.inf)
    if found.verdict == "failed":
        return Trial(error, found.reasons[0])
    if tolerance is not None and outputs:
        name, worst = max(outputs.items(), key=lambda item: item[1].errors.max_rel)
        if worst.errors.max_rel > tolerance:
            return Trial(error, f"output {name!r} is off by {worst.errors.max_rel:.3g}, {tolerance:.3g} are allowed")
    return Trial(error, "")
