"""Does a candidate still do the job of the original? A comparison on data, and a verdict with its reasons."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcomp import io
from onnxcomp.calibration.data import Batch, Dataset, sample_hashes
from onnxcomp.class_metrics import class_labels
from onnxcomp.errors import DataError, ModelError, ResourceError, UsageError
from onnxcomp.graph import Model
from onnxcomp.interface import interface_changes
from onnxcomp.metrics import Tolerance, measure
from onnxcomp.noise import Noise, flatten, measure_noise, tolerances
from onnxcomp.quality import Metric, is_float, output_roles
from onnxcomp.runtime import Session, open_session
from onnxcomp.serde import export_model
from onnxcomp.storage import DOMAIN, plain
from onnxcomp.synthesis import edge_feeds, usable_inputs
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
    threads: int = 1,
    provider: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> Verification:
    """Compare `candidate` with `original` (paths, bytes, ModelProtos or Models) on `data`.

    `effect` says what the candidate promises: "exact" equal bits with ONNX Runtime's optimizations off
    (signed zeros count as equal); "float" errors within 4 times the original's own noise or the tolerance of
    the float type; "lossy" a quality drop (see Quality) of at most `max_drop`, a fraction. `metric`(outputs,
    labels) -> float, higher is better, replaces the built-in quality and holds all outputs in memory. At most
    `samples` samples are used; those whose hash (sample_hashes) is in `exclude` are left out. Without `data`,
    inputs are made from the graph.

    In every case a changed interface, an output that is missing or of another shape, and a NaN or infinity
    where the original is finite fail. A lossy verdict on fewer than 8 samples, or on outputs that are random
    in the original, is inconclusive.

    Raises ModelError if the original cannot be run, DataError if the data do not fit it, InconclusiveError if
    no inputs can be made up, UsageError for bad options.
    """
    known = effect in ("exact", "float", "lossy")
    if not known or not max_drop >= 0 or (samples is not None and samples < 1):
        raise UsageError(f"cannot verify with effect {effect!r}, max_drop {max_drop!r}, samples {samples!r}")
    original, candidate = _fixed(original), _fixed(candidate)
    proto = _read(original, "original")
    reference, optimize = _open_original(original, effect, threads, provider)
    source = f"inputs synthesized from the graph (seed {seed})" if data is None else data.source
    blank = Verification("failed", effect, source, 0, 0, None, {}, {}, ())
    try:
        session = open_session(candidate, provider=provider, threads=threads, optimize=optimize)
        changes = interface_changes(proto, _read(candidate, "candidate"), (reference.inputs, session.inputs))
    except ModelError as error:
        changes = [f"the candidate cannot be used: {error}"]
    if changes:
        return replace(blank, reasons=tuple(changes))

    batches = _made_up(reference, proto, seed) if data is None else data.batches(None if exclude else samples)
    chosen = _choose(batches, frozenset(exclude), samples, reference)
    first = _some(chosen)
    feeds = [batch.feeds for batch, _ in first if batch is not None]
    floor = tolerances(proto, provider)
    # Exact candidates get no allowance: all that matters is whether the original repeats itself.
    variants = [] if effect == "exact" else _variants(original, optimize, threads, provider)
    noise = _noise(reference, variants, feeds, floor)
    setup = _Setup(reference, session, noise, floor, metric, _reporter(progress, data, samples))
    seen = Evidence()
    _compare(seen, setup, itertools.chain(first, chosen))
    if not seen.failures:
        _compare_edges(seen, setup, next((b for b, _ in first if b is not None), None), effect)
    return judge(blank, seen, noise, metric=metric, max_drop=max_drop, synthetic=data is None)


@dataclass(frozen=True)
class _Setup:
    """The two sessions, what differences are measured against, and whom to tell how many samples are done."""

    original: Session
    candidate: Session
    noise: Noise
    floor: Tolerance
    metric: Metric | None
    report: Callable[[int], None]


def _fixed(model: Any) -> Any:
    """The model in a form that is not made anew for every session; ModelError if there is no such file."""
    if isinstance(model, (str, os.PathLike)) and not os.path.isfile(model):
        raise ModelError(f"there is no model file {os.fspath(model)}")
    try:
        return model.to_bytes() if isinstance(model, Model) else model
    except ResourceError:  # above the 2 GB of one message every session is handed the weights anew
        return model


def _reporter(progress: Progress | None, data: Dataset | None, samples: int | None) -> Callable[[int], None]:
    available = _SYNTHETIC if data is None else data.length
    total = min((n for n in (available, samples) if n is not None), default=None)

    def report(done: int) -> None:
        if progress is not None:
            progress(min(1.0, done / total) if total else 0.0, f"compared {done} samples")

    return report


def _read(model: Any, what: str) -> onnx.ModelProto:
    import onnx

    if isinstance(model, onnx.ModelProto):
        return model
    if isinstance(model, Model):
        return export_model(model)[0]
    try:
        if isinstance(model, bytes):
            return _unpacked(onnx.load_model_from_string(model), None)
        return _unpacked(onnx.load_model(os.fspath(model), load_external_data=False), model)
    except Exception as error:
        raise ModelError(f"the {what} is not a readable ONNX file: {error}") from error


def _unpacked(proto: onnx.ModelProto, path: Any) -> onnx.ModelProto:
    """The structure with packed weights as plain ones: inputs are made up from the constants that they meet."""
    if all(f.domain != DOMAIN for f in proto.functions):
        return proto
    return export_model(plain(io.load(proto if path is None else path)))[0]


def _open_original(original: Any, effect: Effect, threads: int, provider: str) -> tuple[Session, bool]:
    """The original's session, and whether ONNX Runtime optimizes: not for "exact" if it runs without."""
    if effect == "exact":
        try:
            return open_session(original, provider=provider, threads=threads, optimize=False), False
        except ModelError:
            pass  # some operators run only after the optimizer has inserted casts or changed layouts
    return open_session(original, provider=provider, threads=threads), True


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
        part = _cut(batch, rows, session)
        if part is None and keep.all():
            part = batch
        used += part.count if part is not None else 0
        yield part, batch.count if part is None else int(np.count_nonzero(~keep))


