"""One optimization while it runs: the model as it is, what was done to it, and the checks after each step."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxcomp import io
from onnxcomp.bench import Benchmark
from onnxcomp.graph import Model
from onnxcomp.inspection import summary
from onnxcomp.macs import Macs, count_with_run
from onnxcomp.manager import Context, Pass, PassRecord, run_pass
from onnxcomp.options import Options
from onnxcomp.pipelines import asked_pipeline, chosen_pipeline, planning
from onnxcomp.probe import probe
from onnxcomp.provenance import forget
from onnxcomp.quality import load_metric
from onnxcomp.quality_gate import QualityGate
from onnxcomp.registry import load_pass
from onnxcomp.rollback import Done, Repair, Step, kept_whole, repaired
from onnxcomp.runtime import open_session
from onnxcomp.samples import Samples
from onnxcomp.shapes import Shapes
from onnxcomp.short_form import shortened
from onnxcomp.speed_gate import LEAST_GAIN, SpeedGate
from onnxcomp.storage import is_packed, plain
from onnxcomp.verdict import Effect, Verification

__all__ = ["Job"]

_LOSSLESS = "lossless passes"


class Job:
    """`source` is the original as it was loaded, `original` what sessions are opened from (its path, or its bytes).

    `model` changes from pass to pass; `float_model` is what it was before the first lossy pass that was kept.
    """

    def __init__(self, given: Any, options: Options, progress: Callable[[float, str], None]) -> None:
        self.options = options
        self.progress = progress
        if isinstance(given, (str, os.PathLike)):
            probe(given, allow_symlinks=options.allow_symlinks)
        self.source = io.load(given, allow_symlinks=options.allow_symlinks)
        self.original: Any = Path(given) if isinstance(given, (str, os.PathLike)) else self.source.to_bytes()
        self.model = self._fresh()
        self.float_model = self.model
        metric = load_metric(options.metric)
        self.pipeline = chosen_pipeline(options, packed=is_packed(self.source))
        if options.dry_run:
            self.pipeline, left_out = planning(self.pipeline)
        session = open_session(self.original, threads=options.threads)
        self.samples = Samples(options, session, plain(self.source))
        self.gate = SpeedGate(self.original, self.samples, options, progress)
        self._checks = QualityGate(self.original, self.samples, options, metric, progress)
        self.notes = list(self.samples.notes)
        if options.dry_run:
            self.notes.append("dry run: nothing was removed, no model was written")
            self.notes += [f"{name} has no plan to show and did not run" for name in left_out]
        if options.target != "cpu" and options.bench_seconds <= 0:
            self.notes.append(f"verified on the CPU provider; speed on {options.target} was not measured")
        if options.calib is None and options.passes is None and options.target != "cuda":
            self.notes.append("no calibration data: int8 quantization was left out; --calib DATA unlocks it")
        self.records: list[PassRecord] = []
        # By identity, of models that do not change any more and are kept with it.
        self._counted: dict[int, tuple[Model, tuple[Shapes, Macs]]] = {}
        self._verified: Verification | None = None  # of the model as it is now
        self._timed: Benchmark | None = None  # likewise, against the original

    def _fresh(self) -> Model:
        """A copy of the original; how it came from another model is of no interest here."""
        model = self.source.copy()
        forget(model)
        return model

    # --- passes ---

    def run_passes(self) -> None:
        """Run the pipeline. Lossless passes are checked together, and one by one only if that check fails."""
        if not self._run_pipeline(each=False):
            self.model, self.records = self._fresh(), []
            self.float_model = self.model
            self._run_pipeline(each=True)

    def _run_pipeline(self, *, each: bool) -> bool:
        """False, and stopped, if lossless passes that were not checked one by one (`each`) changed results."""
        unchecked = False
        for number, one in enumerate(self.pipeline.passes, 1):
            if one.effect == "lossy" and unchecked and not self._lossless_is_fine():
                return False
            record = self.run_pass(one, f"pass {number}/{len(self.pipeline.passes)} {one.name}", check=each)
            unchecked = one.effect != "lossy" and (unchecked or (record.rewrites > 0 and not each))
        return not unchecked or self._lossless_is_fine()

    def _lossless_is_fine(self) -> bool:
        if not self.options.verify:
            return True
        lossy = bool(self._lossy())
        effect: Effect = "lossy" if lossy else "float"
        found = self._checks.verify(self.model, effect, quick=not lossy)
        return found.verdict != "failed"

    def run_pass(self, one: Pass, what: str, *, check: bool = True, repair: bool = True) -> PassRecord:
        """Run one pass on the model, and take back what does not stand the check: guilty rewrites, or all of it.

        Lossy passes are always checked, others if `check` is set. Without `repair` all is taken back at once.
        """
        self.progress(0.0, what)
        step = Step(one, self.model, lambda: self._context(what))
        done, verified = step.run(self.model), None
        if done.record.rewrites and self.options.verify and (check or one.effect == "lossy"):
            done, verified = self._checked(step, done, repaired if repair else kept_whole)
        record = done.record
        if record.reverted is not None:
            self.model = step.before()
        elif record.rewrites:
            self.model, self._verified, self._timed = done.model, verified, None
            if one.effect != "lossy" and self._lossy():  # what it does stays when the lossy passes are taken back
                self.float_model = self.float_model.copy()
                run_pass(one, self.float_model, self._context(what))
            elif one.effect != "lossy":
                self.float_model = self.model
            elif not self._lossy():
                self.float_model = step.before()
        self.records.append(record)
        return record

    def _context(self, what: str) -> Context:
        return Context(
            data=self.samples.calibration,
            target=self.options.target,
            threads=self.options.threads,
            seed=self.options.seed,
            memory=self.options.memory,
            max_drop=self.options.max_drop,
            check=self._checks.stands if self.options.verify and self.samples.verification is not None else None,
            progress=lambda share, text: self.progress(share, f"{what}: {text}"),
        )

    def _checked(self, step: Step, done: Done, repair: Repair) -> tuple[Done, Verification | None]:
        """What is left of a pass after its check. That of a lossy pass is the result's as well, if nothing follows.

        A lossless pass is compared with the model that it was given: lossy ones may have come before.
        """
        if step.one.effect != "lossy":
            before = step.before()
            done, _ = repair(step, done, lambda m: self._checks.verify(m, "float", original=before, quick=True))
            return done, None
        done, found = repair(step, done, lambda m: self._checks.verify(m, "lossy"))
        drop = found.quality.drop if found.quality is not None else None
        return replace(done, record=replace(done.record, drop=drop)), found

    def _lossy(self) -> list[int]:
        """Places of the lossy passes that are in the model."""
        found = enumerate(self.records)
        return [i for i, r in found if r.effect == "lossy" and r.rewrites and r.reverted is None]

    def pack_again(self) -> None:
        """Pack the result if the original was packed and the pipeline does not say otherwise."""
        asked = [p.name for p in asked_pipeline(self.options).passes]
        if is_packed(self.source) and "unpack" not in asked and "pack" not in asked:
            self.run_pass(load_pass("pack")(), "packing", check=False)

    # --- speed ---

    def check_speed(self) -> None:
        """Take lossy passes back if the result is slower than the float model, or larger and not faster.

        Left to us, 8-bit arithmetic has to gain time: the smaller file comes without it as well
        (follow_ups.py), and closer to the original.
        """
        if not self._lossy() or self.options.goal == "size":
            return
        ours = self.options.passes is None or self.options.goal == "latency"
        kept = {self.records[i].name for i in self._lossy()}
        later = any(one.pays_later for one in self.pipeline.passes if one.name in kept)
        reason = self.no_progress(
            (_LOSSLESS, self.label()), self.float_model, least=LEAST_GAIN if ours else 0.0, smaller=not later
        )
        if reason is not None:
            for i in self._lossy():
                self.records[i] = replace(self.records[i], reverted=reason)
            what = "16-bit" if self.options.target == "cuda" else "static 8-bit"
            self.notes.append(f"{what} arithmetic was not kept: {reason}")
            self.model, self._verified = self.float_model, None

    def no_progress(
        self, names: tuple[str, str], before: Model, *, least: float = 0.0, smaller: bool = True
    ) -> str | None:
        """Why the model as it is would be no progress over `before`: see `SpeedGate`. None if it is one."""
        reason, self._timed = self.gate.no_progress(
            names, before, self.model, least=least, smaller=smaller, drop=self.drop
        )
        return reason

    def keep_exact(self, reason: str) -> None:
        """Take back all passes but those that change no bit, for this reason."""
        others = [r for r in self.records if r.effect != "exact" and r.rewrites and r.reverted is None]
        self.records = [replace(r, reverted=reason) if r in others else r for r in self.records]
        self.model = self.float_model = self._fresh()
        for one in self.pipeline.passes:
            if one.effect == "exact":
                run_pass(one, self.model, self._context(one.name))
        self._verified = self._timed = None

    @property
    def drop(self) -> float | None:
        """Quality that the model as it is loses, if it was measured."""
        found = self._verified
        return None if found is None or found.quality is None else found.quality.drop

    def state(self) -> tuple[Any, ...]:
        """What passes have changed so far, for `restore`."""
        return self.model.copy(), self.float_model, list(self.records), self._verified, self._timed

    def restore(self, state: tuple[Any, ...]) -> None:
        """Go back to a state, as often as needed."""
        model, self.float_model, records, self._verified, self._timed = state
        self.model, self.records = model.copy(), list(records)

    # --- result ---

    def verify_result(self) -> Verification | None:
        """The verification of the model as it is."""
        if not self.options.verify:
            self.notes.append("the result was not verified (--no-verify)")
            return None
        if self._verified is None:
            self.progress(0.0, "verifying")
            effect: Effect = "lossy" if self._lossy() else "float"
            self._verified = self._checks.verify(self.model, effect)
        found = self._verified
        if found.verdict == "unverified on real data":
            self.notes.append("unverified on real data: give samples with --calib or --eval")
        return found

    def measure(self) -> Benchmark | None:
        """The model as it is against the original."""
        if self.options.bench_seconds <= 0:
            return None
        found = self._timed = self._timed or self.gate.time([self.original, self.model])
        self.gate.tried.finish(self.label(), found.models[1], self.drop)
        return found

    def save(self, target: Path) -> io.Saved:
        """Write the model; what was written is read back by ONNX Runtime before it takes the place of `target`.

        Where size is the goal inner names are short in the file, and defaults not spelled out; those of the report are
        the original's.
        """
        self.progress(0.0, "writing")
        short = self.options.goal == "size" and self.options.passes is None
        return io.save(
            shortened(self.model) if short else self.model,
            target,
            overwrite=self.options.force,
            external_data=self.options.external_data,
            before_commit=_loads,
        )

    def describe(self, model: Model, place: Any) -> dict[str, Any]:
        """The `original` / `optimized` object of the report. `place` is a path, bytes, or None: written nowhere."""
        found = summary(model, macs=self.count(model)[1])
        if isinstance(place, Path):
            found.update(path=str(place), sha256=io.sha256(place), file_bytes=io.model_bytes(place))
        elif place is not None:
            found.update(path=None, file_bytes=len(place))
        return found

    def count(self, model: Model) -> tuple[Shapes, Macs]:
        """Types of all values and MACs of one sample; of each model counted once."""
        if id(model) not in self._counted:
            self._counted[id(model)] = model, count_with_run(plain(model), feeds=self.samples.feeds[0])
        return self._counted[id(model)][1]

    def label(self) -> str:
        """What the report calls the model as it is now."""
        names = dict.fromkeys(self.records[i].name for i in self._lossy())
        return f"with {', '.join(names)}" if names else _LOSSLESS

    def reference(self) -> Model:
        """What inner values of the result compare with: the model before the first lossy pass, else the original."""
        return self.float_model if self._lossy() else self.source

    def account(self) -> dict[str, Any]:
        """The options that made this result, as plain data."""
        o = self.options
        plain = ("target", "max_drop", "goal", "size", "speed", "samples", "seed", "threads", "dry_run")
        data = self.samples
        return {
            **{k: getattr(o, k) for k in plain},
            "passes": str(self.pipeline),
            "calib": None if data.calibration is None else data.calibration.source,
            "eval": data.verification.source if o.eval is not None and data.verification is not None else None,
        }


def _loads(path: Path) -> None:
    open_session(path)
