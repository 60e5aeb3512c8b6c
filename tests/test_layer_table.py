"""Layers of two models side by side: pairing, times from a profile of fused nodes, errors, histograms, ranges."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from onnxcomp import io
from onnxcomp.graph import Model
from onnxcomp.layer_table import layer_table
from onnxcomp.layer_values import look_inside, quantized_ranges
from onnxcomp.layers import Place, places
from onnxcomp.macs import count_with_run
from onnxcomp.node_times import NodeTimes, attributed
from onnxcomp.placement import KernelRun
from onnxcomp.profiling import execution

NOTHING = NodeTimes({}, 0.0)
NETWORK = """
<ir_version: 8, opset_import: ["" : 17]>
network (float[1, 2, 4, 4] x) => (float[1, 3] y) <
    float[2, 2, 1, 1] w1 = {1.0, 0.0, 0.0, 1.0},
    float[2, 2, 1, 1] w2 = {1.0, 2.0, 3.0, 4.0},
    float[2, 3] w3 = {1.0, 0.0, 2.0, 3.0, 4.0, 0.0}
> {
    a = Conv (x, w1)
    b = Relu (a)
    c = Conv (b, w2)
    d = GlobalAveragePool (c)
    e = Flatten (d)
    y = Gemm (e, w3)
}
"""


def _model(text: str, names: dict[str, str] | None = None) -> Model:
    """The model; nodes whose first output is a key of `names` are called so, others have no name."""
    proto = onnx.parser.parse_model(text)
    for node in proto.graph.node:
        node.name = (names or {}).get(node.output[0], "")
    return io.load(proto)


def _places(model: Model) -> list[Place]:
    return places(model, *count_with_run(model))


def _ran(name: str, op: str, us: float) -> KernelRun:
    return KernelRun(name, op, "CPUExecutionProvider", 1.0, us)


def _times(model: Model, *nodes: KernelRun) -> dict[str, float]:
    found = attributed(model, [p.node for p in _places(model)], nodes)
    return {node.outputs[0].name: us for node, us in found.by_node.items()}


NAMED = {"a": "first", "c": "second", "y": "head"}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([("first", "Conv"), ("second", "Conv")], {"a": 1.0, "c": 2.0}),
        ([("b_nchwc", "Conv"), ("second_nchwc", "Conv")], {"a": 1.0, "c": 2.0}),
        ([("first_token_6", "QLinearConv"), ("head_quant", "QGemm")], {"a": 1.0, "y": 2.0}),
        ([("d_nchwc", "GlobalAveragePool"), ("ReorderOutput", "ReorderOutput")], {}),
        ([("", "Conv"), ("Flatten_4", "Flatten")], {}),
        ([("first", "Conv"), ("first", "Cast")], {"a": 3.0}),
    ],
)
def test_fused_and_renamed_nodes_count_for_the_layer_behind(nodes, expected):
    ran = [_ran(name, op, us) for us, (name, op) in enumerate(nodes, 1)]

    assert _times(_model(NETWORK, NAMED), *ran) == expected


def test_nodes_without_names_are_found_by_their_place_in_the_file():
    assert _times(_model(NETWORK), _ran("Conv_0", "Conv", 5.0), _ran("Relu_0", "Relu", 7.0)) == {"a": 5.0}


def test_fused_nodes_without_names_are_taken_in_order_only_if_all_are_there():
    ran = [_ran("_token_30", "QLinearConv", 2.0), _ran("_token_9", "QLinearConv", 1.0)]

    assert _times(_model(NETWORK), *ran) == {"a": 1.0, "c": 2.0}
    assert _times(_model(NETWORK), ran[0]) == {}


def test_the_profile_of_a_real_run_covers_its_convolutions():
    model = _model(NETWORK)
    nodes = execution(model, {"x": np.ones((1, 2, 4, 4), np.float32)}).runs

    found = attributed(model, [p.node for p in _places(model)], nodes)

    assert {n.outputs[0].name for n in found.by_node} == {"a", "c", "y"}
    assert 0 < sum(found.by_node.values()) <= found.total


def test_layers_are_paired_by_name_also_where_a_name_comes_twice():
    before = _model(NETWORK, {"a": "conv", "c": "conv", "y": "head"})
    after = _model(NETWORK.replace("y = Gemm (e, w3)", "y = MatMul (e, w3)"), {"a": "conv", "y": "other"})

    rows, omitted = layer_table(
        _places(before), _places(after), original_times=NOTHING, optimized_times=NOTHING, errors={"conv": 0.01}
    )

    sides = {(r["name"], r["original"] is not None, r["optimized"] is not None): r for r in rows}
    assert omitted == 0
    assert list(sides) == [
        ("conv", True, True),
        ("conv", True, False),
        ("head", True, False),
        ("Conv(c)", False, True),
        ("other", False, True),
    ]
    assert rows[0]["sqnr_db"] == pytest.approx(20)
    assert rows[1]["error"] is None
    assert rows[2]["original"]["sparsity"] == pytest.approx(2 / 6)
    assert rows[2]["original"]["macs"] == 6


def test_of_very_many_layers_the_small_ones_are_left_out():
    model = _model(NETWORK)
    one = _places(model)
    small, large = one[2:] * 1200, one[:1]

    rows, omitted = layer_table(
        [*small, *large], [], original_times=NOTHING, optimized_times=NOTHING, errors={}
    )

    assert len(rows) == 1000
    assert omitted == 201
    assert rows[-1]["name"] == "Conv(a)"


QUANTIZED = """
<ir_version: 8, opset_import: ["" : 17]>
quantized (float[batch, 64] x) => (float[batch, 64] y) <float s = {0.5}, uint8 z = {10}> {
    x_q = QuantizeLinear (x, s, z)
    x_dq = DequantizeLinear (x_q, s, z)
    w = DequantizeLinear <axis = 1> (w_q, sw, zw)
    h = MatMul (x_dq, w)
    y = Relu (h)
}
"""
FLOAT = """
<ir_version: 8, opset_import: ["" : 17]>
plain (float[batch, 64] x) => (float[batch, 64] y) {
    h = MatMul (x, w)
    y = Relu (h)
}
"""


def _pair() -> tuple[Model, Model, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (64, 64)).astype(np.int8)
    scales = np.linspace(0.001, 0.01, 64).astype(np.float32)
    weight = (codes * scales).astype(np.float32)
    stored = {"w_q": codes, "sw": scales, "zw": np.zeros(64, np.int8)}
    found = []
    for text, arrays in ((FLOAT, {"w": weight}), (QUANTIZED, stored)):
        proto = onnx.parser.parse_model(text)
        proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in arrays.items())
        proto.graph.node[-2].name = "product"
        found.append(io.load(proto))
    return found[0], found[1], weight


def test_the_range_of_codes_follows_from_scale_and_zero_point():
    ranges = quantized_ranges(_pair()[1])

    assert list(ranges) == ["x"]
    assert (ranges["x"].low, ranges["x"].high, ranges["x"].steps) == (-5.0, 122.5, (0.5, 0.5))


def test_inner_values_are_compared_and_what_lies_outside_of_a_range_is_counted():
    before, after, weights = _pair()
    x = np.zeros((1, 64), np.float32)
    x[0, :4] = (-20.0, 200.0, 1.0, 2.0)

    found = look_inside(before, after, (_places(before), _places(after)), [{"x": x}])

    weight, activation = found.histograms
    assert (weight["tensor"], weight["kind"]) == ("product", "weight")
    assert weight["original"] == weight["optimized"]
    assert sum(weight["original"]) == 64 * 64
    assert weight["steps"] == pytest.approx([0.001, 0.01])
    assert weight["range"] == pytest.approx([-1.28, 1.27])
    assert (activation["tensor"], activation["outside"]) == ("x", 2 / 64)
    clipped = np.clip(x, -5, 122.5)
    exact, rounded = x @ weights, clipped @ weights
    assert found.errors["product"] == pytest.approx(np.square(exact - rounded).sum() / np.square(exact).sum(), 1e-4)


def test_a_model_that_does_not_run_on_the_samples_gives_stored_weights_only():
    before, _, _ = _pair()

    found = look_inside(before, before, (_places(before), _places(before)), [{"x": np.ones((1, 3), np.float32)}])

    assert found.errors == {}
    assert [h["kind"] for h in found.histograms] == ["weight"]