def _cut(batch: Batch, rows: npt.NDArray[np.intp], session: Session) -> Batch | None:
    """Some samples of a batch; None if there are none, or if the model's batches cannot be cut."""
    if len(rows) == batch.count:
        return batch
    fixed = any(spec.shape and isinstance(spec.shape[0], int) for spec in session.inputs)
    if fixed or not len(rows) or any(v.shape[:1] != (batch.count,) for v in batch.feeds.values()):
        return None
    labels = None if batch.labels is None else batch.labels[rows]
    return Batch({name: v[rows] for name, v in batch.feeds.items()}, labels, len(rows), batch.origin)


def _some(chosen: Iterator[tuple[Batch | None, int]]) -> list[tuple[Batch | None, int]]:
    """The first batches, up to 16 samples or 4 batches: what the noise floor is measured on."""
    first: list[tuple[Batch | None, int]] = []
    while sum(b.count for b, _ in first if b is not None) < 16 and sum(b is not None for b, _ in first) < 4:
        item = next(chosen, None)
        if item is None:
            break
        first.append(item)
    return first


def _variants(original: Any, optimize: bool, threads: int, provider: str) -> list[Callable[[], Session]]:
    """The original computed in other ways: optimizations the other way round, another number of threads."""
    return [
        lambda: open_session(original, provider=provider, threads=threads, optimize=not optimize),
        lambda: open_session(
            original, provider=provider, threads=2 if threads == 1 else 1, optimize=optimize
        ),
    ]


def _noise(
    reference: Session,
    variants: Sequence[Callable[[], Session]],
    feeds: Sequence[Mapping[str, Array]],
    floor: Tolerance,
) -> Noise:
    try:
        return measure_noise(reference, variants, feeds, floor)
    except Exception as error:
        raise DataError(f"the original does not run on the data: {_line(error)}") from error


