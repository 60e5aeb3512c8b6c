"""`verify`, `benchmark` and `write_report` as the command line has them: paths and data in any form go in."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxcomp import bench, io
from onnxcomp import verification as comparison
from onnxcomp.bench_grid import compare, settings
from onnxcomp.bench_inputs import data_feeds, made_feeds, parse_shapes, require_same_inputs
from onnxcomp.bench_results import Comparison
from onnxcomp.calibration.data import Dataset, open_data
from onnxcomp.errors import UsageError
from onnxcomp.options import share
from onnxcomp.probe import probe
from onnxcomp.quality import load_metric
from onnxcomp.runtime import open_session
from onnxcomp.serde import export_model
from onnxcomp.storage import plain
from onnxcomp.synthesis import usable_inputs
from onnxcomp.verdict import Verification

__all__ = ["benchmark", "verify", "write_report"]


def verify(
    original: Any,
    candidate: Any,
    data: Any = None,
    *,
    preprocess: Any = None,
    max_drop: Any = 0.01,
    metric: Any = None,
    samples: int | None = None,
    threads: int = 1,
    provider: str = "cpu",
    seed: int = 0,
    layers: bool = False,
    allow_symlinks: bool = False,
    progress: Any = None,
) -> Verification:
    """Compare two models on `data` (any form of `open_data`), or on inputs made from the graph.

    Returns the verdict; `raise_if_failed()` turns a bad one into an error. See `onnxcomp.verification.verify`. With
    `layers` every layer is compared as well: see `onnxcomp.layerwise.compare_layers`.
    """
    for model in (original, candidate):
        _scan(model, allow_symlinks=allow_symlinks)
    dataset = None
    if data is not None:
        session = open_session(original, threads=threads, provider=provider)
        dataset = open_data(data, session.inputs, preprocess=preprocess, seed=seed)
    found = comparison.verify(
        original,
        candidate,
        dataset,
        max_drop=share(max_drop, "max_drop"),
        metric=load_metric(metric),
        samples=samples,
        threads=threads,
        provider=provider,
        seed=seed,
        progress=progress,
    )
    return replace(found, layers=_layers(original, candidate, dataset, seed, threads, progress)) if layers else found


def _layers(original: Any, candidate: Any, data: Dataset | None, seed: int, threads: int, progress: Any) -> Any:
    from onnxcomp.layerwise import compare_layers

    before, after = io.load(original), io.load(candidate)
    if data is None:
        session = open_session(before, threads=threads)
        feeds = usable_inputs(session, export_model(before)[0], seed=seed, count=8)
        data = open_data(list(feeds), session.inputs)
    return compare_layers(before, after, data, threads=threads, progress=progress)


def benchmark(
    *models: Any,
    data: Any = None,
    preprocess: Any = None,
    shapes: Any = None,
    batch: Any = None,
    provider: Any = "cpu",
    threads: Any = 1,
    streams: Any = 1,
    seconds: float = 10.0,
    precision: Any = 0.01,
    seed: int = 0,
    allow_fallback: bool = False,
    allow_symlinks: bool = False,
    progress: Any = None,
) -> Comparison:
    """Time models side by side in one or several settings; the first model is the baseline in each.

    `provider`, `threads`, `streams` and `batch` are one value or several (a list, or a text with commas); every
    combination is a setting, timed for `seconds` unless ±`precision` is reached before. Without `data`, inputs are
    made from the first model's graph, with `shapes` ({"input": (1, 3, 224, 224)} or "input=1x3x224x224") and `batch`
    samples where it leaves them open. See `onnxcomp.bench.benchmark`.
    """
    if not models:
        raise UsageError("benchmark needs at least one model")
    fixed = parse_shapes(shapes)
    if fixed and data is not None:
        raise UsageError("--shape is for inputs that are made up; the data have shapes of their own")
    grid = settings(provider, threads, streams, batch)
    for model in models:
        _scan(model, allow_symlinks=allow_symlinks)
    labels = [os.fspath(m) if isinstance(m, (str, os.PathLike)) else f"model {i}" for i, m in enumerate(models, 1)]
    protos = [export_model(plain(io.load(model, allow_symlinks=allow_symlinks)))[0] for model in models]
    require_same_inputs(list(zip(labels, protos, strict=True)))
    session = open_session(models[0])
    feeds: dict[int | None, bench.Feeds] = {}
    for size in dict.fromkeys(one.batch for one in grid):
        if data is not None:
            feeds[size] = data_feeds(data, session, preprocess=preprocess, batch=size, seed=seed)
        else:
            feeds[size] = made_feeds(session, protos[0], shapes=fixed, batch=size, seed=seed)
    del session, protos  # their memory is not what is measured, but it would be missing
    return compare(
        list(models),
        grid,
        feeds,
        seconds=seconds,
        precision=share(precision, "precision"),
        seed=seed,
        allow_fallback=allow_fallback,
        progress=progress,
    )


def write_report(
    source: str | os.PathLike[str], output: str | os.PathLike[str] | None = None, *, force: bool = False
) -> Path:
    """Make the HTML report from the JSON that `optimize` wrote; returns its path, by default `source` with .html.

    Raises RejectedError if `source` is not such a file, UsageError if the output exists and `force` is not set.
    """
    from onnxcomp.html_report import read_report, render

    target = Path(source).with_suffix(".html") if output is None else Path(output)
    if os.path.realpath(target) == os.path.realpath(source):
        raise UsageError(f"the output {target} is the JSON file itself; choose another with -o")
    report = read_report(Path(source))
    io.check_output(target, overwrite=force)
    io.save_text(render(report), target, overwrite=force)
    return target


def _scan(model: Any, *, allow_symlinks: bool) -> None:
    """Files are scanned, and tried in a child process, before native code sees them here."""
    if isinstance(model, (str, os.PathLike)):
        probe(model, allow_symlinks=allow_symlinks)
