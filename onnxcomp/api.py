"""`verify` and `benchmark` as the command line has them: paths and data in any form go in."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnxcomp import bench, io
from onnxcomp import verification as comparison
from onnxcomp.calibration.data import Dataset, open_data
from onnxcomp.errors import UsageError
from onnxcomp.options import share
from onnxcomp.probe import probe
from onnxcomp.quality import load_metric
from onnxcomp.runtime import Session, open_session
from onnxcomp.serde import export_model
from onnxcomp.synthesis import usable_inputs
from onnxcomp.verdict import Verification

__all__ = ["benchmark", "verify"]


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
    batch: int | None = None,
    provider: str = "cpu",
    threads: int = 1,
    seconds: float = 10.0,
    seed: int = 0,
    allow_symlinks: bool = False,
    progress: Any = None,
) -> bench.Benchmark:
    """Time models side by side; the first is the baseline. Without `data`, inputs are made from its graph.

    `batch` is the number of samples per run where the model leaves it open, 1 by default.
    """
    if not models:
        raise UsageError("benchmark needs at least one model")
    if batch is not None and batch < 1:
        raise UsageError(f"batch is {batch}; it must be at least 1")
    for model in models:
        _scan(model, allow_symlinks=allow_symlinks)
    session = open_session(models[0], threads=threads, provider=provider)
    if data is not None:
        dataset = open_data(data, session.inputs, preprocess=preprocess, batch=batch or 1, seed=seed)
        feeds: Sequence[Any] = [b.feeds for b in itertools.islice(dataset.batches(), 4)]
    else:
        proto, _ = export_model(io.load(models[0], allow_symlinks=allow_symlinks))
        feeds = [_stacked(f, session, batch or 1) for f in usable_inputs(session, proto, seed=seed, count=2)]
    return bench.benchmark(
        list(models), feeds=feeds, provider=provider, threads=threads, seconds=seconds, seed=seed, progress=progress
    )


def _stacked(feeds: Mapping[str, Any], session: Session, batch: int) -> dict[str, Any]:
    """A batch of equal samples. Raises UsageError where the model fixes the size of a batch."""
    if batch == 1:
        return dict(feeds)
    for spec in session.inputs:
        if not spec.shape or isinstance(spec.shape[0], int):
            raise UsageError(f"batch is {batch}, but input {spec.name!r} of shape {spec.shape} leaves no batch open")
    return {name: np.concatenate([value] * batch) for name, value in feeds.items()}


def _scan(model: Any, *, allow_symlinks: bool) -> None:
    """Files are scanned, and tried in a child process, before native code sees them here."""
    if isinstance(model, (str, os.PathLike)):
        probe(model, allow_symlinks=allow_symlinks)
