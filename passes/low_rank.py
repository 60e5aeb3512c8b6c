"""Two factors for one weight, closest in what they give, not in themselves.

With the weight as W [P S, O], rows (p, s), and the second moment H of what multiplies it, the first operator maps the
P values to r for each s, the second the r S results to the outputs:

    outputs   P = C kh kw, S = 1       kh x kw convolution to r channels, then 1 x 1; the two factors of a matrix
    inputs    P = C, S = kh kw         1 x 1 to r channels, then kh x kw
    spatial   P = C kh, S = kw         kh x 1 to r channels, then 1 x kw

A is the truncated SVD whitened by R = mean over s of H[(., s), (., s)] = L L^T (for S = 1 the best there is),

    L^T W [P, S O] = U Sigma V^T,     A = L^-T U_r

and the second factor the least squares solution for this A,  B = (T^T H T)^-1 T^T H W  with  T = A (x) I_S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Scheme", "Split", "inner"]

Array = npt.NDArray[Any]
Scheme = Literal["outputs", "inputs", "spatial"]
_DAMPING = 1e-6  # of the mean diagonal


def inner(scheme: Scheme, kernel: tuple[int, ...]) -> int:
    """S: kernel positions that are left to the second operator."""
    if scheme == "outputs":
        return 1
    return int(np.prod(kernel)) if scheme == "inputs" else kernel[-1]


@dataclass(frozen=True)
class Split:
    """All ranks of one scheme for one weight: `basis` is A at full rank [P, rank], `values` are the singular values."""

    scheme: Scheme
    weight: Array
    moment: Array
    steps: int
    basis: Array
    values: Array

    @classmethod
    def of(cls, weight: Array, moment: Array, scheme: Scheme, kernel: tuple[int, ...]) -> Split:
        """`weight` [K, O] and `moment` [K, K], float64."""
        steps = inner(scheme, kernel)
        length = len(weight)
        # Products in single precision leave errors of the trace's last digit, of either sign.
        least = max(_DAMPING / length, float(np.finfo(np.float32).eps)) * np.trace(moment) + 1e-12
        damped = moment + np.eye(length) * least
        outer = length // steps
        whitening = np.einsum("psqs->pq", damped.reshape(outer, steps, outer, steps)) / steps
        factor = np.linalg.cholesky(whitening)
        left, values, _ = np.linalg.svd(factor.T @ weight.reshape(outer, -1), full_matrices=False)
        return cls(scheme, weight, damped, steps, np.linalg.solve(factor.T, left), values)

    @property
    def rank(self) -> int:
        """The full rank, at which nothing is lost."""
        return len(self.values)

    def lost(self, rank: int) -> float:
        """Share of the squared singular values behind `rank`: the predicted error, relative to the output's power."""
        squares = np.square(self.values)
        return float(squares[rank:].sum() / max(float(squares.sum()), 1e-30))

    def factors(self, rank: int) -> tuple[Array, Array]:
        """A [P, rank] and B [rank S, O]."""
        first = self.basis[:, :rank]
        spread = np.kron(first, np.eye(self.steps))
        block = spread.T @ self.moment @ spread
        block += np.eye(len(block)) * (1e-10 * np.trace(block) / len(block) + 1e-30)
        second = np.linalg.solve(block, spread.T @ (self.moment @ self.weight))
        # Both factors of about the same size, so that neither loses precision in a narrow type.
        scale = np.sqrt(max(float(np.abs(second).max()), 1e-30) / max(float(np.abs(first).max()), 1e-30))
        return first * scale, second / scale

    def product(self, first: Array, second: Array) -> Array:
        """The weight that the two make, [K, O]."""
        return np.asarray(np.kron(first, np.eye(self.steps)) @ second)

    def error(self, product: Array) -> float:
        """Squared error of the outputs relative to their power."""
        difference = product - self.weight
        power = float(np.einsum("ko,ko->", self.weight, self.moment @ self.weight))
        return float(np.einsum("ko,ko->", difference, self.moment @ difference)) / max(power, 1e-30)
