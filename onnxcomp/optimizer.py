"""`optimize`: run a pipeline on a model, prove that the result does the same job, measure it, write it.

After each pass the model is compared with the original: a lossless pass that changes results, and a lossy pass that
costs more than the budget, is taken back, and the report says so. What is written at last is the best model that was
verified; if 8-bit arithmetic turns out slower than optimized float on this machine, that is the float model.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onnxcomp import io
from onnxcomp.bench import Benchmark, benchmark
from onnxcomp.calibration.data import Dataset, open_data, sample_hashes
from onnxcomp.calibration.pictures import IMAGE_SUFFIXES
from onnxcomp.calibration.split import hold_out, limited
from onnxcomp.environment import environment
from onnxcomp.errors import UsageError, VerificationError
from onnxcomp.graph import Model
from onnxcomp.inspection import summary
from onnxcomp.manager import Context, Pass, PassRecord, Pipeline, run_pass
from onnxcomp.options import DEFAULT_PASSES, Options
from onnxcomp.passes.quantize import Quantize
from onnxcomp.quality import Metric
from onnxcomp.report import Report
from onnxcomp.runtime import Session, open_session, provider_name
from onnxcomp.serde import export_model, import_model
from onnxcomp.synthesis import usable_inputs
from onnxcomp.verdict import Verification
from onnxcomp.verification import verify

__all__ = ["optimize"]

_QUICK = 16  # samples of the check after a lossless pass
_VERIFY_LIMIT = 2048  # samples of the final verification


def optimize(
    model: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    recipe: str | os.PathLike[str] | None = None,
    progress: Any = None,
    **options: Any,
) -> Report:
    """Optimize a model and write the result.

    `model` is a path or a ModelProto; `output` the path to write, `MODEL.opt.onnx` beside the model by default.
    `options` are those of `onnxcomp.options.Options`; a `recipe` file may give them as well. `progress(share, what)`
    is called while it works.

    Raises UsageError, ModelError, DataError, ProviderError or ResourceError for what their names say, and
    VerificationError if the result cannot be verified; then nothing is written.
    """
    begin = time.perf_counter()
    chosen = Options.make(recipe, **options)
    target = _output_path(model, output)
    io.check_output(target, overwrite=chosen.force)
    for extra in (chosen.json, chosen.report):
        if extra is not None:
            io.check_output(Path(extra), overwrite=chosen.force)
    provider_name(chosen.target)
    job = _Job(model, chosen, progress or (lambda share, what: None))
    job.run_passes()
    job.check_speed()
    job.shrink_weights()
    verification = job.verify_result()
    measured = job.measure()
    saved = job.save(target)
    report = Report(
        original=job.describe(job.source, job.original),
        optimized=job.describe(job.model, saved.path),
        passes=tuple(job.records),
        verification=verification,
        benchmark=measured,
        environment=environment(),
        options={**job.account(), "output": str(target)},
        notes=tuple(dict.fromkeys(job.notes)),
        unmet=(),
        seconds=time.perf_counter() - begin,
    )
    report = replace(report, unmet=_unmet(report, chosen))
    if chosen.json is not None:
        report.save_json(chosen.json, overwrite=chosen.force)
    return report


def _output_path(model: Any, output: str | os.PathLike[str] | None) -> Path:
    if output is not None:
        target = Path(output)
    elif isinstance(model, (str, os.PathLike)):
        path = Path(model)
        target = path.with_name(f"{path.stem}.opt.onnx")
    else:
        raise UsageError("optimize needs an output path when the model is not a file")
    if isinstance(model, (str, os.PathLike)) and target.exists() and Path(model).exists() and target.samefile(model):
        raise UsageError(f"the output {target} is the input itself, which is never modified; choose another with -o")
    return target


@dataclass
class _Job:
    """One optimization: the original, the model as it is now, and what was done to it."""

    given: Any
    options: Options
    progress: Any
    notes: list[str] = field(default_factory=list)
    records: list[PassRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.source = io.load(self.given, allow_symlinks=self.options.allow_symlinks)
        is_file = isinstance(self.given, (str, os.PathLike))
        self.original: Any = Path(self.given) if is_file else self.source.to_bytes()
        self.model = self.source.copy()
        self.float_model = self.model
        self.session = open_session(self.original, threads=self.options.threads)
        self.metric = _metric(self.options.metric)
        self.pipeline = self._pipeline()
        self.calib, self.eval = self._open_data()
        self._feeds: list[dict[str, Any]] | None = None

    # --- data ---

    def _open_data(self) -> tuple[Dataset | None, Dataset | None]:
        """Calibration and verification data. Without data for verification, a fifth of the first is held out."""
        calib = _open(self.options.calib, self.session, self.options)
        evaluation = _open(self.options.eval, self.session, self.options)
        if calib is not None and evaluation is None:
            calib, evaluation = hold_out(calib)
            if evaluation.length == 0:
                evaluation = None
            self.notes.append("one sample in five of the calibration data was held out for verification")
        if calib is None and self.pipeline.passes and self.options.passes is None:
            self.notes.append("no calibration data: int8 quantization was left out; --calib DATA unlocks it")
        return (None if calib is None else limited(calib, self.options.samples)), evaluation

    def feeds(self) -> list[dict[str, Any]]:
        """A few inputs to time the model with: one sample each where the batch can be cut, else synthesized."""
        if self._feeds is None:
            data = self.eval or self.calib
            if data is None:
                proto, _ = export_model(self.source)
                self._feeds = list(usable_inputs(self.session, proto, seed=self.options.seed, count=2))
            else:
                single = limited(data, 4)
                batches = list(itertools.islice(single.batches(), 4))
                self._feeds = [_first_sample(b.feeds, b.count, data) for b in batches]
        return self._feeds

    # --- passes ---

    def _pipeline(self) -> Pipeline:
        if self.options.passes is not None:
            pipeline = Pipeline.parse(self.options.passes)
            if self.options.calib is None and (need := [p.name for p in pipeline.passes if p.needs_data]):
                raise UsageError(f"pass {need[0]!r} needs calibration data; give them with --calib")
            return pipeline
        passes = Pipeline.parse(DEFAULT_PASSES).passes
        return Pipeline(tuple(p for p in passes if not p.needs_data or self.options.calib is not None))

    def run_passes(self) -> None:
        for number, one in enumerate(self.pipeline.passes, 1):
            self._run_pass(one, f"pass {number}/{len(self.pipeline.passes)} {one.name}")

    def _run_pass(self, one: Pass, what: str) -> None:
        """Run one pass on the model, and take it back if what it did does not stand the check."""
        self.progress(0.0, what)
        before = export_model(self.model)
        context = Context(
            data=self.calib,
            target=self.options.target,
            threads=self.options.threads,
            seed=self.options.seed,
            memory=self.options.memory,
            max_drop=self.options.max_drop,
            progress=lambda share, text: self.progress(share, f"{what}: {text}"),
        )
        record = run_pass(one, self.model, context)
        if record.rewrites:
            record = self._check_pass(one, record)
            if record.reverted is not None:
                self.model = import_model(*before)
            elif one.effect == "lossy" and not self._lossy():
                self.float_model = import_model(*before)
        if not self._lossy() and (one.effect != "lossy" or record.reverted is not None):
            self.float_model = self.model
        self.records.append(record)

    def _check_pass(self, one: Pass, record: PassRecord) -> PassRecord:
        """The record with the drop that the pass cost, and the reason why it is taken back, if it is."""
        if not self.options.verify:
            return record
        if one.effect != "lossy":
            found = self._verify(self.model, effect="float", samples=_QUICK)
            failed = found.verdict == "failed"
            return replace(record, reverted=f"it changed results: {found.reasons[0]}") if failed else record
        found = self._verify(self.model, effect="lossy", samples=_VERIFY_LIMIT)
        drop = found.quality.drop if found.quality is not None else None
        reverted = found.reasons[0] if found.verdict == "failed" else None
        return replace(record, drop=drop, reverted=reverted)

    def _verify(self, candidate: Model, *, effect: Any, samples: int) -> Verification:
        return verify(
            self.original,
            candidate,
            self.eval,
            effect=effect,
            max_drop=self.options.max_drop,
            metric=self.metric if effect == "lossy" else None,
            samples=samples,
            exclude=self._calibration_hashes() if self.options.eval is not None else (),
            threads=self.options.threads,
            seed=self.options.seed,
            progress=self.progress,
        )

    def _calibration_hashes(self) -> frozenset[str]:
        """Hashes of the calibration samples, in case the evaluation data hold some of them."""
        if self.calib is None:
            return frozenset()
        if not hasattr(self, "_hashes"):
            self._hashes = frozenset(h for b in self.calib.batches() for h in sample_hashes(b))
        return self._hashes

    # --- judgement ---

    def check_speed(self) -> None:
        """Take lossy passes back if the result is slower than the float model, or larger and not faster."""
        reason = self._not_worth_it()
        if reason is not None:
            for i in self._lossy():
                self.records[i] = replace(self.records[i], reverted=reason)
            self.notes.append(f"{reason}, so 8-bit arithmetic was not kept")
            self.model = self.float_model

    def shrink_weights(self) -> None:
        """Store the weights that are still float as int8, if the passes were left to us: a smaller file, the same
        arithmetic.
        """
        o = self.options
        if o.passes is None and o.goal != "latency" and o.target == "cpu" and self.calib is not None:
            self._run_pass(Quantize(mode="weights"), "weights as int8")

    def _lossy(self) -> list[int]:
        """Places of the lossy passes that are in the model."""
        found = enumerate(self.records)
        return [i for i, r in found if r.effect == "lossy" and r.rewrites and r.reverted is None]

    def _not_worth_it(self) -> str | None:
        """Why the model is no better than the float model, None if it is better or this cannot be said."""
        if not self._lossy() or self.options.goal == "size" or self.options.bench_seconds <= 0:
            return None
        self.progress(0.0, "timing against the float model")
        timed = benchmark(
            [self.float_model, self.model],
            feeds=self.feeds(),
            provider=self.options.target,
            threads=self.options.threads,
            seconds=self.options.bench_seconds / 2,
            seed=self.options.seed,
            progress=self.progress,
        )
        before, after = timed.models
        ratio = after.speedup or 0.0
        if after.verdict == "slower" or (self.options.goal == "latency" and after.verdict != "faster"):
            return f"the result runs at {ratio:.2f}x the speed of the float model on this machine"
        if after.verdict != "faster" and after.file_bytes >= before.file_bytes:
            return f"the file has {after.file_bytes:,} bytes, the float model {before.file_bytes:,}, at no more speed"
        return None

    def verify_result(self) -> Verification | None:
        if not self.options.verify:
            self.notes.append("the result was not verified (--no-verify)")
            return None
        self.progress(0.0, "verifying")
        found = self._verify(self.model, effect="lossy" if self._lossy() else "float", samples=_VERIFY_LIMIT)
        if found.verdict == "failed":
            raise VerificationError(
                f"the optimized model does not do the job of the original: {found.reasons[0]}; nothing was written"
            )
        if found.verdict == "unverified on real data":
            self.notes.append("unverified on real data: give samples with --calib or --eval")
        return found

    def measure(self) -> Benchmark | None:
        if self.options.bench_seconds <= 0:
            return None
        self.progress(0.0, "benchmarking")
        return benchmark(
            [self.original, self.model],
            feeds=self.feeds(),
            provider=self.options.target,
            threads=self.options.threads,
            seconds=self.options.bench_seconds,
            seed=self.options.seed,
            progress=self.progress,
        )

    # --- result ---

    def save(self, target: Path) -> io.Saved:
        self.progress(0.0, "writing")
        return io.save(
            self.model,
            target,
            overwrite=self.options.force,
            external_data=self.options.external_data,
            before_commit=lambda path: _loads(path),
        )

    def describe(self, model: Model, place: Any) -> dict[str, Any]:
        """The `original` / `optimized` object of the report."""
        found = summary(model, feeds=self.feeds()[0])
        if isinstance(place, Path):
            found.update(path=str(place), sha256=io.sha256(place), file_bytes=io.model_bytes(place))
        else:
            found.update(path=None, file_bytes=len(place))
        return found

    def account(self) -> dict[str, Any]:
        """The options that made this result, as plain data."""
        o = self.options
        plain = {k: getattr(o, k) for k in ("target", "max_drop", "goal", "size", "speed", "samples", "seed", "threads")}
        return {
            **plain,
            "passes": str(self.pipeline),
            "calib": None if self.calib is None else self.calib.source,
            "eval": self.eval.source if self.options.eval is not None and self.eval is not None else None,
        }


def _open(source: Any, session: Session, options: Options) -> Dataset | None:
    if source is None:
        return None
    return open_data(source, session.inputs, preprocess=_for_pictures(source, options.preprocess), seed=options.seed)


def _for_pictures(source: Any, preprocess: Any) -> Any:
    """The preprocessing, if `source` is a folder of pictures; the other data set may be in another form."""
    if preprocess is None or not isinstance(source, (str, os.PathLike)) or not Path(source).is_dir():
        return None
    return preprocess if any(p.suffix.lower() in IMAGE_SUFFIXES for p in Path(source).rglob("*")) else None


def _first_sample(feeds: Mapping[str, Any], count: int, data: Dataset) -> dict[str, Any]:
    """A batch of one, if the batch can be cut: latency is measured as edge devices see it, sample by sample."""
    return {k: v[:1] for k, v in feeds.items()} if data._divisible and count > 1 else dict(feeds)


def _metric(metric: Any) -> Metric | None:
    if metric is None or callable(metric):
        return metric
    from onnxcomp.calibration.sources import load_function

    return load_function(str(metric))


def _loads(path: Path) -> None:
    """What was written is read back: the file is whole and ONNX Runtime takes it."""
    open_session(path)


def _unmet(report: Report, options: Options) -> tuple[str, ...]:
    unmet = []
    ratio = report.original["file_bytes"] / max(report.optimized["file_bytes"], 1)
    if options.size is not None and ratio < options.size:
        unmet.append(f"--size {options.size:g}x was asked for, {ratio:.2f}x was reached")
    if options.speed is not None and report.benchmark is not None:
        speed = report.benchmark.models[1].speedup or 0.0
        if speed < options.speed:
            unmet.append(f"--speed {options.speed:g}x was asked for, {speed:.2f}x was reached")
    return tuple(unmet)
