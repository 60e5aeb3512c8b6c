"""Class decisions of two models compared: agreement, accuracy, divergence, and intervals of shares."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import DataError

__all__ = [
    "Z95",
    "ClassStats",
    "class_labels",
    "class_rows",
    "compare_decisions",
    "compare_scores",
    "distributions",
    "wilson",
]

Array = npt.NDArray[Any]
Float = npt.NDArray[np.float64]

_FEW = 8  # decisions that may be equal by chance
Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class ClassStats:
    """Counts over class decisions: one per sample, or one per position of a sequence or segmentation map.

    `top5` counts decisions where the original's class is among the candidate's five best. `hard_flips` are
    changed decisions that the original took by more than twice its own noise. `kl` is the sum of
    KL(original || candidate) in nats. `first` and `last` are the lowest and highest class that the original
    decided for, `distributions` counts its rows that are probabilities. With labels: `original` and `optimized`
    count right answers, `lost` and `gained` those that changed.
    """

    classes: int = 0
    rows: int = 0
    top1: int = 0
    top5: int = 0
    hard_flips: int = 0
    kl: float = 0.0
    first: int = sys.maxsize
    last: int = -1
    distributions: int = 0
    labelled: int = 0
    original: int = 0
    optimized: int = 0
    lost: int = 0
    gained: int = 0

    def __add__(self, other: ClassStats) -> ClassStats:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        extremes = {
            "classes": max(self.classes, other.classes),
            "first": min(self.first, other.first),
            "last": max(self.last, other.last),
        }
        return ClassStats(**{**sums, **extremes})

    @property
    def telling(self) -> bool:
        """Whether agreement says something: several values of which the same one is always largest may be no classes.

        Probabilities always are, and so are fewer decisions than 8.
        """
        return self.rows < _FEW or self.first != self.last or self.distributions == self.rows

    def to_json(self) -> dict[str, Any]:
        """Shares with their 95 % Wilson intervals."""
        n, labelled = self.rows, self.labelled
        out: dict[str, Any] = {"top1_agreement": self.top1 / n, "top1_agreement_ci": wilson(self.top1, n)}
        if self.classes > 5:
            out["top5_agreement"] = self.top5 / n
        if self.classes:
            out |= {"hard_flips": self.hard_flips, "kl": self.kl / n}
        if labelled:
            for name, right in (("original", self.original), ("optimized", self.optimized)):
                out |= {f"{name}_accuracy": right / labelled, f"{name}_accuracy_ci": wilson(right, labelled)}
        return out


def compare_decisions(ref: Array, cmp: Array, labels: Array | None) -> ClassStats:
    """Decisions [N] of both models, on one label per decision if there are any."""
    agree = int(np.count_nonzero(ref == cmp))
    if labels is None:
        return ClassStats(rows=len(ref), top1=agree)
    before, after = (np.asarray(x == labels, dtype=bool) for x in (ref, cmp))
    return ClassStats(
        rows=len(ref),
        top1=agree,
        labelled=len(labels),
        original=int(before.sum()),
        optimized=int(after.sum()),
        lost=int((before & ~after).sum()),
        gained=int((after & ~before).sum()),
    )


def compare_scores(a: Float, b: Float, labels: Array | None, noise: float) -> ClassStats:
    """Class scores [N, C] of the original and the candidate; `noise` is the original's own deviation.

    Raises DataError when a label is not the position of a class.
    """
    rows, classes = a.shape
    if labels is not None:
        _check_labels(labels, classes)
    a, b = (np.nan_to_num(x, nan=-np.inf, posinf=np.inf, neginf=-np.inf) for x in (a, b))
    every, ours, theirs = np.arange(rows), a.argmax(axis=1), b.argmax(axis=1)
    with np.errstate(invalid="ignore"):
        hard = (ours != theirs) & (a[every, ours] - a[every, theirs] > 2 * noise)
    better = np.count_nonzero(b > b[every, ours][:, None], axis=1)
    scores = ClassStats(
        classes=classes,
        top5=int(np.count_nonzero(better < 5)),
        hard_flips=int(hard.sum()),
        kl=_kl_divergence(a, b),
        first=int(ours.min(initial=sys.maxsize)),
        last=int(ours.max(initial=-1)),
        distributions=int(np.count_nonzero(distributions(a))),
    )
    return scores + compare_decisions(ours, theirs, labels)


def class_labels(labels: Array | None, count: int) -> Array | None:
    """Labels as a vector of `count` class numbers or names; None if they are not one class per sample."""
    if labels is None or labels.size != count:
        return None
    flat = labels.reshape(-1)
    if flat.dtype.kind == "f":
        return flat.astype(np.int64) if bool(np.all(flat == np.round(flat))) else None
    return flat if flat.dtype.kind in "iubOUS" else None


def class_rows(array: Array) -> Float:
    """Class scores as float64 [decisions, classes]: axis 1 holds the classes, the last axis at rank 3.

    [N, C], [N, C, 1] and [N, C, 1, 1] -> [N, C]; [N, T, C] -> [N*T, C]; [N, C, H, W] -> [N*H*W, C].
    """
    scores = array.astype(np.float64)
    if scores.ndim == 3 and scores.shape[2] > 1:
        return scores.reshape(-1, scores.shape[2])
    return np.moveaxis(scores, 1, -1).reshape(-1, scores.shape[1])


def distributions(rows: Float) -> npt.NDArray[np.bool_]:
    """Which rows [N, C] are probability distributions: not negative, sum 1 (to 1e-3, what float16 keeps)."""
    sums: Float = rows.sum(axis=1)
    return np.logical_and((rows >= 0).all(axis=1), np.abs(sums - 1) < 1e-3)


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a share (E. B. Wilson 1927), 95 % by default; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At the ends the formula gives 0 and 1 only up to rounding.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def _check_labels(labels: Array, classes: int) -> None:
    if labels.dtype.kind not in "iub":
        raise DataError(
            f"labels are {labels.dtype}, but the model gives scores: labels have to be class numbers"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(
            f"labels reach from {labels.min()} to {labels.max()}, but the model has {classes} classes; "
            "a label is the position of its class in the output, counted from 0"
        )


def _kl_divergence(a: Float, b: Float) -> float:
    """Sum over rows of KL(p || q) in nats.

    p and q are the rows themselves where the original's is a distribution, else their softmax; probabilities
    are floored at 1e-12.
    """
    ready = distributions(a)[:, None]
    with np.errstate(invalid="ignore", over="ignore"):
        p, q = (np.where(ready, np.maximum(x, 0), np.exp(x - x.max(axis=1, keepdims=True))) for x in (a, b))
        p, q = (np.maximum(x / x.sum(axis=1, keepdims=True), 1e-12) for x in (p, q))
        return float(np.nansum(p * np.log(p / q)))
