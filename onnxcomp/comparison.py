"""Two models side by side over batches and unusual inputs: what is seen goes into the evidence for the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcomp.blame import Clock
from onnxcomp.calibration.data import Batch
from onnxcomp.class_metrics import class_labels
from onnxcomp.edges import DEGENERATE, edge_feeds, made_up_feeds, resized
from onnxcomp.errors import DataError
from onnxcomp.metrics import ErrorStats, Tolerance, measure
from onnxcomp.mixed_outputs import Part, parts
from onnxcomp.noise import Noise, flatten, measure_noise
from onnxcomp.quality import Metric, is_float, output_roles
from onnxcomp.runtime import Session
from onnxcomp.verdict import Effect, Evidence

if TYPE_CHECKING:
    import onnx

__all__ = ["Pair", "compare", "compare_edges", "compare_runs", "cut", "line"]

Array = npt.NDArray[Any]
Variants = Sequence[Callable[[], Session]]
_EDGE_SECONDS = 20.0  # for unusual inputs: a model that takes seconds for each is not run on all of them


@dataclass(frozen=True)
class Pair:
    """The two sessions, what differences are measured against, and whom to tell how many samples are done.

    `variants` open the original under other options; `empty` are its open dimensions that may be 0.
    """

    original: Session
    candidate: Session
    effect: Effect
    noise: Noise
    floor: Tolerance
    variants: Variants
    metric: Metric | None
    report: Callable[[int], None]
    empty: frozenset[str] = frozenset()

    def allowed(self, output: str, noise: Noise | None = None) -> Tolerance:
        return replace(self.floor, noise=(noise or self.noise).absolute.get(output, 0.0))


def compare(seen: Evidence, pair: Pair, chosen: Iterable[tuple[Batch | None, int]]) -> None:
    """Run both models over the batches until the candidate breaks down, and add everything to `seen`."""
    for batch, skipped in chosen:
        seen.excluded += skipped
        if batch is None:
            continue
        sides = _run_both(seen, pair, batch)
        if sides is None:
            return
        ref, cmp = sides
        labels = batch.labels
        if labels is not None and pair.metric is None and class_labels(labels, batch.count) is None:
            seen.notes = [
                f"labels of shape {labels.shape} are not one class per sample, so they were not used"
            ]
        if not seen.roles:
            seen.roles.update(output_roles(ref, batch.count, labels))
            seen.parts.update(_parts(ref, pair) if pair.effect == "lossy" else {})
        for name, value in ref.items():
            # Sequences may grow from sample to sample: outputs without a role so far.
            role = seen.roles.setdefault(name, "values" if is_float(value) else "discrete")
            allowed = pair.allowed(name)
            one = measure(
                role, value, cmp[name], count=batch.count, first=seen.samples, tolerance=allowed, labels=labels
            )
            seen.add(name, one)
            for part in seen.parts.get(name, ()):
                role = "scores" if part.kind == "scores" else "values"
                before, after = part.take(value), part.take(cmp[name])
                one = measure(role, before, after, count=batch.count, first=seen.samples)
                seen.add(f"{name} ({part.kind})", one)
        if pair.metric is not None:
            seen.kept.append((ref, cmp, labels))
        seen.samples += batch.count
        pair.report(seen.samples)


def _parts(outputs: Mapping[str, Array], pair: Pair) -> dict[str, list[Part]]:
    """The quantities of different units in each output that has any and is not random."""
    stable = {name: v for name, v in outputs.items() if is_float(v) and name not in pair.noise.random}
    return {name: found for name, value in stable.items() if (found := parts(value))}


def _run_both(seen: Evidence, pair: Pair, batch: Batch) -> tuple[dict[str, Array], dict[str, Array]] | None:
    """Outputs of both models by name; None, with the reason in `seen`, if they cannot be compared."""
    try:
        ref = flatten(pair.original, pair.original.run(batch.feeds))
    except Exception as error:
        raise DataError(f"the original does not run on {batch.origin}: {line(error)}") from error
    try:
        cmp = flatten(pair.candidate, pair.candidate.run(batch.feeds))
    except Exception as error:
        seen.failures.append(f"the candidate does not run on {batch.origin}: {line(error)}")
        return None
    found = _mismatches(ref, cmp, f"on {batch.origin}")
    seen.failures += found
    return None if found else (ref, cmp)


def _mismatches(ref: Mapping[str, Array], cmp: Mapping[str, Array], where: str) -> list[str]:
    """Outputs that are missing, new, or of another shape or kind."""
    found = []
    for name in dict.fromkeys([*ref, *cmp]):
        before, after = (side[name].shape if name in side else None for side in (ref, cmp))
        if before != after:
            now = "is missing" if after is None else f"has the shape {after}"
            expected = "not there" if before is None else f"{before}"
            found.append(f"output {name!r} {now} {where}, in the original {expected}")
        elif is_float(ref[name]) != is_float(cmp[name]):
            found.append(f"output {name!r} is {cmp[name].dtype}, in the original {ref[name].dtype}")
    return found


def compare_runs(seen: Evidence, pair: Pair, batch: Batch | None) -> None:
    """Two equal runs of the candidate have to agree as well as those of the original do."""
    if batch is None:
        return
    again = measure_noise(pair.candidate, [], [batch.feeds], pair.floor)
    for name in again.random:
        if name not in pair.noise.random:
            seen.failures.append(f"output {name!r} of the candidate changes between two equal runs")


def compare_edges(seen: Evidence, pair: Pair, proto: onnx.ModelProto, batch: Batch | None, seed: int) -> None:
    """What the original does on unusual versions of one sample, the candidate has to do as well.

    It has to run, and to give outputs of the same shapes that are finite where the original's are; a lossless one has
    to give the same values, except where ties decide (`DEGENERATE`). Inputs that the original refuses do not count.
    """
    if batch is None:
        return
    feeds = (cut(batch, np.arange(1), pair.original) or batch).feeds
    inputs = pair.original.inputs
    edges = edge_feeds(feeds) | made_up_feeds(feeds, inputs, proto, seed) | resized(feeds, inputs)
    edges |= {k: f for k, f in resized(feeds, inputs, (0,)).items() if k in pair.empty}
    clock = Clock(_EDGE_SECONDS)
    for number, (kind, edge) in enumerate(edges.items()):
        if clock.up:
            seen.notes.append(f"{len(edges) - number} of {len(edges)} kinds of unusual inputs were not tried: too slow")
            return
        try:
            ref = flatten(pair.original, pair.original.run(edge))
        except Exception:  # the original refuses this input, so nothing is promised for it
            continue
        try:
            cmp = flatten(pair.candidate, pair.candidate.run(edge))
        except Exception as error:
            seen.failures.append(f"the candidate does not run on inputs of kind {kind!r}: {line(error)}")
            continue
        wrong = _mismatches(ref, cmp, f"on inputs of kind {kind!r}")
        seen.failures += wrong
        for name in ref if not wrong else ():
            _judge_edge(seen, pair, kind, name, edge, ref[name], cmp[name])


def _judge_edge(
    seen: Evidence, pair: Pair, kind: str, name: str, edge: Mapping[str, Array], ref: Array, cmp: Array
) -> None:
    exact, lossy = pair.effect == "exact", pair.effect == "lossy"
    if not is_float(ref):
        if exact and not np.array_equal(ref, cmp) and name not in pair.noise.random:
            seen.failures.append(f"output {name!r} differs on inputs of kind {kind!r}")
        return
    errors = measure("values", ref, cmp, count=1, tolerance=pair.allowed(name)).errors
    if errors.new_nan or errors.new_inf:
        # Ten times the range of real data is outside what a lossy pass was asked to keep.
        where = seen.notes if lossy and kind == "large" else seen.failures
        where.append(f"output {name!r} is not finite on inputs of kind {kind!r}, where the original is")
    elif exact and errors.unequal and name not in pair.noise.random:
        seen.failures.append(f"output {name!r} differs on inputs of kind {kind!r}")
    elif not lossy and kind not in DEGENERATE and _beyond(pair, name, edge, ref, cmp, errors):
        seen.failures.append(
            f"output {name!r} is off by up to {errors.max_abs:.3g} on inputs of kind {kind!r}, more than the "
            "original's own noise there"
        )


def _beyond(
    pair: Pair, name: str, edge: Mapping[str, Array], ref: Array, cmp: Array, errors: ErrorStats
) -> bool:
    """Whether the error is more than noise, measured for this input if the noise on real data does not explain it."""
    if errors.excess <= 1:
        return False
    own = measure_noise(pair.original, pair.variants, [edge], pair.floor)
    if name in own.random:
        return False
    return measure("values", ref, cmp, count=1, tolerance=pair.allowed(name, own)).errors.excess > 1


def cut(batch: Batch, rows: npt.NDArray[np.intp], session: Session) -> Batch | None:
    """Some samples of a batch; None if there are none, or if the model's batches cannot be cut."""
    if len(rows) == batch.count:
        return batch
    fixed = any(spec.shape and isinstance(spec.shape[0], int) for spec in session.inputs)
    if fixed or not len(rows) or any(v.shape[:1] != (batch.count,) for v in batch.feeds.values()):
        return None
    labels = None if batch.labels is None else batch.labels[rows]
    return Batch({name: v[rows] for name, v in batch.feeds.items()}, labels, len(rows), batch.origin)


def line(error: Exception) -> str:
    """The words of an error on one line."""
    return " ".join(str(error).split())[:300]
