"""Which weights of one operator go, and what the others become, from second moments alone.

For y = x W + b the squared error of a weight W against targets t, with x and t about their means (or not, where no
bias can take up the mean), is a quadratic form,

    E |x W - t|^2 = tr(W^T H W) - 2 tr(G^T W) + P,     H = E[x^T x],  G = E[x^T t],  P = E|t|^2

with G = H W_0 where the targets are the operator's own outputs. Masks:

    magnitude   the largest w^2
    wanda       the largest w^2 H_jj (Sun et al., arXiv:2306.11695)
    obs         column by column, the largest w^2 / [H^-1]_jj with the rest updated after each column (SparseGPT:
                Frantar and Alistarh, arXiv:2301.00774)
    admm        minimum of the form over all masks, approximately, by splitting W from its sparse copy D (ALPS: Meng et
                al., arXiv:2406.07831):  W = (H + rho I)^-1 (G - V + rho D),  D = largest of W + V / rho,
                V = V + rho (W - D),  rho growing until the mask no longer changes

On a mask the best weights are the least squares solution of each output on its support, found by conjugate gradients
for all outputs at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from onnxcomp.passes.sparse_patterns import Pattern

__all__ = ["ROUGH", "ROUNDS", "Form", "Method", "select", "solve_on"]

Array = npt.NDArray[Any]
Method = Literal["magnitude", "wanda", "obs", "admm"]
_DAMPING = 1e-3  # of the mean diagonal, for masks
_BLOCK = 128  # columns of a block of obs
_STEPS = 300  # of admm, at most
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # share of the mask that changed, and factor of rho
ROUGH = 40  # rounds of conjugate gradients after which errors can be compared
ROUNDS = 200  # at most
_CLOSE = 1e-5  # residual, relative, at which they stop


@dataclass(frozen=True)
class Form:
    """The quadratic form: `moment` [groups, K, K], `mixed` [groups, K, O], `power` [groups, O], all float64.

    `start` is the weight as it is, [groups, K, O].
    """

    moment: Array
    mixed: Array
    power: Array
    start: Array

    @classmethod
    def of_itself(cls, moment: Array, weight: Array) -> Form:
        """The form whose targets are what `weight` gives."""
        mixed = np.matmul(moment, weight)
        return cls(moment, mixed, np.einsum("gko,gko->go", mixed, weight), weight)

    def error(self, weight: Array) -> float:
        """The squared error relative to the power of the targets."""
        product = np.matmul(self.moment, weight) - 2 * self.mixed
        return float(self.power.sum() + np.einsum("gko,gko->", product, weight)) / max(float(self.power.sum()), 1e-30)

    def damped(self, share: float) -> Form:
        """Pulled towards the weight as it is: H + d I, G + d W_0 with d a share of the mean diagonal."""
        extra = share * np.einsum("gkk->g", self.moment) / self.moment.shape[1] + 1e-12
        eye = np.eye(self.moment.shape[1])
        return replace(
            self, moment=self.moment + extra[:, None, None] * eye, mixed=self.mixed + extra[:, None, None] * self.start
        )

    @property
    def diagonal(self) -> Array:
        """[groups, K]"""
        return np.asarray(np.einsum("gkk->gk", self.moment))


def select(form: Form, method: Method, pattern: Pattern, taps: int, sparsity: float) -> Array:
    """The mask, bool [groups, K, O]."""

    def choose(scores: Array) -> Array:
        return pattern.choose(scores, taps, sparsity)

    if method == "magnitude":
        return choose(np.square(form.start))
    if method == "wanda":
        return choose(np.square(form.start) * form.diagonal[:, :, None])
    if method == "obs":
        whole = taps * pattern.channels  # columns that a block must not cut apart
        return _surgeon(form.damped(_DAMPING), choose, max(1, _BLOCK // whole) * whole)
    return _alternating(form.damped(_DAMPING), choose)


def _surgeon(form: Form, choose: Callable[[Array], Array], block: int) -> Array:
    """Column by column from the first; masks are chosen block by block, from weights updated so far."""
    factor = np.linalg.cholesky(np.linalg.inv(form.moment)).transpose(0, 2, 1)
    weight = np.linalg.solve(form.moment, form.mixed)
    mask = np.zeros(weight.shape, bool)
    pivots = np.einsum("gkk->gk", factor)
    for begin in range(0, weight.shape[1], block):
        end = min(begin + block, weight.shape[1])
        mask[:, begin:end] = choose(np.square(weight[:, begin:end] / pivots[:, begin:end, None]))
        errors = np.empty_like(weight[:, begin:end])
        for j in range(begin, end):
            error = np.where(mask[:, j], 0.0, weight[:, j]) / pivots[:, j, None]
            weight[:, j:end] -= factor[:, j, j:end, None] * error[:, None]
            errors[:, j - begin] = error
        weight[:, end:] -= np.matmul(factor[:, begin:end, end:].transpose(0, 2, 1), errors)
    return mask


def _alternating(form: Form, choose: Callable[[Array], Array]) -> Array:
    """In coordinates in which H has a unit diagonal: the largest entries are those that move the output most."""
    size = np.sqrt(form.diagonal)[:, :, None]
    values, vectors = np.linalg.eigh(form.moment / (size * size.transpose(0, 2, 1)))
    turned, values = vectors.transpose(0, 2, 1), values[:, :, None]
    mixed = form.mixed / size
    weight = form.start * size
    mask = choose(np.square(weight))
    sparse, dual = weight * mask, np.zeros_like(weight)
    rho, last, kept = 0.1, mask, max(int(mask.sum()), 1)
    for step in range(1, _STEPS + 1):
        weight = np.matmul(vectors, np.matmul(turned, mixed - dual + rho * sparse) / (values + rho))
        target = weight + dual / rho
        mask = choose(np.square(target))
        sparse = target * mask
        dual += rho * (weight - sparse)
        if step % 3 == 0:
            changed = np.count_nonzero(mask & ~last) / kept
            if changed == 0 and step > 30:
                break
            rho *= next(factor for share, factor in _GROWTH if changed >= share)
            last = mask
    return mask


def solve_on(
    form: Form, mask: Array, ridge: float = 1e-4, *, rounds: int = ROUNDS, begin: Array | None = None
) -> Array:
    """The weight that minimizes the form on the support `mask`, pulled towards the start by a share of the diagonal.

    At most `rounds` of preconditioned conjugate gradients from `begin` (by default the start) cut to the support; they
    never get worse than it.
    """
    form = form.damped(ridge)
    scale = np.where(form.diagonal > 0, form.diagonal, 1.0)[:, :, None]
    weight = (form.start if begin is None else begin) * mask
    residual = (form.mixed - np.matmul(form.moment, weight)) * mask
    steered = residual / scale
    direction = steered
    product = np.einsum("gko,gko->go", residual, steered)
    goal = np.square(_CLOSE) * np.maximum(np.einsum("gko,gko->go", form.mixed, form.mixed / scale), 1e-300)
    for _ in range(rounds):
        if (product <= goal).all():
            break
        image = np.matmul(form.moment, direction) * mask
        curvature = np.einsum("gko,gko->go", direction, image)
        # Sums in floating point may leave a moment that is not quite positive: no step where the form does not grow.
        step = np.where(curvature > 0, product / np.where(curvature > 0, curvature, 1.0), 0.0)
        weight = weight + step[:, None] * direction
        residual = residual - step[:, None] * image
        steered = residual / scale
        now = np.einsum("gko,gko->go", residual, steered)
        direction = steered + (now / np.maximum(product, 1e-300))[:, None] * direction
        product = now
    return weight
