"""activations: what exporters spell out becomes HardSigmoid, where it is one."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxcomp.manager import Context
from onnxcomp.passes.fuse import Fuse
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto

_HEAD = '<ir_version: 7, opset_import: ["" : {opset}]> g (float[2,3,4,5] x, float[2,3,4,5] z) => (float[2,3,4,5] y)'
_THREE = "<float three = {3.0}, float zero = {0.0}, float six = {6.0}, float[1] sixth = {0.16666667}>"
_CLIPPED = "a = Add(x, three) c = Clip(a, zero, six) "


def fused(body, opset=13, constants=_THREE):
    text = f"{_HEAD.format(opset=opset)} {constants} {{ {body} }}"
    proto = onnx.parser.parse_model(text)
    model = from_proto(proto)
    details = Fuse().run(model, Context())
    after = onnx.ModelProto.FromString(model.to_bytes())
    onnx.checker.check_model(after)
    return proto, after, details


def assert_same_function(before, after):
    rng = np.random.default_rng(0)
    feeds = {n: rng.normal(0, 4, (2, 3, 4, 5)).astype(np.float32) for n in ("x", "z")}
    first, second = (open_session(m, optimize=False).run(feeds)[0] for m in (before, after))
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("body", [
    _CLIPPED + "m = Mul(x, c) y = Div(m, six)",
    _CLIPPED + "m = Mul(c, x) y = Mul(sixth, m)",
    _CLIPPED + "s = Div(c, six) y = Mul(x, s)",
    _CLIPPED + "s = Mul(c, sixth) y = Mul(s, z)",
    _CLIPPED + "m = Mul(z, c) y = Div(m, six)",
])  # fmt: skip
def test_hard_swish_in_arithmetic_becomes_a_product_with_hard_sigmoid(body):
    before, after, details = fused(body)

    assert sorted(n.op_type for n in after.graph.node) == ["HardSigmoid", "Mul"]
    assert details == {"hard sigmoid": 1}
    assert_same_function(before, after)


def test_hard_sigmoid_alone_in_arithmetic_becomes_the_operator():
    before, after, _ = fused(_CLIPPED + "y = Div(c, six)")

    assert [n.op_type for n in after.graph.node] == ["HardSigmoid"]
    assert_same_function(before, after)


def test_bounds_that_are_attributes_are_read():
    before, after, _ = fused(
        "a = Add(x, three) c = Clip<min=0.0, max=6.0>(a) m = Mul(x, c) y = Div(m, six)", opset=9
    )

    assert sorted(n.op_type for n in after.graph.node) == ["HardSigmoid", "Mul"]
    assert_same_function(before, after)


@pytest.mark.parametrize("body", [
    _CLIPPED + "m = Mul(x, c) y = Div(m, three)",  # not what Clip goes up to
    _CLIPPED + "m = Mul(x, c) y = Div(six, m)",
    _CLIPPED + "m = Mul(x, c) d = Div(m, six) y = Add(d, c)",  # the clipped value is read elsewhere
    _CLIPPED + "m = Mul(x, c) d = Div(m, six) y = Add(d, a)",  # so is the sum
    "a = Add(x, three) c = Clip(a, three, six) m = Mul(x, c) y = Div(m, six)",  # not from zero
    "a = Add(x, z) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six)",  # not one number
])  # fmt: skip
def test_what_is_something_else_stays(body):
    before, after, details = fused(body)

    assert [n.op_type for n in after.graph.node] == [n.op_type for n in before.graph.node]
    assert details == {}
