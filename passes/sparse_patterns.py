"""Which weights may be zero together: single ones, N of M neighbours, blocks.

A weight is seen as the matrix [groups, K, outputs] that multiplies the vectors of `gram.py`, K running over (channel
in group, kernel position). Neighbours are input channels at the same kernel position, as the sparse kernels of GPUs
want them:

    unstructured   any weights
    2:4            of each 4 consecutive input channels of an output, at most 2 are not zero
    4x1, 1x8       blocks of 4 outputs and 1 input channel, of 1 output and 8 input channels: kept or zero as a whole

`held_zeros` is how later passes see what was pruned, and keep it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import UsageError

__all__ = ["Pattern", "held_zeros"]

Array = npt.NDArray[Any]
_FEW = 0.25  # share of zeros from which they are taken to be there on purpose


def held_zeros(values: Array) -> Array | None:
    """Where a deliberately sparse weight is zero (a quarter of it or more): bool, its shape; None if it is dense."""
    zero = np.asarray(values == 0)
    return zero if zero.size and np.count_nonzero(zero) >= _FEW * zero.size else None


@dataclass(frozen=True)
class Pattern:
    """`outputs` x `channels` weights are decided together; `kept` of them stay where it is an N:M pattern, else 0."""

    outputs: int = 1
    channels: int = 1
    kept: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises UsageError for a text that is none of the three forms."""
        if text == "unstructured":
            return cls()
        if match := re.fullmatch(r"(\d{1,3}):(\d{1,3})", text):
            kept, of = int(match[1]), int(match[2])
            if 0 < kept < of:
                return cls(1, of, kept)
        elif match := re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,2})", text):
            return cls(int(match[1]), int(match[2]))
        raise UsageError(f"pattern is {text!r}; it can be unstructured, N:M such as 2:4, or a block such as 4x1")

    def __str__(self) -> str:
        if self.kept:
            return f"{self.kept}:{self.channels}"
        return "unstructured" if self.outputs * self.channels == 1 else f"{self.outputs}x{self.channels}"

    @property
    def fixed(self) -> float | None:
        """The sparsity of an N:M pattern, None where any sparsity can be chosen."""
        return 1 - self.kept / self.channels if self.kept else None

    def misfit(self, outputs: int, channels: int) -> str | None:
        """Why a weight with so many outputs and input channels per group cannot have the pattern, None if it can."""
        if self.kept and channels % self.channels:
            return f"its {channels} input channels are no multiple of {self.channels}"
        if channels < self.channels:
            return f"a block takes {self.channels} input channels, it has {channels}"
        if outputs < self.outputs:
            return f"a block takes {self.outputs} outputs, it has {outputs}"
        return None

    def choose(self, scores: Array, taps: int, sparsity: float) -> Array:
        """The mask (bool, true: stays) that keeps the largest sum of `scores` [groups, K, outputs] >= 0.

        `taps` is the number of kernel positions. An N:M pattern has its own sparsity.
        """
        if self.outputs * self.channels == 1:
            return _largest(scores, round((1 - sparsity) * scores.size))
        blocks, weights = self._blocks(scores, taps)
        if self.kept:
            order = np.argsort(-blocks, axis=-1, kind="stable")
            mask = np.zeros(blocks.shape, bool)
            np.put_along_axis(mask, order[..., : self.kept], True, axis=-1)
        else:
            means = blocks.sum(axis=-1) / weights.sum(axis=-1)
            kept = _largest(means, round((1 - sparsity) * means.size))
            mask = np.broadcast_to(kept[..., None], blocks.shape)
        return self._unblocked(mask, scores.shape, taps)

    def _blocks(self, scores: Array, taps: int) -> tuple[Array, Array]:
        """Scores as [groups, taps, channel blocks, output blocks, members], and 1 where a member is no padding."""
        groups, length, outputs = scores.shape
        shape = self._padded(scores.shape, taps)
        found = []
        for values in (scores, np.ones_like(scores)):
            padded = np.zeros(shape, scores.dtype)
            padded[:, : length // taps, :, :outputs] = values.reshape(groups, -1, taps, outputs)
            split = padded.reshape(
                groups, shape[1] // self.channels, self.channels, taps, shape[3] // self.outputs, self.outputs
            )
            together = split.transpose(0, 3, 1, 4, 2, 5)
            found.append(together.reshape(*together.shape[:4], -1))
        return found[0], found[1]

    def _unblocked(self, mask: Array, shape: tuple[int, ...], taps: int) -> Array:
        _, length, outputs = shape
        split = mask.reshape(*mask.shape[:4], self.channels, self.outputs).transpose(0, 2, 4, 1, 3, 5)
        whole = split.reshape(self._padded(shape, taps))[:, : length // taps, :, :outputs]
        return np.ascontiguousarray(whole).reshape(shape)

    def _padded(self, shape: tuple[int, ...], taps: int) -> tuple[int, int, int, int]:
        groups, length, outputs = shape
        channels = -(-(length // taps) // self.channels) * self.channels
        return groups, channels, taps, -(-outputs // self.outputs) * self.outputs


def _largest(scores: Array, count: int) -> Array:
    """True for the `count` largest entries; the first of equal ones."""
    flat = scores.reshape(-1)
    if count <= 0 or count >= flat.size:
        return np.full(scores.shape, count > 0)
    least = np.partition(flat, flat.size - count)[flat.size - count]
    mask = np.asarray(flat > least)
    equal = np.flatnonzero(flat == least)
    mask[equal[: count - np.count_nonzero(mask)]] = True
    return mask.reshape(scores.shape)
