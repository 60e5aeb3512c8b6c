"""`optimize`: run a pipeline on a model, prove that the result does the same job, measure it, write it.

After each pass the model is compared with the original: a lossless pass that changes results, and a lossy pass that
costs more than the budget, is taken back, and the report says so. What is written at last is the best model that was
verified; if 8-bit arithmetic turns out slower than optimized float on this machine, that is the float model.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnxcomp import io
from onnxcomp.bench import Benchmark
from onnxcomp.environment import environment
from onnxcomp.errors import ProviderError, UsageError, VerificationError
from onnxcomp.follow_ups import follow_up, undo_slow
from onnxcomp.job import Job
from onnxcomp.layer_table import layer_table
from onnxcomp.layer_values import look_inside
from onnxcomp.layers import places
from onnxcomp.node_times import attributed
from onnxcomp.options import Options
from onnxcomp.report import Report
from onnxcomp.rival import compare_with_quantization
from onnxcomp.runtime import provider_name
from onnxcomp.storage import plain
from onnxcomp.verdict import Verification

__all__ = ["optimize"]


def optimize(
    model: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    recipe: str | os.PathLike[str] | None = None,
    progress: Any = None,
    command: str | None = None,
    **options: Any,
) -> Report:
    """Optimize a model and write the result.

    `model` is a path or a ModelProto; `output` the path to write, `MODEL.opt.onnx` beside the model by default.
    `options` are those of `onnxcomp.options.Options`; a `recipe` file may give them as well. `progress(share, what)`
    is called while it works. `command` is what the report says to do the same again, by default this call.

    Raises UsageError, ModelError, DataError, ProviderError or ResourceError for what their names say, and
    VerificationError if the verification fails; then no model is written, and only the JSON and HTML files tell why.
    """
    begin = time.perf_counter()
    again = command if command is not None else _call(model, output, recipe, options)
    chosen = Options.make(recipe, output=output, **options)
    target = _output_path(model, chosen.output)
    if not chosen.dry_run:
        io.check_output(target, overwrite=chosen.force)
    _check_extras(chosen, target, model)
    _check_provider(chosen)
    job = Job(model, chosen, progress or (lambda share, what: None))
    job.run_passes()
    done = _Done() if chosen.dry_run else _finish(job, target)
    report = Report(
        original=job.describe(job.source, job.original),
        optimized=job.describe(job.model, done.path),
        passes=tuple(job.records),
        verification=done.verification,
        benchmark=done.benchmark,
        environment=environment(),
        options={**job.account(), "output": str(target)},
        notes=tuple(dict.fromkeys(job.notes)),
        candidates=job.gate.tried.to_json(),
        command=again,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **_layers(job, done.benchmark),
    )
    unmet = () if chosen.dry_run else _unmet(report, chosen)
    report = replace(report, unmet=unmet, seconds=time.perf_counter() - begin)
    _save(report, chosen)
    if done.failed is not None:
        raise VerificationError(
            f"the optimized model does not do the job of the original: {done.failed}; no model was written"
        )
    return report


@dataclass(frozen=True)
class _Done:
    """What became of the model that the passes left: nothing of it in a dry run."""

    verification: Verification | None = None
    benchmark: Benchmark | None = None
    path: Path | None = None

    @property
    def failed(self) -> str | None:
        """Why the verification failed, if it did."""
        found = self.verification
        return found.reasons[0] if found is not None and found.verdict == "failed" else None


def _finish(job: Job, target: Path) -> _Done:
    """Verify, time and write the result, after what is tried besides the pipeline. A failed result is not written."""
    job.check_speed()
    follow_up(job)
    job.pack_again()
    done = _Done(job.verify_result())
    if done.failed is None and (timed := job.measure()) is not None and undo_slow(job, timed):
        done = _Done(job.verify_result())
    if done.failed is not None:
        return done
    measured = job.measure()
    if measured is not None:
        compare_with_quantization(job)
    return replace(done, benchmark=measured, path=job.save(target).path)


def _save(report: Report, options: Options) -> None:
    if options.json is not None:
        report.save_json(options.json, overwrite=options.force)
    if options.report is not None:
        report.save_html(options.report, overwrite=options.force)


def _layers(job: Job, measured: Benchmark | None) -> dict[str, Any]:
    """What the report says layer by layer: `layers`, `layers_omitted`, `histograms`."""
    source, result = ((m, places(m, *job.count(m))) for m in (plain(job.source), plain(job.model)))
    reference = plain(job.reference())
    before = places(reference, *job.count(reference))
    job.progress(0.0, "comparing layers")
    inside = look_inside(
        reference, result[0], (before, result[1]), job.samples.feeds, threads=job.options.threads
    )
    nodes = ((), ()) if measured is None else (measured.models[0].nodes, measured.models[1].nodes)
    rows, omitted = layer_table(
        source[1],
        result[1],
        original_times=attributed(source[0], [p.node for p in source[1]], nodes[0]),
        optimized_times=attributed(result[0], [p.node for p in result[1]], nodes[1]),
        errors=inside.errors,
    )
    return {"layers": tuple(rows), "layers_omitted": omitted, "histograms": tuple(inside.histograms)}


def _output_path(model: Any, output: str | os.PathLike[str] | None) -> Path:
    if output is not None:
        target = Path(output)
    elif isinstance(model, (str, os.PathLike)):
        path = Path(model)
        target = path.parent / f"{path.stem}.opt.onnx"
    else:
        raise UsageError("optimize needs an output path when the model is not a file")
    if isinstance(model, (str, os.PathLike)) and target.exists() and Path(model).exists() and target.samefile(model):
        raise UsageError(f"the output {target} is the input itself, which is never modified; choose another with -o")
    return target


def _check_provider(options: Options) -> None:
    """A model for a provider that is not here can be made and verified, but not measured."""
    if options.bench_seconds <= 0:
        return
    try:
        provider_name(options.target)
    except ProviderError as error:
        raise ProviderError(f"{error}; or build here without measuring the speed: --bench-seconds 0") from error


def _check_extras(options: Options, target: Path, model: Any) -> None:
    """A report must not overwrite what is read, the model that is written, nor the other report."""
    taken = [target, *(Path(v) for v in (model, options.calib, options.eval) if isinstance(v, (str, os.PathLike)))]
    for extra in (options.json, options.report):
        if extra is None:
            continue
        if any(os.path.realpath(extra) == os.path.realpath(path) for path in taken):
            raise UsageError(f"{extra} cannot hold a report and something else; choose another name for one of them")
        io.check_output(Path(extra), overwrite=options.force)
        taken.append(Path(extra))


def _call(model: Any, output: Any, recipe: Any, options: Mapping[str, Any]) -> str:
    """The call of `optimize` as Python has it; what is no plain value by its type."""
    given = {"recipe": recipe, **options}
    words = [_literal(model), *([] if output is None else [_literal(output)])]
    words += [f"{key}={_literal(value)}" for key, value in given.items() if value is not None]
    return f"onnxcomp.optimize({', '.join(words)})"


def _literal(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        return repr(os.fspath(value))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_literal, value))}]"
    return repr(value) if isinstance(value, (bool, int, float)) else f"<{type(value).__name__}>"


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
