"""One optimization while it runs: the model as it is, what was done to it, and the checks after each step."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from onnxcomp import io
from onnxcomp.bench import Benchmark, ModelTiming, benchmark
from onnxcomp.errors import UsageError, VerificationError
from onnxcomp.graph import Constant, Model
from onnxcomp.inspection import summary
from onnxcomp.manager import Context, Pass, PassRecord, Pipeline, run_pass
from onnxcomp.options import DEFAULT_PASSES, Options
from onnxcomp.probe import probe
from onnxcomp.quality import Metric
from onnxcomp.registry import load_pass
from onnxcomp.runtime import PROVIDERS, open_session
from onnxcomp.samples import Samples
from onnxcomp.serde import export_model, import_model
from onnxcomp.verdict import Effect, Verification
from onnxcomp.verification import verify

__all__ = ["Job"]

_QUICK = 16  # samples of the check after a lossless pass
_VERIFY_LIMIT = 2048  # samples of the check after a lossy pass, and of the last one
_GAIN = 1.03  # times as fast as float that 8-bit arithmetic has to be, if the choice is ours
_WORTH_DYNAMIC = 1 << 16  # weights of products and LSTMs from which dynamic int8 is tried
_WORTH_STORING = 0.05  # share of float weights in the file from which storing them as int8 is tried


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
        self.model = self.source.copy()
        self.float_model = self.model
        self.metric = _metric(options.metric)
        self.pipeline = _pipeline(options)
        session = open_session(self.original, threads=options.threads)
        self.samples = Samples(options, session, self.source)
        self.notes = list(self.samples.notes)
        if options.target != "cpu" and options.bench_seconds <= 0:
            provider = PROVIDERS[options.target]
            self.notes.append(f"verified on the CPU provider; speed on {provider} was not measured")
        if options.calib is None and options.passes is None and options.target != "cuda":
            self.notes.append("no calibration data: int8 quantization was left out; --calib DATA unlocks it")
        self.records: list[PassRecord] = []
        self._verified: Verification | None = None  # of the model as it is now
        self._timed: Benchmark | None = None  # likewise, against the original

    # --- passes ---

    def run_passes(self) -> None:
        """Run the pipeline. Lossless passes are checked together, and one by one only if that check fails."""
        if not self._run_pipeline(each=False):
            self.model, self.records = self.source.copy(), []
            self.float_model = self.model
            self._run_pipeline(each=True)

    def _run_pipeline(self, *, each: bool) -> bool:
        """False, and stopped, if lossless passes that were not checked one by one (`each`) changed results."""
        unchecked = False
        for number, one in enumerate(self.pipeline.passes, 1):
            if one.effect == "lossy" and unchecked and not self._lossless_is_fine():
                return False
            record = self._run_pass(one, f"pass {number}/{len(self.pipeline.passes)} {one.name}", check=each)
            unchecked = one.effect != "lossy" and (unchecked or (record.rewrites > 0 and not each))
        return not unchecked or self._lossless_is_fine()

    def _lossless_is_fine(self) -> bool:
        if not self.options.verify:
            return True
        lossy = bool(self._lossy())
        found = self._verify(effect="lossy" if lossy else "float", samples=_VERIFY_LIMIT if lossy else _QUICK)
        return found.verdict != "failed"

    def _run_pass(self, one: Pass, what: str, *, check: bool = True) -> PassRecord:
        """Run one pass on the model, and take it back if what it did does not stand the check.

        Lossy passes are always checked, others if `check` is set.
        """
        self.progress(0.0, what)
        before = export_model(self.model)
        record = run_pass(one, self.model, self._context(what))
        if record.rewrites:
            verified = None
            if check or one.effect == "lossy":
                record, verified = self._check_pass(one, record)
            if record.reverted is not None:
                self.model = import_model(*before)
            else:
                self._verified, self._timed = verified, None
                if one.effect != "lossy":
                    self.float_model = self.model
                elif not self._lossy():
                    self.float_model = import_model(*before)
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
            progress=lambda share, text: self.progress(share, f"{what}: {text}"),
        )

    def _check_pass(self, one: Pass, record: PassRecord) -> tuple[PassRecord, Verification | None]:
        """The record with the drop that the pass cost, and the reason why it is taken back, if it is.

        The full check of a lossy pass is that of the result as well, if nothing follows.
        """
        if not self.options.verify:
            return record, None
        if one.effect != "lossy":
            found = self._verify(effect="float", samples=_QUICK)
            failed = found.verdict == "failed"
            return replace(record, reverted=f"it changed results: {found.reasons[0]}" if failed else None), None
        found = self._verify(effect="lossy", samples=_VERIFY_LIMIT)
        drop = found.quality.drop if found.quality is not None else None
        reverted = found.reasons[0] if found.verdict == "failed" else None
        return replace(record, drop=drop, reverted=reverted), found

    def _verify(self, *, effect: Effect, samples: int) -> Verification:
        return verify(
            self.original,
            self.model,
            self.samples.verification,
            effect=effect,
            max_drop=self.options.max_drop,
            metric=self.metric if effect == "lossy" else None,
            samples=samples,
            exclude=self.samples.calibration_hashes,
            threads=self.options.threads,
            seed=self.options.seed,
            progress=self.progress,
        )

    def _lossy(self) -> list[int]:
        """Places of the lossy passes that are in the model."""
        found = enumerate(self.records)
        return [i for i, r in found if r.effect == "lossy" and r.rewrites and r.reverted is None]

    # --- speed ---

    def check_speed(self) -> None:
        """Take lossy passes back if the result is slower than the float model, or larger and not faster.

        Left to us, 8-bit arithmetic has to gain time: the smaller file comes without it as well (see
        `shrink_weights`), and closer to the original.
        """
        if not self._lossy() or self.options.goal == "size":
            return
        ours = self.options.passes is None or self.options.goal == "latency"
        reason = self._no_progress(self.float_model, self.model, least=_GAIN if ours else 0.0)
        if reason is not None:
            for i in self._lossy():
                self.records[i] = replace(self.records[i], reverted=reason)
            what = "16-bit" if self.options.target == "cuda" else "static 8-bit"
            self.notes.append(f"{what} arithmetic was not kept: {reason}")
            self.model, self._verified = self.float_model, None

    def try_dynamic(self) -> None:
        """Let large products and LSTMs that are still float quantize their inputs in each run, if that is faster."""
        o = self.options
        if o.passes is not None or o.goal == "size" or o.target != "cpu" or self.samples.calibration is None:
            return
        if _dynamic_weights(self.model) >= _WORTH_DYNAMIC and o.bench_seconds > 0:
            self._keep_if_progress({"mode": "dynamic"}, "dynamic int8", least=_GAIN)

    def shrink_weights(self) -> None:
        """Store the weights that are still float as int8, if the passes were left to us: a smaller file, the same
        arithmetic.
        """
        o = self.options
        if o.passes is not None or o.goal == "latency" or o.target != "cpu" or self.samples.calibration is None:
            return
        if _float_bytes(self.model) < _WORTH_STORING * _all_bytes(self.model):
            return
        self._keep_if_progress({"mode": "weights"}, "weights as int8")

    def _keep_if_progress(self, options: dict[str, str], what: str, least: float = 0.0) -> None:
        """Run `quantize` with `options`, and take it back if it is no progress; `least` as for `_no_progress`."""
        before, verified, timed = self.model.copy(), self._verified, self._timed
        float_model = self.float_model
        record = self._run_pass(load_pass("quantize").parse(options), what)
        if record.reverted is None and record.rewrites:
            reason = self._no_progress(before, self.model, least)
            if reason is not None:
                self.records[-1] = replace(record, reverted=reason)
                self.model, self._verified, self._timed = before, verified, timed
                self.float_model = float_model

    def _no_progress(self, old: Model, new: Model, least: float = 0.0) -> str | None:
        """Why `new` is no progress over `old`: slower, less than `least` times as fast, or larger and not faster.

        None if it is progress. The original is timed along, so that the winner need not be timed again.
        """
        if self.options.bench_seconds <= 0:
            return None
        found = self._benchmark([self.original, old, new])
        original, before, after = found.models
        ratio = (after.speedup or 1.0) / (before.speedup or 1.0)
        # The same kernels do the same work: what differs then is the machine's mood.
        slower = ratio < 1 / (1 + max(found.noise_floor, 0.01)) and _kernels(before) != _kernels(after)
        reason = None
        if slower or ratio < least:
            reason = f"it runs at {ratio:.2f}x the speed of the model before, on this machine"
        elif ratio < _GAIN and after.file_bytes >= before.file_bytes:
            reason = f"its file has {after.file_bytes:,} bytes, {before.file_bytes:,} before, and it is no faster"
        self._timed = replace(found, models=(original, after if reason is None else before))
        return reason

    def _benchmark(self, models: list[Any]) -> Benchmark:
        self.progress(0.0, "timing")
        return benchmark(
            models,
            feeds=self.samples.feeds,
            provider=self.options.target,
            threads=self.options.threads,
            seconds=self.options.bench_seconds,
            seed=self.options.seed,
            progress=self.progress,
        )

    # --- result ---

    def verify_result(self) -> Verification | None:
        """The verification of the model as it is. Raises VerificationError if it fails."""
        if not self.options.verify:
            self.notes.append("the result was not verified (--no-verify)")
            return None
        if self._verified is None:
            self.progress(0.0, "verifying")
            self._verified = self._verify(effect="lossy" if self._lossy() else "float", samples=_VERIFY_LIMIT)
        found = self._verified
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
        return self._timed or self._benchmark([self.original, self.model])

    def save(self, target: Path) -> io.Saved:
        """Write the model; what was written is read back by ONNX Runtime before it takes the place of `target`."""
        self.progress(0.0, "writing")
        return io.save(
            self.model,
            target,
            overwrite=self.options.force,
            external_data=self.options.external_data,
            before_commit=_loads,
        )

    def describe(self, model: Model, place: Any) -> dict[str, Any]:
        """The `original` / `optimized` object of the report."""
        found = summary(model, feeds=self.samples.feeds[0])
        if isinstance(place, Path):
            found.update(path=str(place), sha256=io.sha256(place), file_bytes=io.model_bytes(place))
        else:
            found.update(path=None, file_bytes=len(place))
        return found

    def account(self) -> dict[str, Any]:
        """The options that made this result, as plain data."""
        o = self.options
        plain = ("target", "max_drop", "goal", "size", "speed", "samples", "seed", "threads")
        data = self.samples
        return {
            **{k: getattr(o, k) for k in plain},
            "passes": str(self.pipeline),
            "calib": None if data.calibration is None else data.calibration.source,
            "eval": data.verification.source if o.eval is not None and data.verification is not None else None,
        }


def _pipeline(options: Options) -> Pipeline:
    if options.passes is not None:
        pipeline = Pipeline.parse(options.passes)
        need = [p.name for p in pipeline.passes if p.needs_data]
        if options.calib is None and need:
            raise UsageError(f"pass {need[0]!r} needs calibration data; give them with --calib")
        return pipeline
    passes = Pipeline.parse(DEFAULT_PASSES[options.target]).passes
    return Pipeline(tuple(p for p in passes if not p.needs_data or options.calib is not None))


def _metric(metric: Any) -> Metric | None:
    if metric is None or callable(metric):
        return cast("Metric | None", metric)
    from onnxcomp.calibration.sources import load_function

    return cast(Metric, load_function(str(metric)))


def _loads(path: Path) -> None:
    open_session(path)


def _kernels(timed: ModelTiming) -> dict[tuple[str, str], float]:
    return {(k.provider, k.op): k.count for k in timed.kernels}


def _constants(model: Model) -> list[Constant]:
    return [i for s in model.graph.scopes() for i in s.initializers if isinstance(i, Constant)]


def _float_bytes(model: Model) -> int:
    return sum(c.weight.nbytes for c in _constants(model) if c.dtype.kind == "f" and len(c.shape) >= 2)


def _dynamic_weights(model: Model) -> int:
    """Float weights of products and LSTMs, which dynamic int8 could take."""
    readers = ("MatMul", "Gemm", "LSTM")
    found = (c for c in _constants(model) if c.dtype.kind == "f" and len(c.shape) >= 2)
    return sum(c.weight.size for c in found if any(n.op in readers for n in c.outputs))


def _all_bytes(model: Model) -> int:
    return sum(c.weight.nbytes for c in _constants(model))
