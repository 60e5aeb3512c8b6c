"""Units that hold the same numbers whatever the input is: what they add to their readers goes into the readers' biases.

A unit is constant where its weights are zero and its biases are not (a dead filter with a batch normalization's shift),
as long as nothing on the way mixes something else into it. With value c and the reader's weights W for it,

    b' = b + sum over taps of W c

which is exact where every output position sees all taps: no padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.runner import expose
from onnxcomp.graph import Constant, Model, Node
from onnxcomp.passes.dim_readers import rows_of_units
from onnxcomp.passes.dim_sites import Site, sites
from onnxcomp.passes.dims import Coupling

__all__ = ["Constants", "with_biases", "without_biases"]

Array = npt.NDArray[Any]
Places = Mapping[int, Mapping[tuple[Any, int], Array]]
# Operators that compute each element of the output from one element of each input.
_ELEMENTWISE = frozenset(
    """
    Abs Add Celu Clip Div Elu Erf Exp Gelu HardSigmoid HardSwish Identity LeakyRelu Max Min Mish Mul Neg PRelu Pow
    Relu Selu Sigmoid Softplus Softsign Sqrt Sub Swish Tanh ThresholdedRelu
    """.split()
)
# Operators that give a slice of one number only that number.
_KEEP_NUMBERS = frozenset({"GlobalAveragePool", "GlobalMaxPool", "MaxPool", "Flatten", "Reshape", "Squeeze"})


class Constants:
    """Constant units of a coupled model, whose weights change under `absorb`."""

    def __init__(self, coupling: Coupling, places: Places) -> None:
        self.coupling = coupling
        self.places = places

    def units(self, candidates: Sequence[int]) -> list[int]:
        """Those whose values depend on no input, and whose readers can take them into a bias."""
        return [u for u in candidates if self._zero_weights(u) and self._untouched(u)]

    def known(self, unit: int) -> bool:
        """Whether a run of the model found one number per slice for every reader."""
        return all(np.ptp(self._slices(s, unit), axis=1).max(initial=0.0) == 0 for s in self._readers(unit))

    def absorb(self, unit: int) -> None:
        """Add what the unit contributes to the biases of its readers, in `coupling.model`."""
        for site in self._readers(unit):
            rows = rows_of_units(site, self.coupling, [unit])[0]
            value = self._slices(site, unit)[:, 0].astype(np.float64)
            taps = np.repeat(value, len(rows) // len(value))
            bias = site.bias() + np.einsum("k,gko->go", taps, site.matrix()[:, rows]).reshape(-1)
            constant = _bias(site)
            assert constant is not None  # _takes_constant
            beta = site.view.beta if site.addition is None else 1.0
            constant.values = (bias / beta).reshape(constant.shape).astype(constant.dtype)

    # --- conditions ---

    def _zero_weights(self, unit: int) -> bool:
        """Some weight makes the unit, and all that make it are zero; a vector (bias) may hold anything."""
        sums = set(self.coupling.sums)
        made = [
            np.take(t.values, index, axis=axis)
            for (t, axis), index in self.places[unit].items()
            if isinstance(t, Constant) and (t, axis) not in sums and sum(d > 1 for d in t.shape) > 1
        ]
        return bool(made) and not any(s.any() for s in made)

    def _untouched(self, unit: int) -> bool:
        held = {t for t, _ in self.places[unit]}
        readers = {s.node for s in self._readers(unit)}
        nodes = {node: None for t in held for node in (*t.inputs, *t.outputs)}
        return all(
            self._takes_constant(node) if node in readers else self._stays_constant(node, held) for node in nodes
        )

    def _stays_constant(self, node: Node, held: set[Any]) -> bool:
        if not any(y in held for y in node.outputs):
            return False  # a sum over units that is no site
        if node in self._sites:
            return node.inputs[1] in held and (len(node.inputs) < 3 or node.inputs[2] in held)
        if node.op in _ELEMENTWISE and not node.domain:
            return all(t in held or isinstance(t, Constant) for t in node.inputs if t.name)
        return node.op in _KEEP_NUMBERS and not node.domain

    def _takes_constant(self, node: Node) -> bool:
        site = self._sites[node]
        padded = any(int(p) for p in node.attrs.get("pads", ())) or node.attrs.get("auto_pad", "NOTSET") not in (
            "NOTSET",
            "VALID",
        )
        plain = site.view.op in ("Conv", "Gemm", "MatMul") and site.view.groups == 1
        bias = _bias(site)
        return plain and not padded and bias is not None and bias.weight.size == site.view.outputs

    # --- what the model says ---

    @cached_property
    def _sites(self) -> dict[Node, Site]:
        return {site.node: site for site in sites(self.coupling.model)}

    def _readers(self, unit: int) -> list[Site]:
        sums = set(self.coupling.sums)
        weights = [t for t, axis in self.places[unit] if isinstance(t, Constant) and (t, axis) in sums]
        return [self._sites[node] for t in weights for node in t.outputs if node in self._sites]

    @cached_property
    def _values(self) -> Mapping[str, Array]:
        """The inputs of all sites in one run."""
        names = list(dict.fromkeys(site.node.inputs[0].name for site in self._sites.values()))
        given = self.coupling.probe.feeds
        wanted = [name for name in names if name not in given]
        session = expose(self.coupling.model, wanted, optimize=False)
        found = session.native.run(wanted, dict(given)) if wanted else []
        return {**given, **dict(zip(wanted, found, strict=True))}

    def _slices(self, site: Site, unit: int) -> Array:
        """What the reader sees of the unit: [slices, positions]."""
        x = site.node.inputs[0]
        for (tensor, axis), index in self.places[unit].items():
            if tensor is x:
                taken = np.moveaxis(np.take(self._values[x.name], index, axis=axis), axis, 0)
                return taken.reshape(len(index), -1)
        return np.full((1, 2), [[0.0, 1.0]])  # the reader's input does not hold the unit: nothing is known


def _bias(site: Site) -> Constant | None:
    """The bias, to be changed in place; in a plain form nobody else reads it."""
    addition = site.addition
    if addition is None:
        return site.view.bias
    return next(t for t in addition.inputs if isinstance(t, Constant))


def with_biases(model: Model) -> set[str]:
    """Give every Conv and Gemm of the main graph that has none a bias of zeros, in place; returns their names."""
    added = set()
    for site in sites(model):
        if site.view.bias is None and site.view.op in ("Conv", "Gemm"):
            zeros = np.zeros(site.view.outputs, site.view.weight.dtype)
            constant = model.constant(model.graph, f"{site.node.outputs[0].name}_bias", zeros)
            if len(site.node.inputs) > 2:
                site.node.inputs[2] = constant
            else:
                site.node.inputs.append(constant)
            added.add(constant.name)
    return added


def without_biases(model: Model, added: set[str]) -> None:
    """Take away those that are still zeros."""
    for site in sites(model):
        if site.view.bias is not None and site.view.bias.name in added and not site.view.bias.values.any():
            del site.node.inputs[2]
    model.graph.initializers[:] = [
        i for i in model.graph.initializers if not (i.name in added and isinstance(i, Constant) and not i.outputs)
    ]
