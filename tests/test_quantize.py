"""Static int8: which kernels run, what stays in float and why, and how close the outputs stay."""

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp.calibration.data import open_data
from onnxcomp.errors import UsageError
from onnxcomp.graph import Constant, Model
from onnxcomp.manager import Context, Pipeline, run_pass
from onnxcomp.passes.quantize import Quantize
from onnxcomp.profiling import executed_kernels
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto, to_bytes

RNG = np.random.default_rng(0)


def parse(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    return from_proto(proto)


def w(*shape: int, scale: float = 0.2) -> np.ndarray:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def residual() -> Model:
    return parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 12, 12] x) => (float[N, 5] y) {
          a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
          ar = Relu (a)
          b = Conv <pads = [1, 1, 1, 1]> (ar, w2, b2)
          s = Add (b, ar)
          sr = Relu (s)
          p = GlobalAveragePool (sr)
          f = Flatten (p)
          y = Gemm <transB = 1> (f, w3, b3)
        }""",
        w1=w(16, 3, 3, 3), b1=w(16), w2=w(16, 16, 3, 3), b2=w(16), w3=w(5, 16), b3=w(5),
    )  # fmt: skip


def quantized(model: Model, data: Any, spec: str = "quantize") -> tuple[Model, Context, Any]:
    ctx = Context(data=open_data(data, open_session(model).inputs))
    copy = model.copy()
    record = run_pass(Pipeline.parse(spec).passes[0], copy, ctx)
    return copy, ctx, record


def kernels(model: Model, feeds: dict[str, np.ndarray]) -> Counter[str]:
    return Counter({k.op: round(k.count) for k in executed_kernels(to_bytes(model), feeds, runs=2)})


def sqnr(a: Model, b: Model, feeds: dict[str, np.ndarray]) -> float:
    x, y = (open_session(m).run(feeds)[0].astype(np.float64) for m in (a, b))
    return float(10 * np.log10(np.square(x).sum() / np.square(x - y).sum()))


def stored(model: Model) -> int:
    """Matrices that the file holds as int8."""
    return sum(i.weight.data_type == onnx.TensorProto.INT8 and len(i.shape) >= 2 for i in model.graph.initializers)


IMAGES = {"x": RNG.standard_normal((40, 3, 12, 12)).astype(np.float32)}


def test_every_conv_and_the_residual_sum_run_on_8_bits() -> None:
    model = residual()

    result, _, record = quantized(model, IMAGES, "quantize:islands=false")

    ran = kernels(result, {"x": IMAGES["x"][:1]})
    assert ran["QLinearConv"] == 2
    assert ran["QLinearAdd"] == 1
    assert ran["QGemm"] == 1
    assert ran["Conv"] + ran["FusedConv"] + ran["Gemm"] + ran["Relu"] == 0
    assert record.details["quantized"] == record.rewrites == 3


def test_outputs_stay_close_on_unseen_samples() -> None:
    model = residual()
    fresh = {"x": np.random.default_rng(9).standard_normal((16, 3, 12, 12)).astype(np.float32)}

    result, _, _ = quantized(model, IMAGES)

    assert sqnr(model, result, fresh) > 30


def test_second_order_rounding_and_bias_correction_do_not_lose_to_nearest() -> None:
    model = residual()
    _, _, best = quantized(model, IMAGES)
    _, _, plain = quantized(model, IMAGES, "quantize:rounding=nearest:bias-correction=false:islands=false")

    assert best.details["sqnr_db"] >= plain.details["sqnr_db"]


def test_weights_are_stored_as_int8_and_biases_as_int32() -> None:
    result, _, _ = quantized(residual(), IMAGES, "quantize:islands=false")

    types = Counter(i.weight.data_type for i in result.graph.initializers if len(i.shape) >= 2)
    assert types == {onnx.TensorProto.INT8: 3}
    biases = [i for i in result.graph.initializers if i.weight.data_type == onnx.TensorProto.INT32]
    assert sum(b.weight.size > 1 for b in biases) >= 3


def test_a_shared_weight_is_stored_once() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 8] x) => (float[N, 8] y) {
          a = MatMul (x, w1)
          t = Tanh (a)
          y = MatMul (t, w1)
        }""",
        w1=w(8, 8),
    )

    result, _, _ = quantized(model, {"x": RNG.standard_normal((32, 8)).astype(np.float32)}, "quantize:rounding=nearest")

    assert stored(result) == 1


