"""MACs against hand-computed values, brute-force counting, and published numbers."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxcomp import io
from onnxcomp.errors import DataError
from onnxcomp.graph import Model
from onnxcomp.macs import Macs, concrete_shapes, count_macs, count_with_run

ZOO = Path("/work/shared/zoo/models")
HEAD = '<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1, "here" : 1]>'


def model(text: str) -> Model:
    return io.load(onnx.parser.parse_model(f"{HEAD}\n{text}"))


def by_name(macs: Macs) -> dict[str, int]:
    return {node.label: count for node, count in macs.nodes.items()}


# --- rules --------------------------------------------------------------------------------------------------


def brute_force(
    size: int, channels: int, outputs: int, kernel: int, group: int, attrs: dict[str, int]
) -> int:
    """Multiplications of a 1-d convolution over the padded input, one by one."""
    padded = size + 2 * attrs["pad"]
    count = 0
    for _ in range(outputs):
        start = 0
        while start + attrs["dilation"] * (kernel - 1) < padded:
            count += sum(1 for _ in itertools.product(range(channels // group), range(kernel)))
            start += attrs["stride"]
    return count


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_conv_costs_what_counting_each_product_gives(data: st.DataObject) -> None:
    group, kernel = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    channels, outputs = (group * data.draw(st.integers(1, 3)) for _ in range(2))
    attrs = {k: data.draw(st.integers(low, 3)) for k, low in (("pad", 0), ("stride", 1), ("dilation", 1))}
    size = data.draw(st.integers(attrs["dilation"] * (kernel - 1) + 1, 16))
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], group=group, pads=[attrs["pad"]] * 2,
        strides=[attrs["stride"]], dilations=[attrs["dilation"]],
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", channels, size]),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [outputs, channels // group, kernel]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    assert count_macs(io.load(proto)).total == brute_force(size, channels, outputs, kernel, group, attrs)


ONE_NODE = {
    "depthwise": (
        "float[1,8,6,6] x, float[8,1,3,3] w",
        "Conv <group = 8, pads = [1,1,1,1]> (x, w)",
        8 * 36 * 9,
    ),
    "transposed conv": (
        "float[1,4,5,5] x, float[4,3,2,2] w",
        "ConvTranspose <strides = [2,2]> (x, w)",
        100 * 12,
    ),
    "gemm": ("float[2,8] x, float[3,8] w, float[3] b", "Gemm <transB = 1> (x, w, b)", 2 * 8 * 3),
    "gemm with transposed input": ("float[8,2] x, float[8,3] w", "Gemm <transA = 1> (x, w)", 2 * 8 * 3),
    "activations by activations": ("float[2,4,5,8] x, float[2,4,8,5] w", "MatMul (x, w)", 8 * 5 * 8 * 5),
    "broadcast batch": ("float[3,5,8] x, float[8,7] w", "MatMul (x, w)", 3 * 5 * 8 * 7),
    "dot product": ("float[8] x, float[8] w", "MatMul (x, w)", 8),
    "integer product": ("uint8[5,8] x, int8[8,7] w", "MatMulInteger (x, w)", 5 * 8 * 7),
    "integer convolution": ("uint8[1,3,6,6] x, int8[4,3,3,3] w", "ConvInteger (x, w)", 4 * 16 * 27),
    "einsum": (
        "float[2,5,8] x, float[2,7,8] w",
        'Einsum <equation = "bik,bjk->bij"> (x, w)',
        2 * 5 * 7 * 8,
    ),
    "einsum with ellipsis": (
        "float[3,2,5,8] x, float[2,8,7] w",
        'Einsum <equation = "...ik, ...kj -> ...ij"> (x, w)',
        3 * 2 * 5 * 7 * 8,
    ),
    "einsum of one operand": ("float[5,8] x", 'Einsum <equation = "ij->ji"> (x)', 0),
    "lstm": (
        "float[10,1,6] x, float[2,16,6] w, float[2,16,4] r",
        'LSTM <hidden_size = 4, direction = "bidirectional"> (x, w, r)',
        10 * 2 * 16 * (6 + 4),
    ),
    "gru": (
        "float[10,3,6] x, float[1,12,6] w, float[1,12,4] r",
        "GRU <hidden_size = 4> (x, w, r)",
        10 * 3 * 12 * (6 + 4),
    ),
    "rnn": (
        "float[10,3,6] x, float[1,4,6] w, float[1,4,4] r",
        "RNN <hidden_size = 4> (x, w, r)",
        10 * 3 * 4 * (6 + 4),
    ),
}


@pytest.mark.parametrize(("inputs", "call", "expected"), ONE_NODE.values(), ids=ONE_NODE)
def test_an_operator_costs_its_formula(inputs: str, call: str, expected: int) -> None:
    found = count_macs(model(f"g ({inputs}) => (y) {{ y = {call} }}"))
    assert (found.total, found.unknown) == (expected, ())


def test_quantized_operators_cost_what_their_float_forms_cost() -> None:
    found = count_macs(model(
        """g (uint8[1,3,6,6] x, int8[4,3,3,3] w, uint8[16,5] v, float s, uint8 z, int8 k) => (y)
        <int64[2] shape = {4, 16}> {
            c = QLinearConv (x, s, z, w, s, k, s, z)
            r = Reshape (c, shape)
            y = QLinearMatMul (r, s, z, v, s, z, s, z)
        }"""
    ))  # fmt: skip
    assert by_name(found) == {"QLinearConv(c)": 4 * 16 * 27, "QLinearMatMul(y)": 4 * 16 * 5}


def test_a_weight_behind_dequantize_linear_is_a_weight() -> None:
    found = count_macs(model(
        """g (float[1,3,6,6] x) => (y) <int8[4,3,1,1] w = {1,1,1,1,1,1,1,1,1,1,1,1}, float s = {0.5}>
        { d = DequantizeLinear (w, s) y = Conv (x, d) }"""
    ))  # fmt: skip
    assert by_name(found) == {"Conv(y)": 36 * 12}


MICROSOFT = {
    "attention": (
        "Attention <num_heads = 2> (x, w, b)",
        {"x": (1, 6, 8), "w": (8, 24), "b": (24,)},
        6 * 8 * 24 + 2 * 6 * 6 * 8,
    ),
    "attention with a past": (
        "Attention <num_heads = 2> (x, w, b, , p)",
        {"x": (1, 2, 8), "w": (8, 24), "p": (2, 1, 2, 5, 4)},
        2 * 8 * 24 + 2 * 2 * 7 * 8,
    ),
    "heads": (
        "MultiHeadAttention <num_heads = 2> (x, w, b)",
        {"x": (1, 6, 8), "w": (1, 9, 8), "b": (1, 9, 4)},
        6 * 9 * (8 + 4),
    ),
    "shared heads": (
        "GroupQueryAttention <num_heads = 4, kv_num_heads = 2> (x, w, b, p)",
        {"x": (1, 3, 32), "w": (1, 3, 16), "p": (1, 2, 5, 8)},
        3 * (3 + 5) * 2 * 32,
    ),
    "packed weight": (
        "MatMulNBits <K = 64, N = 10, bits = 4, block_size = 32> (x, w, b)",
        {"x": (1, 6, 64)},
        6 * 64 * 10,
    ),
    "transposed": ("FusedMatMul <transA = 1> (x, w)", {"x": (5, 3), "w": (5, 7), "y": (3, 7)}, 3 * 5 * 7),
    "fused convolution": ("FusedConv (x, w, b)", {"w": (4, 3, 3, 3), "y": (1, 4, 6, 6)}, 4 * 36 * 27),
}


@pytest.mark.parametrize(("call", "known", "expected"), MICROSOFT.values(), ids=MICROSOFT)
def test_operators_of_onnx_runtime_cost_their_formula(
    call: str, known: dict[str, tuple[int, ...]], expected: int
) -> None:
    found = count_macs(
        model(f"g (float x, float w, float b, float p) => (y) {{ y = com.microsoft.{call} }}"), known=known
    )
    assert (found.total, found.unknown) == (expected, ())


@pytest.mark.parametrize(
    ("inputs", "attributes", "expected"),
    [
        ("float[1,4,6,8] q, float[1,2,9,8] k, float[1,2,9,5] v", "", 4 * 6 * 9 * (8 + 5)),
        (
            "float[1,6,32] q, float[1,9,16] k, float[1,9,10] v",
            "<q_num_heads = 4, kv_num_heads = 2>",
            4 * 6 * 9 * (8 + 5),
        ),
    ],
    ids=["heads apart", "heads packed"],
)
def test_attention_costs_two_products_per_head(inputs: str, attributes: str, expected: int) -> None:
    head = '<ir_version: 11, opset_import: ["" : 23]>'
    text = f"{head} g ({inputs}) => (y) {{ y = Attention {attributes} (q, k, v) }}"
    assert count_macs(io.load(onnx.parser.parse_model(text))).total == expected


def test_element_wise_operators_cost_nothing() -> None:
    found = count_macs(model(
        "g (float[1,4,6,6] x) => (y) { a = Relu (x) b = Mul (a, x) c = Softmax (b) y = GlobalMaxPool (c) }"
    ))  # fmt: skip
    assert (found.nodes, found.unknown) == ({}, ())


# --- open dimensions ----------------------------------------------------------------------------------------

OPEN = "g (float[N,3,H,H] x, float[4,3,3,3] w) => (y) { y = Conv <pads = [1,1,1,1]> (x, w) }"


def test_a_batch_dimension_is_one_and_others_are_unknown() -> None:
    found = count_macs(model(OPEN))
    assert found.total == 0
    assert [(u.where, u.op) for u in found.unknown] == [("Conv(y)", "Conv")]
    assert not found.exact


def test_sizes_give_open_dimensions_a_number() -> None:
    assert count_macs(model(OPEN), sizes={"H": 8}).total == 64 * 4 * 27
    assert count_macs(model(OPEN), sizes={"H": 8, "N": 2}).total == 2 * 64 * 4 * 27


def test_a_first_axis_that_is_a_sequence_is_no_batch() -> None:
    text = """g (float[seq_len,1,6] x, float[1,16,6] w, float[1,16,4] r) => (y) {
        y = LSTM <hidden_size = 4> (x, w, r)
    }"""
    assert not count_macs(model(text)).exact
    assert count_macs(model(text), sizes={"seq_len": 5}).total == 5 * 160


def test_counting_leaves_the_model_as_it_is() -> None:
    loaded = model(OPEN)
    before = loaded.to_bytes()
    count_with_run(
        loaded, feeds={"x": np.zeros((1, 3, 5, 5), np.float32), "w": np.zeros((4, 3, 3, 3), np.float32)}
    )
    assert loaded.to_bytes() == before


def test_what_has_no_rule_is_unknown() -> None:
    found = count_macs(model("g (float[2,2] x) => (z) { y = here.Mystery (x) z = com.microsoft.MoE (x) }"))
    assert {u.op for u in found.unknown} == {"here.Mystery", "com.microsoft.MoE"}


def test_a_node_that_breaks_its_definition_is_unknown() -> None:
    found = count_macs(
        model("g (float x, float w) => (y) { y = Gemm (x, w) }"), known={"x": (), "w": (), "y": ()}
    )
    assert "do not fit" in found.unknown[0].reason


# --- branches, loops, functions -----------------------------------------------------------------------------

BRANCHES = """g (bool c, float[4,8] x, float[8,2] small, float[8,64] large) => (y) {
    y = If (c) <
        then_branch = a () => (s) { s = MatMul (x, small) },
        else_branch = b () => (l) { l = MatMul (x, large) }
    >
}"""


def test_an_if_costs_its_dearest_branch() -> None:
    assert by_name(count_macs(model(BRANCHES))) == {"MatMul(l)": 4 * 8 * 64}


def test_after_a_run_an_if_costs_the_branch_that_ran() -> None:
    feeds = {
        "c": np.array(True),
        "x": np.zeros((4, 8), np.float32),
        "small": np.zeros((8, 2), np.float32),
        "large": np.zeros((8, 64), np.float32),
    }
    _, found = count_with_run(model(BRANCHES), feeds=feeds)
    assert by_name(found) == {"MatMul(s)": 4 * 8 * 2}


LOOP = """g (float[8,8] x, int64 count) => (y) <int64 three = {{3}}, bool yes = {{1}}> {{
    y = Loop ({count}, yes, x) <body = b (int64 i, bool go, float[8,8] v) => (bool go_on, float[8,8] w)
        {{ {condition} w = MatMul (v, x) }}>
}}"""


def test_a_loop_costs_its_body_times_a_constant_trip_count() -> None:
    found = count_macs(model(LOOP.format(count="three", condition="go_on = Identity (go)")))
    assert (found.total, found.notes) == (3 * 512, ())


@pytest.mark.parametrize(("count", "condition"), [("count", "Identity (go)"), ("three", "Not (go)")])
def test_a_loop_of_unknown_length_counts_once_and_says_so(count: str, condition: str) -> None:
    found = count_macs(model(LOOP.format(count=count, condition=f"go_on = {condition}")))
    assert found.total == 512
    assert "counts once" in found.notes[0]


def test_a_scan_costs_its_body_times_the_sequence_length() -> None:
    found = count_macs(model(
        """g (float[5,4] xs, float[4,4] w) => (last, ys) <float[4] start = {0, 0, 0, 0}> {
            last, ys = Scan <num_scan_inputs = 1,
                body = b (float[4] s, float[4] x) => (float[4] t, float[4] o)
                    { t = MatMul (s, w) o = Add (t, x) }> (start, xs)
        }"""
    ))  # fmt: skip
    assert found.total == 5 * 16


FUNCTIONS = """g (float[1,4,6,6] x, float[4,2,3,3] w, float[4,1,3,3] v) => (z) {
    y = here.block <groups: int = 2> (x, w)
    z = here.block <groups: int = 4> (y, v)
}
<domain: "here", opset_import: ["" : 17, "here" : 1]> block <groups> (a, b) => (c) {
    c = here.inner <n: int = @groups> (a, b)
}
<domain: "here", opset_import: ["" : 17]> inner <n> (a, b) => (c) {
    d = Conv <group: int = @n, pads = [1,1,1,1]> (a, b)
    c = Relu (d)
}"""


def test_a_local_function_costs_its_body_at_each_call() -> None:
    found = count_macs(model(FUNCTIONS))
    assert list(found.nodes.values()) == [4 * 36 * 2 * 9, 4 * 36 * 9]
    assert found.exact


# --- shapes of a run ----------------------------------------------------------------------------------------


def test_a_run_gives_the_shapes_of_all_values() -> None:
    feeds = {"x": np.zeros((2, 3, 5, 5), np.float32), "w": np.zeros((4, 3, 3, 3), np.float32)}
    assert concrete_shapes(model(OPEN), feeds) == {"x": (2, 3, 5, 5), "w": (4, 3, 3, 3), "y": (2, 4, 5, 5)}


def test_a_run_gives_shapes_that_inference_cannot_know() -> None:
    loaded = model(
        """g (float[6,8] x, float[6,1] mask, float[8,3] w) => (y) <int64[1] axis = {1}> {
            b = Cast <to = 9> (mask)
            f = Squeeze (b, axis)
            r = Compress <axis = 0> (x, f)
            y = MatMul (r, w)
        }"""
    )
    assert not count_macs(loaded).exact
    feeds = {
        "x": np.ones((6, 8), np.float32),
        "mask": np.eye(6, 1, dtype=np.float32),
        "w": np.ones((8, 3), np.float32),
    }
    assert count_with_run(loaded, feeds=feeds)[1].total == 1 * 8 * 3


def test_a_run_gives_shapes_of_models_with_local_functions() -> None:
    feeds = {
        "x": np.zeros((1, 4, 6, 6), np.float32),
        "w": np.zeros((4, 2, 3, 3), np.float32),
        "v": np.zeros((4, 1, 3, 3), np.float32),
    }
    shapes = concrete_shapes(model(FUNCTIONS), feeds)
    assert shapes["y"] == shapes["z"] == (1, 4, 6, 6)


def test_a_fixed_size_model_that_inference_gives_up_on_is_run_on_made_up_inputs() -> None:
    loaded = model("g (float[N,8] x, float[8,3] w) => (y) { a = com.microsoft.Gelu (x) y = MatMul (a, w) }")
    assert not count_macs(loaded).exact
    assert count_with_run(loaded)[1].total == 24


def test_a_sample_that_does_not_fit_is_a_data_error() -> None:
    with pytest.raises(DataError, match="does not run on the sample"):
        concrete_shapes(
            model(OPEN), {"x": np.zeros((2, 7, 5, 5), np.float32), "w": np.zeros((4, 3, 3, 3), np.float32)}
        )


def test_a_sample_of_another_rank_is_a_data_error() -> None:
    with pytest.raises(DataError):
        count_with_run(model(OPEN), feeds={"x": np.zeros(3, np.float32)})


# --- published numbers --------------------------------------------------------------------------------------

PUBLISHED = {
    "resnet20_cifar10": (40.5e6, 41.0e6),  # He et al. 2016, option A: 40.55 M
    "resnet56_cifar10": (125e6, 127e6),  # 125.49 M
    "squeezenet_winml_fp32": (345e6, 355e6),  # SqueezeNet 1.1: 0.35 G
    "sevenseg_cls_dith": (10.5e6, 11.5e6),  # MobileNetV2 0.35 at 96 x 96: 11 M
    "mlperf_kws_dscnn_fp32": (2.6e6, 2.8e6),  # MLPerf Tiny DS-CNN: 2.7 M
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_models_cost_what_was_published(name: str) -> None:
    path = ZOO / f"{name}.onnx"
    if not path.exists():
        pytest.skip("the zoo is not here")
    found = count_macs(io.load(path))
    low, high = PUBLISHED[name]
    assert found.exact
    assert low <= found.total <= high
