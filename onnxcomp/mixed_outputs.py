"""Outputs that hold quantities of different units, as the boxes and the scores of a detector in one array.

YOLO's [samples, 4 + classes, anchors] has pixels beside probabilities. The power of the whole is that of the pixels, so
that noise on the scores, which decide what is found, does not show in it. Such quantities are compared each by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["NOISE_PER_DROP", "Part", "parts"]

Array = npt.NDArray[Any]
Kind = Literal["large", "scores", "other"]
NOISE_PER_DROP = 3.0  # noise power on scores, relative, for each unit of drop: 15 dB for 1 %, from the zoo
_ENOUGH = 64  # values that tell what a quantity is
_LARGER = 30.0  # how much larger the smallest quantity of another unit is


@dataclass(frozen=True)
class Part:
    """The quantities `indices` along `axis` of an output: those that are large, scores within 0 and 1, or others."""

    kind: Kind
    axis: int
    indices: tuple[int, ...]

    @property
    def weight(self) -> float:
        """What noise power / signal power counts: decisions are made of scores, and bear more noise than they."""
        return 1 / NOISE_PER_DROP if self.kind == "scores" else 1.0

    def take(self, value: Array) -> Array:
        """The part of the output, which has its rank."""
        return np.take(value, self.indices, axis=self.axis)


def parts(value: Array) -> list[Part]:
    """The parts of a float output of rank 3: large quantities, scores, and others if there are any.

    They are told apart by their size (root of the mean square) over at least 64 values: each large one is more than 30
    times as large as all that are not. Empty where nothing is that much larger, or no scores are beside it.
    """
    if value.ndim != 3 or not np.isfinite(value).all():
        return []
    for axis in (1, 2):
        if value.size >= _ENOUGH * value.shape[axis] > _ENOUGH and (found := _along(value, axis)):
            return found
    return []


def _along(value: Array, axis: int) -> list[Part]:
    rows = np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1).astype(np.float64)
    sizes = np.sqrt(np.square(rows).mean(axis=1))
    order = np.argsort(-sizes, kind="stable")
    falls = np.flatnonzero(sizes[order[:-1]] > _LARGER * sizes[order[1:]])
    if not falls.size:
        return []
    large = np.zeros(len(sizes), np.bool_)
    large[order[: falls[0] + 1]] = True
    scores = ~large & ((rows >= 0) & (rows <= 1)).all(axis=1)
    if not sizes[scores].any() or np.abs(rows[large]).max(axis=1).min() <= 1:
        return []
    kinds: list[tuple[Kind, Array]] = [("large", large), ("scores", scores), ("other", ~large & ~scores)]
    return [Part(kind, axis, tuple(np.flatnonzero(k).tolist())) for kind, k in kinds if k.any()]
