"""Which outputs hold class scores, and the one number that says what a candidate lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from onnxcomp.class_metrics import Z95, class_labels, class_rows, distributions, wilson
from onnxcomp.errors import DataError
from onnxcomp.metrics import OutputStats, Role
from onnxcomp.mixed_outputs import NOISE_PER_DROP, parts

__all__ = ["Metric", "Quality", "custom_quality", "is_float", "load_metric", "output_error", "output_roles", "quality"]

Array = npt.NDArray[Any]
Metric = Callable[[dict[str, Array], Array | None], float]
_NOT_CLASSES = (
    "embed",
    "feature",
    "vector",
    "box",
    "coord",
    "landmark",
    "keypoint",
    "kps",
    "pose",
    "mask",
    "offset",
)


@dataclass(frozen=True)
class Quality:
    """What was lost against the original: `drop` is 0 for nothing, larger is worse.

    accuracy: top-1 of both models on the labels, drop = difference. agreement: share of samples whose top-1
    is the original's, drop = 1 - share. sqnr: drop = noise power / signal power (integers: share of changed
    elements) of the worst output. custom: the user's metric, drop = difference / max(1, |original|), so that
    a drop of 0.01 is a point of a share and a hundredth of a PSNR or of a score in percent.
    `ci` is the 95 % interval of the drop, None for a custom metric; `output` is where it was seen.
    """

    kind: Literal["accuracy", "agreement", "sqnr", "custom"]
    original: float | None
    optimized: float | None
    drop: float
    ci: tuple[float, float] | None
    output: str = ""


def load_metric(metric: Any) -> Metric | None:
    """The user's metric: a function, or the text "package.module:function" or "file.py:function"; None for none.

    Raises UsageError or DataError where there is no such function.
    """
    if metric is None or callable(metric):
        return cast("Metric | None", metric)
    from onnxcomp.calibration.sources import load_function

    return cast(Metric, load_function(str(metric)))


def is_float(array: Array) -> bool:
    """True for floats of any width, bfloat16 and float8 of ml_dtypes included."""
    return array.dtype.kind == "f" or array.dtype.name.startswith(("bfloat", "float"))


def output_roles(outputs: Mapping[str, Array], count: int, labels: Array | None = None) -> dict[str, Role]:
    """What each output of the original is, from its shape and values on `count` samples.

    classes: float [count, C >= 2] or [count, C, 1, ...] that is a distribution (rows >= 0 with sum 1); or is
      the model's only float output, is not named like coordinates or an embedding and has no unit-length
      rows; or is the first of this shape while one class label per sample is given.
    positions: the same test on the vectors of [count, T, C] and [count, C, H, W]; the latter needs C > 4
      unless they are distributions, as three or four channels are a picture. Reported; the quality is the
      SQNR. Outputs with quantities of different units (`mixed_outputs`) have none.
    predictions: integers or strings, one per sample. discrete: all other integers, booleans and strings.
    values: everything else.
    """
    floats = {name: value for name, value in outputs.items() if is_float(value)}
    layouts = {name: _layout(value.shape, count) for name, value in floats.items()}
    labelled = None
    if class_labels(labels, count) is not None:
        labelled = next((name for name, layout in layouts.items() if layout == "classes"), None)
    roles: dict[str, Role] = {}
    for name, value in outputs.items():
        if name not in floats:
            one_each = value.ndim > 0 and value.shape[0] == value.size == count
            roles[name] = "predictions" if one_each and value.dtype.kind != "b" else "discrete"
            continue
        layout = layouts[name]
        scores = name == labelled or (layout is not None and _is_scores(name, value, only=len(floats) == 1))
        roles[name] = layout if scores and layout is not None else "values"
    return roles


def quality(stats: Mapping[str, OutputStats]) -> Quality:
    """The drop of Quality by labels if there are any, else that of the worst output: by its class decisions if they
    tell something, by the noise of all others. The boxes of a detector count beside its classes.
    """
    decided = [(n, s.role, s.classes) for n, s in stats.items() if s.classes is not None and s.classes.rows]
    scores = [(n, c) for n, role, c in decided if role == "classes"]
    votes = [(n, c) for n, role, c in decided if role == "predictions"]
    for name, c in scores + votes:
        if n := c.labelled:
            ci = _paired_interval(c.lost, c.gained, n)
            return Quality("accuracy", c.original / n, c.optimized / n, (c.lost - c.gained) / n, ci, name)
    scores = [(n, c) for n, c in scores if c.telling]
    only_votes = all(s.role in ("predictions", "discrete") for s in stats.values())
    if heads := scores or (votes if only_votes else []):
        name, c = min(heads, key=lambda head: head[1].top1 / head[1].rows)
        low, high = wilson(c.top1, c.rows)
        share = c.top1 / c.rows
        agreement = Quality("agreement", None, share, (c.rows - c.top1) / c.rows, (1 - high, 1 - low), name)
        rest = _noisiest({n: s for n, s in stats.items() if s.role in ("positions", "values", "scores")})
        return max(agreement, rest, key=lambda found: found.drop)
    return _noisiest(stats)


def _noisiest(stats: Mapping[str, OutputStats]) -> Quality:
    """The output with the most noise for its signal."""
    drops = {name: output_error(s) for name, s in stats.items()}
    worst = max(drops, key=lambda name: drops[name], default="")
    floats = worst in stats and stats[worst].role not in ("predictions", "discrete")
    spread = stats[worst].errors.noise_ratio_ci if floats else None
    if spread is not None and stats[worst].role == "scores":
        spread = spread[0] / NOISE_PER_DROP, spread[1] / NOISE_PER_DROP
    return Quality("sqnr", None, None, drops.get(worst, 0.0), spread, worst)


def custom_quality(
    metric: Metric,
    original: Sequence[Mapping[str, Array]],
    optimized: Sequence[Mapping[str, Array]],
    labels: Array | None,
) -> Quality:
    """Quality by metric(outputs, labels) -> float, higher is better, on the outputs of all batches in one
    piece.

    Outputs are concatenated along axis 0, scalars stacked; where shapes change from batch to batch the metric
    gets an object array with one entry per batch. Raises DataError if it fails or gives no finite number.
    """
    values = []
    for batches in (original, optimized):
        try:
            value = float(metric({k: _concatenate([b[k] for b in batches]) for k in batches[0]}, labels))
        except Exception as error:
            raise DataError(
                f"the metric failed on the model's outputs: {type(error).__name__}: {error}"
            ) from error
        if not math.isfinite(value):
            raise DataError(f"the metric gave {value} instead of a finite number")
        values.append(value)
    before, after = values
    return Quality("custom", before, after, (before - after) / max(1.0, abs(before)), None)


def _layout(shape: tuple[int, ...], count: int) -> Literal["classes", "positions"] | None:
    if len(shape) < 2 or shape[0] != count or 0 in shape:
        return None
    if all(d == 1 for d in shape[2:]):
        return "classes" if shape[1] >= 2 else None
    return "positions" if shape[2 if len(shape) == 3 else 1] >= 2 else None


def _is_scores(name: str, value: Array, only: bool) -> bool:
    rows = class_rows(value)
    if distributions(rows).all():
        return True
    picture = value.ndim >= 4 and value.shape[1] <= 4 and value.size > value.shape[0] * value.shape[1]
    unit_length = bool((np.abs((rows * rows).sum(axis=1) - 1) < 1e-3).all())
    named = any(w in name.lower() for w in _NOT_CLASSES)
    return only and not (picture or unit_length or named or parts(value))


def _paired_interval(lost: int, gained: int, n: int) -> tuple[float, float]:
    """95 % interval of (lost - gained) / n over paired samples: adjusted Wald, Agresti and Min 2005."""
    difference = lost - gained
    half = Z95 * math.sqrt(lost + gained + 1 - difference**2 / (n + 2)) / (n + 2)
    return max(-1.0, difference / (n + 2) - half), min(1.0, difference / (n + 2) + half)


def output_error(stats: OutputStats) -> float:
    """Noise power over signal power of one output; of integers and strings the share of changed elements.

    Noise on scores that stand beside other quantities counts a third, as decisions are made of them.
    """
    if stats.role in ("predictions", "discrete"):
        return stats.errors.unequal / max(1, stats.errors.elements)
    return stats.errors.noise_ratio / (NOISE_PER_DROP if stats.role == "scores" else 1)


def _concatenate(parts: Sequence[Array]) -> Array:
    if parts[0].ndim and len({p.shape[1:] for p in parts}) == 1:
        return np.concatenate(parts, axis=0)
    if len({p.shape for p in parts}) == 1:
        return np.stack(parts)
    batches = np.empty(len(parts), dtype=object)
    for index, part in enumerate(parts):
        batches[index] = part
    return batches
