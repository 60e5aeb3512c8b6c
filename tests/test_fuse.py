"""fuse: the arithmetic is right, and each precondition is checked. More graphs are in test_hostile.py."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxcomp.manager import Context
from onnxcomp.passes.fuse import Fuse
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto
from tests import hostile
from tests.hostile import floats, statistics


def fused(proto):
    model, ctx = from_proto(proto), Context()
    Fuse().run(model, ctx)
    return onnx.ModelProto.FromString(model.to_bytes()), ctx


def ops(proto):
    return [n.op_type for n in proto.graph.node]


def assert_same_function(before, after, tolerance=1e-5):
    feeds = hostile.feeds(before)
    first, second = (open_session(m, optimize=False).run(feeds) for m in (before, after))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weighted", [
    ("Conv<group=2>(x, w)", (4, 2, 3, 3)),
    ("Conv<pads=[1,1,1,1], strides=[2,2]>(x, w)", (4, 4, 3, 3)),
    ("Conv(x, w, b)", (4, 4, 1, 1)),
    ("ConvTranspose<strides=[2,2]>(x, w, b)", (4, 4, 3, 3)),
    ("ConvTranspose<group=2>(x, w, b)", (4, 2, 3, 3)),
])  # fmt: skip
@pytest.mark.parametrize("follower", [
    "BatchNormalization(c, scale, bias, mean,"
    " var)", "Mul(c, k)", "Div(c, k)", "Add(k, c)", "Sub(c, k)", "Sub(k, c)", "Mul(c, two)",
])  # fmt: skip
def test_what_follows_a_convolution_goes_into_its_weight(weighted, follower):
    text, shape = weighted
    proto = hostile.parse(
        f"g (float[1,4,8,8] x) => (float[1,4,A,B] y) {{ c = {text} y = {follower} }}",
        w=floats(*shape), b=floats(4), k=np.abs(floats(4, 1, 1)) + np.float32(0.5), two=np.float32(2), **statistics(4),
    )  # fmt: skip

    after, _ = fused(proto)

    assert ops(after) == [text.partition("(")[0].partition("<")[0]]
    assert_same_function(proto, after)


@pytest.mark.parametrize(
    "name", ["bn_before_a_conv", "gemm_bn", "grouped_transposed_conv_bn", "conv_chain_of_arithmetic", "relu_clip"]
)
def test_hostile_graphs_that_fuse_compute_the_same(name):
    proto = hostile.CASES[name]()

    after, _ = fused(proto)

    assert len(after.graph.node) < len(proto.graph.node)
    assert_same_function(proto, after, 1e-4)


def test_arithmetic_is_done_in_double_and_rounded_once():
    scale = statistics(4)
    w = floats(4, 3, 3, 3)
    after, _ = fused(hostile.parse(hostile.CONV % hostile.BN, w=w, **scale))

    factor = scale["scale"].astype(float) / np.sqrt(scale["var"].astype(float) + float(np.float32(1e-5)))
    weights = {t.name: numpy_helper.to_array(t) for t in after.graph.initializer}
    expected = (w.astype(float) * factor.reshape(-1, 1, 1, 1)).astype(np.float32)
    assert any(v.shape == w.shape and (v == expected).all() for v in weights.values())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bn_in_training_mode", "is in training mode"),
        ("bn_scale_is_an_input", "are not constant"),
        ("bn_before_a_padded_conv", "pads with zeros"),
    ],
)
def test_a_normalization_that_stays_is_refused_with_a_reason(name, reason):
    proto = hostile.CASES[name]()

    after, ctx = fused(proto)

    assert ops(after) == ops(proto)
    assert [r.reason for r in ctx.refusals if reason in r.reason]


@pytest.mark.parametrize(
    "name",
    [
        "batched_matmul_add",
        "arithmetic_adds_an_axis",
        "arithmetic_broadcasts_to_more_channels",
        "arithmetic_broadcasts_along_the_width",
    ],
)
def test_what_nobody_expects_to_fuse_stays_without_a_word(name):
    proto = hostile.CASES[name]()

    after, ctx = fused(proto)

    assert ops(after) == ops(proto)
    assert ctx.refusals == []


def test_a_variance_that_is_not_positive_is_refused():
    proto = hostile.parse(hostile.CONV % hostile.BN, w=hostile.W, **{**statistics(4), "var": np.float32([1, -1, 1, 1])})

    after, ctx = fused(proto)

    assert ops(after) == ["Conv", "BatchNormalization"]
    assert "not positive" in ctx.refusals[0].reason


def test_a_weight_that_would_overflow_half_precision_is_refused():
    proto = hostile.parse(
        "g (float16[1,3,8,8] x) => (float16[1,4,6,6] y) { c = Conv(x, w) y = Mul(c, k) }",
        w=np.full((4, 3, 3, 3), 300, np.float16), k=np.full((4, 1, 1), 300, np.float16),
    )  # fmt: skip

    after, ctx = fused(proto)

    assert ops(after) == ["Conv", "Mul"]
    assert "overflows" in ctx.refusals[0].reason


def test_a_large_shared_weight_is_not_copied():
    proto = hostile.parse(
        "g (float[1,64,8,8] x) => (float[1,64,6,6] y, float[1,64,6,6] z) { c = Conv(x, w) y = Mul(c, k)"
        " d = Conv(x, w) z = Exp(d) }",
        w=floats(64, 64, 3, 3), k=floats(64, 1, 1),
    )  # fmt: skip

    assert ops(fused(proto)[0]) == ops(proto)


def test_a_small_shared_weight_is_copied_and_the_other_reader_keeps_the_old_one():
    proto = hostile.CASES["two_convs_share_a_weight"]()
    proto.graph.node[2].input[0] = "x"

    after, _ = fused(proto)

    assert ops(after) == ["Conv", "Conv"]
    assert_same_function(proto, after, 1e-4)


def test_old_arithmetic_with_an_axis_stays():
    proto = hostile.parse("g (float[1,3,4,4] x) => (float[1,4,4,4] y) { c = Conv(x, w)"
                          " y = Add<broadcast=1, axis=1>(c, k) }",
                          opset=6, w=floats(4, 3, 1, 1), k=floats(4))  # fmt: skip

    assert ops(fused(proto)[0]) == ["Conv", "Add"]


def test_padding_moves_into_the_convolution():
    proto = hostile.parse("g (float[1,3,8,8] x) => (float[1,4,10,8] y) { p = Pad(x, pads)"
                          " y = Conv<pads=[1,1,1,1]>(p, w) }",
                          w=hostile.W, pads=[0, 0, 1, 0, 0, 0, 1, 0])  # fmt: skip

    after, _ = fused(proto)

    assert ops(after) == ["Conv"]
    assert_same_function(proto, after)


@pytest.mark.parametrize(
    "name",
    ["negative_pad_conv", "pad_before_a_conv_that_pads_itself", "pad_with_ones_conv", "pad_before_a_conv_of_a_branch"],
)
def test_other_padding_stays(name):
    assert "Pad" in ops(fused(hostile.CASES[name]())[0])


def test_padding_of_columns_stays_as_the_convolution_would_be_slower():
    proto = hostile.parse("g (float[1,3,8,1] x) => (float[1,4,10,1] y) { p = Pad(x, pads) y = Conv(p, w) }",
                          w=floats(4, 3, 3, 1), pads=[0, 0, 2, 0, 0, 0, 2, 0])  # fmt: skip

    after, ctx = fused(proto)

    assert ops(after) == ["Pad", "Conv"]
    assert "width 1" in ctx.refusals[0].reason


def test_the_interface_and_other_outputs_of_a_fused_node_stay():
    proto = hostile.CASES["conv_bn"]()

    after, _ = fused(proto)

    assert after.graph.output == proto.graph.output
    assert after.graph.input == proto.graph.input


def test_weights_inside_of_functions_are_fused():
    def constant(name, values):
        return onnx.helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values, name))

    parameters = dict(statistics(4), w=floats(4, 4, 3, 3))
    nodes = [constant(name, values) for name, values in parameters.items()]
    nodes.append(onnx.helper.make_node("Conv", ["x", "w"], ["c"]))
    nodes.append(onnx.helper.make_node("BatchNormalization", ["c", "scale", "bias", "mean", "var"], ["y"]))
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("f", 1)]
    proto = hostile.parse("g (float[1,4,8,8] x) => (float[1,4,4,4] y) { a = f.F(x) y = f.F(a) }")
    proto.opset_import.append(opsets[1])
    proto.functions.append(onnx.helper.make_function("f", "F", ["x"], ["y"], nodes, opsets[:1]))

    after, _ = fused(proto)

    assert sorted(n.op_type for n in after.functions[0].node) == ["Constant", "Constant", "Conv"]
    assert_same_function(proto, after)
