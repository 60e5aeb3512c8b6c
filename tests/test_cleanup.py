"""cleanup: what goes, and what must stay. Values are compared in test_hostile.py and test_conformance.py."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcomp.manager import Context
from onnxcomp.passes.casts import holds_all
from onnxcomp.passes.cleanup import RANDOM, Cleanup, remove_dead
from onnxcomp.serde import from_proto
from tests import hostile
from tests.conformance import graphs


def cleaned(body, *, opset=17, **weights):
    model = from_proto(hostile.parse(body, opset=opset, **weights))
    Cleanup().run(model, Context())
    return onnx.ModelProto.FromString(model.to_bytes())


def ops(proto):
    return " ".join(sorted(n.op_type for g in graphs(proto) for n in g.node))


def test_every_rewrite_is_in_the_account():
    body = "g (float[N] x) => (float[N] y) { c = Constant<value_float = 2.0>() y = Mul(x, c) d = Neg(y) }"
    model, ctx = from_proto(hostile.parse(body)), Context()

    account = Cleanup().run(model, ctx)

    assert account == {"dead": 1, "constant nodes": 1}
    assert len(ctx.rewrites) == sum(account.values())


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        ("a = Identity(x)", ""),
        ("a = Dropout(x)", ""),
        ("a, m = Dropout(x)", ""),
        ("a = Cast<to=1>(x)", ""),
        ("a = Transpose<perm=[0,1]>(x)", ""),
        ("a = Transpose<perm=[1,0]>(x)", "Transpose"),
        ("b = Transpose<perm=[1,0]>(x) a = Transpose<perm=[1,0]>(b)", ""),
        ("a = Reshape(x, zeros)", ""),
        ("a = Reshape(x, zero_rest)", ""),
        ("b = Reshape(x, flat) a = Reshape(b, three)", ""),
        ("a = Flatten<axis=1>(x)", ""),
        ("a = Concat<axis=0>(x)", ""),
        ("a = Concat<axis=0>(x, none)", ""),
        ("a = Max(x)", ""),
        ("a = Max(x, x)", "Max"),
        ("a = Mul(x, one)", ""),
        ("a = Mul(ones, x)", ""),
        ("a = Mul(x, wide)", "Mul"),
        ("a = Div(x, one)", ""),
        ("a = Div(one, x)", "Div"),
        ("a = Sub(x, zero)", ""),
        ("a = Sub(x, minus_zero)", "Sub"),
        ("a = Add(x, zero)", "Add"),
        ("a = Pow(x, one)", ""),
        ("b = Neg(x) a = Neg(b)", ""),
        ("b = Relu(x) a = Relu(b)", "Relu"),
        ("b = Exp(x) a = Exp(b)", "Exp Exp"),
        ("a = Slice(x, zero1, far, zero1)", ""),
        ("a = Slice(x, zero1, two, one1)", "Slice"),
        ("a = Slice(x, zero1, three, one1)", ""),
        ("a = Pad(x, no_pads)", ""),
        ("a = Tile(x, one2)", ""),
        ("a = Expand(x, one2)", ""),
        ("a = Expand(x, one3)", "Expand"),
        ("b = Unsqueeze(x, one1) a = Squeeze(b, one1)", ""),
        ("b = Unsqueeze(x, one1) a = Squeeze(b, minus2)", ""),
        ("b = Unsqueeze(x, zero1) a = Unsqueeze(b, zero1)", "Unsqueeze"),
        ("a = Where(true, x, zero)", "Where"),
        ("a = ReduceSum<noop_with_empty_axes=1>(x)", ""),
        ("b = Shape(x) c = Exp(x) d = Shape(c) e = Cast<to=1>(b) f = Cast<to=1>(d) g = Add(e, f) h = ReduceSum(g)"
         " a = Mul(x, h)",
         "Add Cast Mul ReduceSum Shape"),
        ("b = Sigmoid(x) c = Sigmoid(x) a = Mul(b, c)", "Mul Sigmoid"),
        ("b = LeakyRelu<alpha=0.0>(x) c = LeakyRelu<alpha=-0.0>(x) a = Mul(b, c)", "LeakyRelu LeakyRelu Mul"),
    ],
)  # fmt: skip
def test_the_nodes_that_stay(nodes, left):
    weights = {
        "one": np.float32(1), "ones": np.ones((1, 3), np.float32), "wide": np.ones((2, 1, 1), np.float32),
        "zero": np.float32(0), "minus_zero": np.float32(-0.0), "none": np.zeros((0, 3), np.float32),
        "true": np.ones((2, 1, 1), bool),
        "zeros": [0, 0], "zero_rest": [0, -1], "flat": [-1], "three": [-1, 3], "far": [1 << 62], "two": [2],
        "zero1": [0], "one1": [1], "minus2": [-2], "one2": [1, 1], "one3": [1, 1, 1], "no_pads": [0] * 4,
    }  # fmt: skip
    weights["three"] = [-1, 3] if "Reshape" in nodes else [3]
    between = nodes.replace("x)", "i)").replace("x,", "i,")
    proto = cleaned(f"g (float[N,3] x) => (float[N,3] y) {{ i = Tanh(x) {between} y = Tanh(a) }}", **weights)

    assert ops(proto) == " ".join(sorted([*left.split(), "Tanh", "Tanh"]))


@pytest.mark.parametrize("op", sorted(RANDOM - {"Multinomial"}))
def test_random_operators_are_never_merged(op):
    arguments = {"RandomNormal": "<shape=[2]>()", "RandomUniform": "<shape=[2]>()"}.get(op, "(x)")
    proto = cleaned(f"g (float[2] x) => (float[2] y) {{ a = {op}{arguments} b = {op}{arguments} y = Sub(a, b) }}")

    assert ops(proto) == f"{op} {op} Sub"


def test_operators_of_unknown_domains_are_not_merged():
    body = "g (float[2] x) => (float[2] y) { a = com.microsoft.Odd(x) b = com.microsoft.Odd(x) y = Sub(a, b) }"

    assert ops(cleaned(body)) == "Odd Odd Sub"


def test_inputs_and_outputs_stay_where_everything_between_goes():
    proto = cleaned("g (float[N] x, float[N] z) => (float[N] y) { a = Identity(x) b = Identity(a) y = Identity(b) }")

    assert [v.name for v in proto.graph.input] == ["x", "z"]
    assert [v.name for v in proto.graph.output] == ["y"]
    assert ops(proto) == "Identity"


def test_a_node_whose_value_is_an_output_takes_over_its_name():
    proto = cleaned("g (float[N] x) => (float[N] y) { a = Relu(x) y = Identity(a) }")

    assert [list(n.output) for n in proto.graph.node] == [["y"]]


def test_what_is_neutral_but_an_input_becomes_an_identity():
    assert ops(cleaned("g (float[N] x) => (float[N] y) { y = Mul(x, one) }", one=np.float32(1))) == "Identity"


def test_nodes_without_names_are_told_apart():
    proto = cleaned("g (float[N] x) => (float[N] y) { a = Exp(x) b = Log(a) c = Exp(b) y = Log(c) }")

    assert ops(proto) == "Exp Exp Log Log"


def test_scales_that_an_annotation_names_stay():
    proto = hostile.parse("g (float[N] x) => (float[N] y) { y = Relu(x) }", s=np.float32(1), unused=np.float32(2))
    proto.graph.quantization_annotation.add(tensor_name="y").quant_parameter_tensor_names.add(
        key="SCALE_TENSOR", value="s"
    )
    model = from_proto(proto)

    remove_dead(model, Context())

    assert [i.name for i in model.graph.initializers] == ["s"]


def test_dead_nodes_go_in_an_order_that_leaves_a_whole_graph():
    model = from_proto(hostile.parse("g (float[N] x) => (float[N] y) { a = Exp(x) b = Log(a) y = Relu(x) }"))

    remove_dead(model, Context(limit=1))

    assert [n.op for n in model.graph.nodes] == ["Exp", "Relu"]


def test_a_dropout_that_may_train_stays():
    body = "g (float[N] x, bool t) => (float[N] y) { y = Dropout(x, r, t) }"

    assert ops(cleaned(body, r=np.float32(0.5))) == "Dropout"


def test_a_large_equal_initializer_goes_whatever_its_size():
    w = hostile.floats(300, 300)
    body = "g (float[N,300] x) => (float[N,300] y) { a = MatMul(x, w) b = MatMul(a, v) y = MatMul(b, u) }"
    other = w.copy()
    other[-1, -1] += 1

    assert [t.name for t in cleaned(body, w=w, v=w.copy(), u=other).graph.initializer] == ["w", "u"]


def test_an_equal_weight_of_a_branch_gives_way_to_the_outer_one():
    proto = hostile.CASES["branch_hides_a_weight"]()
    branch = next(g for g in graphs(proto) if g.name == "t")
    branch.initializer[0].CopyFrom(proto.graph.initializer[0])
    branch.initializer[0].name = "v"
    branch.node[0].input[1] = "v"
    model = from_proto(proto)

    Cleanup().run(model, Context())

    assert [len(g.initializer) for g in graphs(onnx.ModelProto.FromString(model.to_bytes()))] == [1, 0, 0]


_T = TensorProto


@pytest.mark.parametrize(
    ("way", "kept"),
    [
        ((_T.FLOAT16, _T.FLOAT, _T.FLOAT16), True),
        ((_T.FLOAT16, _T.FLOAT, _T.DOUBLE), True),
        ((_T.FLOAT, _T.FLOAT16, _T.FLOAT), False),
        ((_T.INT32, _T.FLOAT, _T.DOUBLE), False),
        ((_T.INT32, _T.DOUBLE, _T.FLOAT), True),
        ((_T.INT64, _T.DOUBLE, _T.INT64), False),
        ((_T.UINT8, _T.FLOAT, _T.INT8), False),
        ((_T.UINT8, _T.INT32, _T.INT8), True),
        ((_T.UINT8, _T.INT8, _T.INT32), False),
        ((_T.BOOL, _T.INT64, _T.FLOAT), True),
        ((_T.INT32, _T.BOOL, _T.INT32), False),
        ((_T.FLOAT, _T.DOUBLE, _T.INT32), False),
        ((_T.STRING, _T.FLOAT, _T.DOUBLE), False),
        ((_T.FLOAT8E4M3FN, _T.FLOAT, _T.FLOAT16), False),
    ],
)
def test_a_cast_is_left_out_only_if_its_type_holds_all_values(way, kept):
    assert holds_all(*way) is kept


@pytest.mark.parametrize("opset", [9, 11, 13])
def test_axes_are_found_as_attributes_and_as_inputs(opset):
    squeeze = helper.make_node(
        "Squeeze", ["i", "ax"] if opset >= 13 else ["i"], ["s"], **({} if opset >= 13 else {"axes": [1]})
    )
    unsqueeze = helper.make_node(
        "Unsqueeze", ["s", "ax"] if opset >= 13 else ["s"], ["u"], **({} if opset >= 13 else {"axes": [1]})
    )
    proto = hostile.parse("g (float[N,1,4] x) => (float[N,1,4] y) { i = Exp(x) y = Log(u) }", opset=opset, ax=[1])
    proto.graph.node.insert(1, unsqueeze)
    proto.graph.node.insert(1, squeeze)
    model = from_proto(proto)

    Cleanup().run(model, Context())

    assert [n.op for n in model.graph.nodes] == ["Exp", "Log"]


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ("y, i = MaxPool<kernel_shape=[2, 2]>(x)", ["y"]),
        ("a, b, c = LSTM<hidden_size=2>(s, w, w) y = Neg(b)", ["", "b"]),
        ("a, b, c = LSTM<hidden_size=2>(s, w, w) y = Neg(c)", ["", "", "c"]),
        ("y, m, v = BatchNormalization<training_mode=1>(x, k, k, k, k)", ["y", "m", "v"]),
        ("y, i = TopK(x, k)", ["y", "i"]),
        ("y, z = Split(x)", ["y", "z"]),
    ],
)
def test_optional_outputs_that_nobody_reads_lose_their_names(nodes, outputs):
    header = "g (float[1,2,4,4] x, float[1,1,1] s, float[1,8,2] w, float[2] k) => (float[A,B,C,D] y)"

    assert list(cleaned(f"{header} {{ {nodes} }}").graph.node[0].output) == outputs


def test_optional_outputs_before_opset_14_say_whether_a_batch_normalization_trains():
    header = "g (float[1,2,4,4] x, float[2] k) => (float[1,2,4,4] y)"
    proto = cleaned(f"{header} {{ y, m, v = BatchNormalization(x, k, k, k, k) }}", opset=9)

    assert list(proto.graph.node[0].output) == ["y", "m", "v"]
