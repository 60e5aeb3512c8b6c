"""The standing proof of channel removal: the pruned model equals the original with the removed slices set to zero.

Set to zero is what an operator that adds slices up sees of them: the weight of a Conv or MatMul along its input
channels, or a mask on an operand that is computed. What operators do in between (activation functions of zero,
division) cannot matter then. Where a normalization averages over a removed axis, the original's averages over what
stays (dim_norm_proof.py); `provable` says where that is not known how to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Constant, Model, Node, producer, sort
from onnxcomp.passes.dim_norm_proof import AVERAGES, Average
from onnxcomp.passes.dims import Coupling
from onnxcomp.passes.surgery import twins
from onnxcomp.runtime import open_session
from onnxcomp.shapes import infer

__all__ = ["masked", "provable", "removal_error"]

Array = npt.NDArray[Any]


def provable(coupling: Coupling, units: Iterable[int]) -> bool:
    """Whether all nodes that average over slices of these units are known."""
    removed = coupling.mask(units)
    return all(
        any(_averages(node) for node in tensor.outputs) and not any(node.kind == "LRN" for node in tensor.outputs)
        for tensor in _averaged(coupling, removed)
    )


def _averaged(coupling: Coupling, removed: Array) -> dict[Any, dict[int, Array]]:
    """Tensors that are averaged over axes that lose slices, with what stays of these axes."""
    found: dict[Any, dict[int, Array]] = {}
    for tensor, axis in coupling.averages:
        keep = ~removed[coupling.label(tensor, axis)]
        if not keep.all():
            found.setdefault(tensor, {})[axis] = keep
    return found


def _averages(node: Node) -> bool:
    """Whether it is known how a node averages; means and deviations among its outputs are of no known use."""
    return node.kind in AVERAGES and not any(t.name for t in node.outputs[1:3])


def masked(coupling: Coupling, units: Iterable[int]) -> Model:
    """A copy of the original in which no sum sees the slices of these units, and averages run over the others."""
    removed = coupling.mask(units)
    copy = coupling.model.copy()
    twin = twins(coupling.model, copy)
    types = infer(coupling.model)
    for tensor, axes in _averaged(coupling, removed).items():
        rank, dtype = len(coupling.probe.shapes[tensor]), types[tensor].dtype or np.float32
        for node in tensor.outputs:
            if _averages(node) and node.inputs[0] is tensor:
                other = producer(twin[node.outputs[0]])
                assert other is not None  # a copy has the same nodes
                scope = next(s for s in copy.graph.scopes() if other in s.nodes)
                AVERAGES[node.kind](Average(copy, scope, other, axes, rank, dtype))
    sort(copy)
    for tensor, axis in coupling.sums:
        gone = removed[coupling.label(tensor, axis)]
        if not gone.any():
            continue
        dims = [1] * len(coupling.probe.shapes[tensor])
        dims[axis] = len(gone)
        keep = ~gone.reshape(dims)
        if isinstance(tensor, Constant):
            values = twin[tensor].values
            twin[tensor].values = values * keep.astype(values.dtype)
        else:
            _mask(copy, twin[tensor], keep.astype(types[tensor].dtype or np.float32))
    for residual in coupling.residuals:
        if removed[residual.unit]:
            # The only reader of the branch's result is the sum.
            _mask(copy, twin[residual.gone], np.zeros((), types[residual.gone].dtype or np.float32))
    return copy


def _mask(model: Model, tensor: Any, keep: Array) -> None:
    """All readers of a value get it multiplied by `keep`."""
    scope = next(s for s in model.graph.scopes() if tensor in s.inputs or any(tensor in n.outputs for n in s.nodes))
    product = model.variable(f"{tensor.name}_masked", tensor.dtype)
    model.redirect(tensor, product)
    constant = model.constant(scope, f"{tensor.name}_mask", keep)
    scope.add("Mul", [tensor, constant], [product], name=product.name)
    sort(model)


def removal_error(
    coupling: Coupling, units: Iterable[int], pruned: Model, feeds: Sequence[Mapping[str, Array]]
) -> float:
    """Largest difference between `pruned` and the original without these units, relative to the largest output value.

    Infinite where shapes or finiteness differ. Integer outputs count the share of elements that differ.
    """
    reference = open_session(masked(coupling, units), optimize=False)
    candidate = open_session(pruned, optimize=False)
    worst = 0.0
    for feed in feeds:
        for expected, found in zip(reference.run(feed), candidate.run(feed), strict=True):
            worst = max(worst, _difference(np.asarray(expected), np.asarray(found)))
    return worst


def _difference(expected: Array, found: Array) -> float:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    if expected.size == 0:
        return 0.0
    if expected.dtype.kind != "f":
        return float(np.mean(expected != found))
    x, y = expected.astype(np.float64), found.astype(np.float64)
    if not np.array_equal(np.isfinite(x), np.isfinite(y)):
        return float("inf")
    finite = np.isfinite(x)
    if not finite.any():
        return 0.0
    return float(np.abs(x - y)[finite].max() / max(np.abs(x[finite]).max(), 1e-30))
