"""Does a candidate still do the job of the original? A comparison on data, and a verdict with its reasons."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.data import Batch, Dataset, sample_hashes
from onnxcomp.comparison import Pair, compare, compare_edges, compare_runs, cut, line
from onnxcomp.edges import empty_axes
from onnxcomp.errors import DataError, ModelError, UsageError
from onnxcomp.interface import interface_changes
from onnxcomp.noise import Noise
from onnxcomp.quality import Metric
from onnxcomp.reference import Reference, fixed, read_proto
from onnxcomp.runtime import Session, open_session
from onnxcomp.synthesis import usable_inputs
from onnxcomp.verdict import Effect, Evidence, Verdict, Verification, judge

if TYPE_CHECKING:
    import onnx

__all__ = ["Effect", "Verdict", "Verification", "verify"]

Array = npt.NDArray[Any]
Progress = Callable[[float, str], None]

_SYNTHETIC = 8  # inputs made up when there are no data


def verify(
    original: Any,
    candidate: Any,
    data: Dataset | None = None,
    *,
    effect: Effect = "lossy",
    max_drop: float = 0.01,
    metric: Metric | None = None,
    samples: int | None = None,
    exclude: Collection[str] = (),
    edges: bool = True,
    threads: int = 1,
    provider: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> Verification:
    """Compare `candidate` with `original` (paths, bytes, ModelProtos or Models) on `data`.

    The original can be a Reference, which runs once for many candidates; then its threads and provider count.

    `effect` says what the candidate promises: "exact" equal bits with ONNX Runtime's optimizations off
    (signed zeros count as equal); "float" errors within 4 times the original's own noise or the tolerance of
    the float type; "lossy" a quality drop (see Quality) of at most `max_drop`, a fraction. `metric`(outputs,
    labels) -> float, higher is better, replaces the built-in quality and holds all outputs in memory. At most
    `samples` samples are used; those whose hash (sample_hashes) is in `exclude` are left out. Without `data`,
    inputs are made from the graph. Without `edges` only the data are compared.

    In every case a changed interface, an output that is missing or of another shape, a NaN or infinity where
    the original is finite, and results that change between two equal runs fail; on the data, and on unusual
    versions of one sample (edges.py). A lossy verdict on fewer than 8 samples, or on outputs that are
    random in the original, is inconclusive.

    Raises ModelError if the original cannot be run, DataError if the data do not fit it, InconclusiveError if
    no inputs can be made up, UsageError for bad options.
    """
    if effect not in ("exact", "float", "lossy") or not max_drop >= 0 or (samples is not None and samples < 1):
        raise UsageError(f"cannot verify with effect {effect!r}, max_drop {max_drop!r}, samples {samples!r}")
    side = original if isinstance(original, Reference) else Reference(original, threads=threads, provider=provider)
    candidate, proto = fixed(candidate), side.proto
    optimize = _opened(side, effect)
    reference = side.session(optimize=optimize)
    source = f"inputs synthesized from the graph (seed {seed})" if data is None else data.source
    blank = Verification("failed", effect, source, 0, 0, None, {}, {}, ())
    session, changes = _open_candidate(candidate, proto, reference, optimize)
    if session is None or changes:
        return replace(blank, reasons=tuple(changes))
    batches = _made_up(reference, proto, seed) if data is None else data.batches(None if exclude else samples)
    chosen = _choose(batches, frozenset(exclude), samples, reference)
    first = _some(chosen)
    one = next((batch for batch, _ in first if batch is not None), None)
    noise = _noise(side, first, effect, optimize)
    on_disk = edges and isinstance(side.model, (str, os.PathLike))
    pair = Pair(
        reference, session, effect, noise, side.floor, side.variants(optimize=optimize), metric,
        _reporter(progress, data, samples), empty_axes(side.model, reference.inputs) if on_disk else frozenset(),
    )  # fmt: skip
    seen = Evidence()
    compare(seen, pair, itertools.chain(first, chosen))
    if not seen.failures and edges:
        compare_runs(seen, pair, one)
        compare_edges(seen, pair, proto, one, seed)
    return judge(blank, seen, noise, metric=metric, max_drop=max_drop, synthetic=data is None)


def _noise(side: Reference, first: list[tuple[Batch | None, int]], effect: Effect, optimize: bool) -> Noise:
    """What of the original is random. Exact candidates get no allowance: it only matters whether it repeats itself."""
    feeds = [batch.feeds for batch, _ in first if batch is not None]
    try:
        return side.noise(feeds, optimize=optimize, vary=effect != "exact")
    except Exception as error:
        raise DataError(f"the original does not run on the data: {line(error)}") from error


def _reporter(progress: Progress | None, data: Dataset | None, samples: int | None) -> Callable[[int], None]:
    available = _SYNTHETIC if data is None else data.length
    total = min((n for n in (available, samples) if n is not None), default=None)

    def report(done: int) -> None:
        if progress is not None:
            progress(min(1.0, done / total) if total else 0.0, f"compared {done} samples")

    return report


def _opened(side: Reference, effect: Effect) -> bool:
    """Whether ONNX Runtime optimizes the original: not for "exact" if it runs without."""
    if effect == "exact":
        try:
            side.session(optimize=False)
            return False
        except ModelError:
            pass  # some operators run only after the optimizer has inserted casts or changed layouts
    side.session(optimize=True)
    return True


def _open_candidate(
    candidate: Any, proto: onnx.ModelProto, reference: Session, optimize: bool
) -> tuple[Session | None, list[str]]:
    """The candidate's session under the options of the original's, and what is wrong with its interface."""
    try:
        session = open_session(
            candidate, provider=reference.provider, threads=reference.threads, optimize=optimize
        )
        sides = (reference.inputs, session.inputs)
        return session, interface_changes(proto, read_proto(candidate, "candidate"), sides)
    except ModelError as error:
        return None, [f"the candidate cannot be used: {error}"]


def _made_up(session: Session, proto: onnx.ModelProto, seed: int) -> Iterator[Batch]:
    for index, feeds in enumerate(usable_inputs(session, proto, seed=seed, count=_SYNTHETIC)):
        yield Batch(feeds, None, 1, f"synthesized input {index}")


def _choose(
    batches: Iterable[Batch], exclude: frozenset[str], limit: int | None, session: Session
) -> Iterator[tuple[Batch | None, int]]:
    """Batches without the excluded samples, each with how many were left out; None where nothing is left.

    A batch that cannot be cut and holds an excluded sample is left out as a whole.
    """
    used = 0
    for batch in batches:
        if limit is not None and used >= limit:
            return
        keep = np.ones(batch.count, dtype=np.bool_)
        if exclude:
            keep = np.array([h not in exclude for h in sample_hashes(batch)], dtype=np.bool_)
        rows = np.flatnonzero(keep)[: None if limit is None else limit - used]
        part = cut(batch, rows, session)
        if part is None and keep.all():
            part = batch
        used += part.count if part is not None else 0
        yield part, batch.count if part is None else int(np.count_nonzero(~keep))


def _some(chosen: Iterator[tuple[Batch | None, int]]) -> list[tuple[Batch | None, int]]:
    """The first batches, up to 16 samples or 4 batches: what the noise floor is measured on."""
    first: list[tuple[Batch | None, int]] = []
    while sum(b.count for b, _ in first if b is not None) < 16 and sum(b is not None for b, _ in first) < 4:
        item = next(chosen, None)
        if item is None:
            break
        first.append(item)
    return first
