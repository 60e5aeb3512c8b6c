"""Sequential bias correction: the mean of each operator's output, as it was before rounding.

Rounding and clipping shift means. For unit l the shift seen at its output, D = E[y'] - E[y] per channel, is in part
caused by earlier units, through its input: W (E[x'] - E[x]). Only the rest is its own,

    b_l  <-  b_l - ( D - sum_k W'[., k] (E[x'_k] - E[x_k]) )

so all units can be corrected from the means of one run without counting anything twice (Nagel et al.,
arXiv:1906.04721, section 4.2, correct one layer per run). Borders of padded maps make the second term approximate:
repeating the sweep removes what is left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.data import Dataset
from onnxcomp.calibration.runner import collect
from onnxcomp.graph import Model
from onnxcomp.passes.candidate import Candidate
from onnxcomp.passes.layout import CPU, Layout
from onnxcomp.passes.placement import Unit
from onnxcomp.shapes import infer

__all__ = ["Corrector"]

Array = npt.NDArray[Any]


class Corrector:
    """Means of the float model over some samples, with which candidates with the same units in float are corrected."""

    def __init__(
        self, model: Model, skip: frozenset[str], data: Dataset, *, threads: int, layout: Layout = CPU
    ) -> None:
        from onnxcomp.manager import Context

        plan = layout.place(model, model.graph, infer(model), Context(), keep_float=skip)
        # What a constant input gives depends on the position behind a ConvTranspose.
        self._floats = {u.key: u for u in plan.units if u.takes_bias and u.node.op != "ConvTranspose"}
        self._data, self._threads = data, threads
        self._before = _means(model, list(self._floats.values()), data, threads)

    def correct(self, candidate: Candidate) -> dict[str, Array]:
        """New biases per unit from one run of the candidate over the same samples."""
        quantized = {u.key: u for u in candidate.units if u.takes_bias and u.key in self._floats}
        after = _means(candidate.model, list(quantized.values()), self._data, self._threads)
        biases = dict(candidate.decisions.biases)
        for key in quantized:
            (x, y), (xq, yq) = self._before[key], after[key]
            if x is None or xq is None or y is None or yq is None:
                continue
            own = yq - y - _through(self._floats[key], xq - x)
            biases[key] = biases[key] - own
        return biases


def _means(
    model: Model, units: list[Unit], data: Dataset, threads: int
) -> dict[str, tuple[Array | None, Array | None]]:
    """Mean input and output of each unit per channel, before the activation."""
    requests: dict[str, int | None] = {}
    for unit in units:
        axis = 1 if unit.node.op == "Conv" else -1
        requests[unit.node.inputs[0].name] = axis
        requests[unit.linear_output.name] = axis
    found = collect(model, data, requests, threads=threads, histogram=False)

    def mean(name: str) -> Array | None:
        channels = found[name].channels
        return None if channels is None else channels.mean

    return {u.key: (mean(u.node.inputs[0].name), mean(u.linear_output.name)) for u in units}


def _through(unit: Unit, shift: Array) -> Array:
    assert unit.view is not None
    return np.asarray(unit.view.response(shift))