def _compare(seen: Evidence, setup: _Setup, chosen: Iterable[tuple[Batch | None, int]]) -> None:
    """Run both models over the batches until the candidate breaks down, and add everything to `seen`."""
    for batch, skipped in chosen:
        seen.excluded += skipped
        if batch is None:
            continue
        sides = _run_both(seen, setup, batch)
        if sides is None:
            return
        ref, cmp = sides
        labels = batch.labels
        if labels is not None and setup.metric is None and class_labels(labels, batch.count) is None:
            seen.notes = [
                f"labels of shape {labels.shape} are not one class per sample, so they were not used"
            ]
        if not seen.roles:
            seen.roles.update(output_roles(ref, batch.count, labels))
        for name, value in ref.items():
            # Sequences may grow from sample to sample: outputs without a role so far.
            role = seen.roles.setdefault(name, "values" if is_float(value) else "discrete")
            allowed = replace(setup.floor, noise=setup.noise.absolute.get(name, 0.0))
            stats = measure(
                role,
                value,
                cmp[name],
                count=batch.count,
                first=seen.samples,
                tolerance=allowed,
                labels=labels,
            )
            seen.stats[name] = seen.stats[name] + stats if name in seen.stats else stats
        if setup.metric is not None:
            seen.kept.append((ref, cmp, labels))
        seen.samples += batch.count
        setup.report(seen.samples)


def _run_both(
    seen: Evidence, setup: _Setup, batch: Batch
) -> tuple[dict[str, Array], dict[str, Array]] | None:
    """Outputs of both models by name; None, with the reason in `seen`, if they cannot be compared."""
    try:
        ref = flatten(setup.original, setup.original.run(batch.feeds))
    except Exception as error:
        raise DataError(f"the original does not run on {batch.origin}: {_line(error)}") from error
    try:
        cmp = flatten(setup.candidate, setup.candidate.run(batch.feeds))
    except Exception as error:
        seen.failures.append(f"the candidate does not run on {batch.origin}: {_line(error)}")
        return None
    for name in dict.fromkeys([*ref, *cmp]):
        before, after = (side[name].shape if name in side else None for side in (ref, cmp))
        if before != after:
            found = "is missing" if after is None else f"has the shape {after}"
            expected = "not there" if before is None else f"{before}"
            seen.failures.append(f"output {name!r} {found} on {batch.origin}, in the original {expected}")
        elif is_float(ref[name]) != is_float(cmp[name]):
            seen.failures.append(f"output {name!r} is {cmp[name].dtype}, in the original {ref[name].dtype}")
    return None if seen.failures else (ref, cmp)


def _compare_edges(seen: Evidence, setup: _Setup, batch: Batch | None, effect: Effect) -> None:
    """Where the original stays finite on unusual versions of one sample, the candidate has to as well."""
    if batch is None:
        return
    feeds = (_cut(batch, np.arange(1), setup.original) or batch).feeds
    for kind, edge in edge_feeds(feeds).items():
        try:
            ref = flatten(setup.original, setup.original.run(edge))
        except Exception:  # the original refuses this input, so nothing is promised for it
            continue
        try:
            cmp = flatten(setup.candidate, setup.candidate.run(edge))
        except Exception as error:
            seen.failures.append(f"the candidate does not run on inputs of kind {kind!r}: {_line(error)}")
            continue
        for name, value in ref.items():
            if name not in cmp or cmp[name].shape != value.shape or not is_float(value):
                continue
            errors = measure("values", value, cmp[name], count=1).errors
            if errors.new_nan or errors.new_inf:
                # Ten times the range of real data is outside what a lossy pass was asked to keep.
                where = seen.notes if effect == "lossy" and kind == "large" else seen.failures
                where.append(
                    f"output {name!r} is not finite on inputs of kind {kind!r}, where the original is"
                )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
