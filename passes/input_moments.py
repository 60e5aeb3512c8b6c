"""Rounding of weights that run in dynamic int8, or are stored as int8: to the codes that keep the products close.

The second moments are those of share_sites.py: of rows of inputs, and for recurrent layers also of their hidden states.
Products have no bias here that would take up a mean, so they are about zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.split import limited
from onnxcomp.graph import Model
from onnxcomp.manager import Context
from onnxcomp.passes.rounding import round_to_grid
from onnxcomp.passes.share_sites import find_weights, moments

__all__ = ["Moments", "input_moments", "round_rows"]

Array = npt.NDArray[Any]
Moments = Mapping[str, Array]  # float64 [groups, K, K] by the name of the weight
_SAMPLES = 128


def input_moments(model: Model, ctx: Context, ops: tuple[str, ...]) -> dict[str, Array]:
    """E[x x^T] of what multiplies the weights of these operators; of values that no node makes there is none."""
    if ctx.data is None:
        return {}
    weights = [w for w in find_weights(model) if all(r.node.op in ops for r in w.readers)]
    found = moments(
        model, weights, limited(ctx.data, _SAMPLES), threads=ctx.threads, memory=ctx.memory, seed=ctx.seed,
        progress=ctx.progress,
    )  # fmt: skip
    names = [w.key[1] for w in weights]
    return {key[1]: g.products / g.rows for key, g in found.items() if g.rows and names.count(key[1]) == 1}


def round_rows(w: Array, scales: Array, moment: Array | None) -> Array:
    """int8 codes of `w` [outputs, K] in steps of `scales` [outputs]: the nearest ones without `moment` [K, K]."""
    steps = scales.astype(np.float64)[:, None]
    if moment is None:
        return np.asarray(_snap(w / steps).astype(np.int8))
    return np.asarray(round_to_grid(w, steps, moment, _snap).astype(np.int8))


def _snap(values: Array) -> Array:
    return np.asarray(np.clip(np.rint(values), -127, 127))