def test_a_weight_that_two_layers_share_is_rounded_once_for_both() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 12, 12] x) => (float[N, 3, 12, 12] y) {
          a = Conv (x, w1)
          t = Tanh (a)
          y = Conv (t, w1)
        }""",
        w1=w(3, 3, 1, 1),
    )

    result, _, record = quantized(model, IMAGES, "quantize:islands=false:weight-bits=7")

    assert record.details["steps_db"]["second-order rounding"] > 20
    assert stored(result) == 1


def test_a_linear_layer_gives_float_and_what_follows_stays_fused() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 6, 16] x) => (float[N, 6, 16] y) {
          a = MatMul (x, w1)
          b = Add (a, b1)
          y = LayerNormalization (b, s, t)
        }""",
        w1=w(16, 16), b1=w(16), s=np.ones(16, np.float32), t=np.zeros(16, np.float32),
    )  # fmt: skip
    data = {"x": RNG.standard_normal((32, 6, 16)).astype(np.float32)}

    result, _, _ = quantized(model, data)

    ran = kernels(result, {"x": data["x"][:1]})
    assert ran["MatMulIntegerToFloat"] == 1
    assert ran["MatMul"] == 0
    assert ran["QuantizeLinear"] == 1


def test_the_interface_keeps_names_and_shapes_where_a_conv_is_the_output() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) { y = Conv <pads = [1, 1, 1, 1]> (x, w1) }""",
        w1=w(4, 3, 3, 3),
    )

    result, _, _ = quantized(model, {"x": RNG.standard_normal((20, 3, 8, 8)).astype(np.float32)})

    session = open_session(result)
    assert [(o.name, o.shape) for o in session.outputs] == [("y", ("N", 4, 8, 8))]


def test_depthwise_relu6_and_padding_of_channels_run_on_8_bits() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 8, 8, 8] x) => (float[N, 12, 8, 8] y) {
          a = Conv <group = 8, pads = [1, 1, 1, 1]> (x, w1)
          ac = Clip (a, zero, six)
          p = Pad (ac, pads)
          c = Conv (p, w2)
          y = Add (c, p)
        }""",
        w1=w(8, 1, 3, 3), w2=w(12, 12, 1, 1), zero=np.float32(0), six=np.float32(6),
        pads=np.array([0, 2, 0, 0, 0, 2, 0, 0]),
    )  # fmt: skip
    data = {"x": RNG.standard_normal((20, 8, 8, 8)).astype(np.float32)}

    result, _, _ = quantized(model, data, "quantize:islands=false")

    ran = kernels(result, {"x": data["x"][:1]})
    assert ran["QLinearConv"] == 2
    assert ran["Clip"] == 0
    assert ran["QLinearAdd"] == 1
    assert sqnr(model, result, data) > 25


def test_skipped_nodes_stay_in_float() -> None:
    model = residual()
    for number, node in enumerate(model.graph.nodes):
        node.name = f"n{number}"

    result, _, record = quantized(model, IMAGES, "quantize:skip=n0:islands=false")

    assert record.details["quantized"] == 2
    (skipped,) = [n for n in result.graph.nodes if n.name == "n0"]
    assert skipped.op == "Conv"
    assert skipped.inputs[1].dtype == np.float32
    assert isinstance(skipped.inputs[1], Constant)


def test_a_transposed_convolution_is_refused_with_its_reason() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4, 6, 6] x) => (float[N, 4, 8, 8] y) {
          a = Conv <pads = [1, 1, 1, 1]> (x, w1)
          y = ConvTranspose (a, w2)
        }""",
        w1=w(4, 4, 3, 3), w2=w(4, 4, 3, 3),
    )  # fmt: skip

    _, ctx, _ = quantized(model, {"x": RNG.standard_normal((20, 4, 6, 6)).astype(np.float32)})

    assert any("no 8-bit kernel" in r.reason for r in ctx.refusals)


def test_why_a_weight_is_not_quantized_is_told_apart() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4] x, float[4, 4] open) => (float[N, 4] y, float[N, N] z) {
          stored = DequantizeLinear (codes, scale)
          a = MatMul (x, stored)
          y = MatMul (a, open)
          t = Transpose <perm = [1, 0]> (a)
          z = MatMul (a, t)
        }""",
        open=w(4, 4), codes=np.ones((4, 4), np.int8), scale=np.float32(0.1),
    )  # fmt: skip

    _, ctx, _ = quantized(model, {"x": RNG.standard_normal((20, 4)).astype(np.float32)})

    reasons = [r.reason for r in ctx.refusals]
    assert [r.split(",")[0] for r in reasons] == [
        "it is quantized already", "its weight is also an input of the model", "its weight is not constant"
    ]  # fmt: skip


def test_an_old_opset_is_raised_only_as_far_as_needed() -> None:
    model = parse(
        """<ir_version: 4, opset_import: ["" : 9]>
        g (float[N, 3, 8, 8] x) => (float[N, 4, 6, 6] y) { y = Conv (x, w1) }""",
        w1=w(4, 3, 3, 3),
    )

    result, _, _ = quantized(model, {"x": RNG.standard_normal((20, 3, 8, 8)).astype(np.float32)})

    assert result.opset == 13
    open_session(result)


