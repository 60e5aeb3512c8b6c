"""`optimize`: run a pipeline on a model, prove that the result does the same job, measure it, write it.

After each pass the model is compared with the original: a lossless pass that changes results, and a lossy pass that
costs more than the budget, is taken back, and the report says so. What is written at last is the best model that was
verified; if 8-bit arithmetic turns out slower than optimized float on this machine, that is the float model.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxcomp import io
from onnxcomp.environment import environment
from onnxcomp.errors import ProviderError, UsageError
from onnxcomp.job import Job
from onnxcomp.options import Options
from onnxcomp.report import Report
from onnxcomp.runtime import provider_name

__all__ = ["optimize"]


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
    chosen = Options.make(recipe, output=output, **options)
    target = _output_path(model, chosen.output)
    io.check_output(target, overwrite=chosen.force)
    if chosen.json is not None:
        _check_distinct(Path(chosen.json), target, model)
        io.check_output(Path(chosen.json), overwrite=chosen.force)
    _check_provider(chosen)
    job = Job(model, chosen, progress or (lambda share, what: None))
    job.run_passes()
    job.check_speed()
    job.try_dynamic()
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


def _check_distinct(extra: Path, target: Path, model: Any) -> None:
    """A report must not overwrite the model that was given, nor the one that is written."""
    taken = [target, *([Path(model)] if isinstance(model, (str, os.PathLike)) else [])]
    if any(os.path.realpath(extra) == os.path.realpath(path) for path in taken):
        raise UsageError(f"{extra} cannot hold a model and a report; choose another name for one of them")


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
