"""Ridge regression from moments that add up over batches, for each group of an operator's channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Sums", "solve"]

Array = npt.NDArray[Any]


@dataclass
class Sums:
    """Moments of inputs x and targets y: sums over rows of x x^T, x y^T, y y^T (diagonal), x, y."""

    xx: Array
    xy: Array
    yy: Array
    x: Array
    y: Array
    rows: int = 0

    @classmethod
    def empty(cls, groups: int, length: int, outputs: int) -> Sums:
        return cls(
            np.zeros((groups, length, length)), np.zeros((groups, length, outputs)), np.zeros((groups, outputs)),
            np.zeros((groups, length)), np.zeros((groups, outputs)),
        )  # fmt: skip

    def add(self, x: Array, y: Array) -> None:
        """x: [groups, rows, K], y: [groups, rows, O], float32; products of one batch are exact enough in float32."""
        self.xx += np.matmul(x.transpose(0, 2, 1), x)
        self.xy += np.matmul(x.transpose(0, 2, 1), y)
        self.yy += np.square(y, dtype=np.float64).sum(axis=1)
        self.x += x.sum(axis=1, dtype=np.float64)
        self.y += y.sum(axis=1, dtype=np.float64)
        self.rows += x.shape[1]

    def plus(self, other: Sums) -> Sums:
        return Sums(
            self.xx + other.xx, self.xy + other.xy, self.yy + other.yy, self.x + other.x, self.y + other.y,
            self.rows + other.rows,
        )  # fmt: skip

    def moments(self, *, centered: bool) -> tuple[Array, Array, Array]:
        """E[x x^T], E[x y^T], E[y^2], about the means if `centered`."""
        n = max(self.rows, 1)
        xx, xy, yy = self.xx / n, self.xy / n, self.yy / n
        if centered:
            mx, my = self.x / n, self.y / n
            xx, xy, yy = xx - mx[:, :, None] * mx[:, None, :], xy - mx[:, :, None] * my[:, None, :], yy - np.square(my)
        return xx, xy, yy


def solve(block: Array, right: Array, ridge: float) -> Array:
    """(block + ridge * mean diagonal * I)^-1 right, for each group."""
    damping = ridge * np.einsum("gkk->g", block) / block.shape[1] + 1e-12
    return np.linalg.solve(block + damping[:, None, None] * np.eye(block.shape[1]), right)
