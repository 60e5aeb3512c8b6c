"""The proof of a removal where averages run over the removed axis."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxcomp.passes.dim_probe import plain_form
from onnxcomp.passes.dim_proof import provable, removal_error
from onnxcomp.passes.dims import Coupling, couple
from onnxcomp.passes.surgery import remove
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto

FUSED = '"com.microsoft" : 1'
BODIES = {
    "layer norm": "b = LayerNormalization (a, g, h)",
    "layer norm of two axes": "b = LayerNormalization <axis = 1> (a, t)",
    "RMS norm": "b = RMSNormalization <epsilon = 0.1> (a, g)",
    "skip": "b = com.microsoft.SkipLayerNormalization <epsilon = 0.01> (a, c, g, h)",
    "skip with a sum": "d, , , e = com.microsoft.SkipLayerNormalization (a, c, g, h, i) b = Add (d, e)",
    "skip without centering": "b = com.microsoft.SkipSimplifiedLayerNormalization (a, c, g)",
    "lp norm": "b = LpNormalization <axis = -1, p = 2> (a)",
    "mean and variance": "b = MeanVarianceNormalization <axes = [2]> (a)",
    "by hand": "d = ReduceMean (a, last) e = Sub (a, d) f = Mul (e, e) j = ReduceMean (f, last) k = Sqrt (j) "
    "b = Div (e, k)",
    **{op: f"d = {op} (a, last) b = Add (a, d)" for op in ("ReduceMax", "ReduceMin", "ReduceLogSumExp")},
    "ReduceProd": "d = ReduceProd (a, last) b = Sub (a, d)",
    "ReduceLogSum": "c1 = Mul (a, a) d = ReduceLogSum (c1, last) b = Add (a, d)",
}


def coupled(body: str) -> Coupling:
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 23, {FUSED}]> net (float[n, 3, 5] x) => (float[n, 3, 2] y) '
        f"<int64[1] last = {{-1}}> {{ a = MatMul (x, m) c = MatMul (x, q) {body} y = MatMul (b, s) }}"
    )
    rng = np.random.default_rng(0)
    shapes = {"m": (5, 8), "q": (5, 8), "s": (8, 2), "g": (8,), "h": (8,), "i": (8,), "t": (3, 8)}
    for name, shape in shapes.items():
        proto.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    return couple(plain_form(from_proto(proto)))


@pytest.mark.parametrize("name", BODIES)
def test_a_removal_equals_the_original_that_averages_over_what_stays(name: str) -> None:
    found = coupled(BODIES[name])
    group = max((g for g in found.groups if g.averaged), key=lambda g: len(g.axes))
    units = group.units[1:6]
    cut = remove(found, units)
    assert provable(found, units)
    assert found.probe.larger is not None
    assert removal_error(found, units, cut.model, [found.probe.feeds, found.probe.larger]) < 1e-5
    whole, without = (open_session(m).run(found.probe.feeds)[0] for m in (found.model, cut.model))
    assert not np.allclose(whole, without)


def test_an_average_of_neighbours_cannot_be_proven() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> net (float[n, 3, 5, 5] x) => (float[n, 2, 5, 5] y) '
        "{ a = Conv (x, m) b = LRN <size = 3> (a) y = Conv (b, s) }"
    )
    for name, shape in (("m", (8, 3, 1, 1)), ("s", (2, 8, 1, 1))):
        proto.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    found = couple(plain_form(from_proto(proto)))
    (group,) = found.groups
    assert not provable(found, group.units[:2])
    assert provable(found, [])