def test_rewrites_past_the_limit_are_not_made() -> None:
    model = residual()
    ctx = Context(data=open_data(IMAGES, open_session(model).inputs), limit=1)

    record = run_pass(Quantize(islands=False), model, ctx)

    assert record.rewrites == 1
    assert stored(model) == 1


def test_equal_runs_give_equal_bytes() -> None:
    model = residual()
    first, second = (to_bytes(quantized(model, IMAGES)[0]) for _ in range(2))

    assert first == second


def test_without_data_it_says_which_option_is_missing() -> None:
    with pytest.raises(UsageError, match="--calib"):
        run_pass(Quantize(), residual(), Context())


def test_weight_only_storage_is_folded_at_load_and_costs_no_kernel() -> None:
    model = residual()

    result, _, record = quantized(model, IMAGES, "quantize:mode=weights")

    assert record.details["stored_as_int8"] == 2
    assert len(to_bytes(result)) < 0.45 * len(to_bytes(model))
    ran = kernels(result, {"x": IMAGES["x"][:1]})
    assert ran["Cast"] + ran["Mul"] + ran["DequantizeLinear"] == 0
    assert sqnr(model, result, IMAGES) > 35


def test_weight_only_storage_keeps_float16_models_free_of_casts_at_run_time() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float16[N, 64] x) => (float16[N, 64] y) { y = MatMul (x, w1) }""",
        w1=w(64, 64).astype(np.float16),
    )
    plain = kernels(model, {"x": np.ones((1, 64), np.float16)})

    result, _, _ = quantized(model, {"x": np.ones((8, 64), np.float16)}, "quantize:mode=weights")

    assert kernels(result, {"x": np.ones((1, 64), np.float16)}) == plain


def test_seven_bit_weights_cannot_saturate_sixteen_bit_sums() -> None:
    result, _, _ = quantized(residual(), IMAGES, "quantize:weight-bits=7:islands=false")

    codes = [i.values for i in result.graph.initializers if i.weight.data_type == onnx.TensorProto.INT8]
    assert max(int(np.abs(c.astype(int)).max()) for c in codes) == 64


def test_a_processor_without_int8_dot_products_gets_seven_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcomp.passes.builder.has_int8_dot_product", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")

    result, _, _ = quantized(residual(), IMAGES, "quantize:islands=false")

    codes = [i.values for i in result.graph.initializers if i.weight.data_type == onnx.TensorProto.INT8]
    assert max(int(np.abs(c.astype(int)).max()) for c in codes) == 64


def test_a_bias_too_large_for_its_scale_does_not_overflow() -> None:
    model = residual()
    weight = np.array(model.graph.initializers[0].values)
    weight[3] *= 1e-9
    model.graph.initializers[0].values = weight
    bias = np.array(model.graph.initializers[1].values)
    bias[3] = 2.0
    model.graph.initializers[1].values = bias

    result, _, _ = quantized(model, IMAGES, "quantize:islands=false")

    assert sqnr(model, result, IMAGES) > 25


def test_weights_behind_noisy_inputs_shrink_along_directions_that_hold_little() -> None:
    from onnxcomp.calibration.gram import Gram
    from onnxcomp.linear import linear
    from onnxcomp.passes.qdq import quantize_weight
    from onnxcomp.passes.rounding import round_with

    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 2] x) => (float[N, 1] y) { y = MatMul (x, w1) }""",
        w1=np.float32([[1.0], [1.0]]),
    )
    view = linear(model, model.graph.nodes[0])
    assert view is not None
    gram = Gram.empty(1, 2)
    gram.add(RNG.standard_normal((1, 5000, 2)) * np.array([1.0, 0.1]))

    result, _ = round_with(view, quantize_weight(view), gram, centered=False, noise=0.01)

    # W C (C + noise I)^-1 = [1 / 1.01, 0.01 / 0.02]
    np.testing.assert_allclose(result.dequantized()[:, 0], [0.99, 0.5], atol=0.03)


def test_a_half_precision_model_runs_in_8_bits_and_keeps_its_interface() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float16[N, 3, 8, 8] x) => (float16[N, 4, 8, 8] y) {
          a = Conv <pads = [1, 1, 1, 1]> (x, w1)
          b = Relu (a)
          y = Conv <pads = [1, 1, 1, 1]> (b, w2)
        }""",
        w1=w(4, 3, 3, 3).astype(np.float16), w2=w(4, 4, 3, 3).astype(np.float16),
    )  # fmt: skip
    data = {"x": RNG.standard_normal((40, 3, 8, 8)).astype(np.float16)}

    result, _, _ = quantized(model, data)

    assert kernels(result, {"x": data["x"][:1]})["QLinearConv"] == 2
    session = open_session(result)
    assert [i.kind for i in (*session.inputs, *session.outputs)] == ["tensor(float16)"] * 2
    assert sqnr(model, result, data) > 25
