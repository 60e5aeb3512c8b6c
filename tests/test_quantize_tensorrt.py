"""The int8 layout for TensorRT: where Q/DQ stand, what they hold, and that the result is right on the CPU provider."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxcomp
from onnxcomp.calibration.data import open_data
from onnxcomp.errors import ProviderError
from onnxcomp.graph import Constant, Model, producer
from onnxcomp.manager import Context, PassRecord, Pipeline, run_pass
from onnxcomp.providers import TENSORRT
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto

RNG = np.random.default_rng(0)
MODELS = Path(__file__).parents[1] / "models"
PICTURES = {"x": RNG.standard_normal((40, 3, 12, 12)).astype(np.float32)}


def parse(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    return from_proto(proto)


def w(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) * 0.2).astype(np.float32)


def residual() -> Model:
    return parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 12, 12] x) => (float[N, 32] y) {
          a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
          ar = Relu (a)
          b = Conv <pads = [1, 1, 1, 1]> (ar, w2, b2)
          s = Add (b, ar)
          sr = Relu (s)
          p = GlobalAveragePool (sr)
          f = Flatten (p)
          y = Gemm <transB = 1> (f, w3, b3)
        }""",
        w1=w(16, 3, 3, 3), b1=w(16), w2=w(16, 16, 3, 3), b2=w(16), w3=w(32, 16), b3=w(32),
    )  # fmt: skip


def quantized(model: Model, data: Any, spec: str = "quantize:islands=false") -> tuple[Model, PassRecord]:
    ctx = Context(data=open_data(data, open_session(model).inputs), target="tensorrt")
    copy = model.copy()
    return copy, run_pass(Pipeline.parse(spec).passes[0], copy, ctx)


def node(model: Model, op: str, output: str) -> Any:
    return next(n for n in model.graph.nodes if n.op == op and n.outputs[0].name == output)


def behind_pair(value: Any) -> bool:
    """Whether a value comes out of a Q/DQ pair."""
    dequantize = producer(value)
    if dequantize is None or dequantize.op != "DequantizeLinear":
        return False
    quantize = producer(dequantize.inputs[0])
    return quantize is not None and quantize.op == "QuantizeLinear"


def sqnr(a: Model, b: Model, feeds: dict[str, np.ndarray]) -> float:
    x, y = (open_session(m).run(feeds)[0].astype(np.float64) for m in (a, b))
    return float(10 * np.log10(np.square(x).sum() / np.square(x - y).sum()))


def test_activations_are_signed_with_zero_point_zero_and_nothing_is_unsigned() -> None:
    result, record = quantized(residual(), PICTURES)

    pairs = [n for n in result.graph.nodes if n.op == "QuantizeLinear"]
    assert pairs
    assert record.details["quantized"] == 3
    for one in pairs:
        assert one.inputs[2].dtype == np.int8
        assert one.inputs[2].values == 0
        assert one.inputs[1].values > 0
    types = {i.weight.data_type for i in result.graph.initializers}
    assert not types & {onnx.TensorProto.UINT8, onnx.TensorProto.INT32}


def test_weights_are_stored_as_int8_per_channel_and_biases_stay_float() -> None:
    result, _ = quantized(residual(), PICTURES)

    for op, output, axis, channels in (("Conv", "a", 0, 16), ("Gemm", "y", 0, 32)):
        one = node(result, op, output)
        dequantize = producer(one.inputs[1])
        assert dequantize is not None
        assert dequantize.op == "DequantizeLinear"
        assert (dequantize.inputs[0].dtype, dequantize.attrs["axis"]) == (np.int8, axis)
        assert dequantize.inputs[1].shape == (channels,)
        assert isinstance(one.inputs[2], Constant)
        assert one.inputs[2].dtype == np.float32


def test_of_a_residual_sum_only_the_skip_branch_is_quantized() -> None:
    result, _ = quantized(residual(), PICTURES)

    add = node(result, "Add", "s")
    assert [behind_pair(t) for t in add.inputs] == [False, True]
    assert producer(add.inputs[0]) is node(result, "Conv", "b")
    assert behind_pair(node(result, "GlobalAveragePool", "p").inputs[0])


def test_with_a_convolution_on_the_skip_branch_the_deeper_one_stays_inside_its_kernel() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 16, 12, 12] x) => (float[N, 16, 12, 12] y) {
          a = Conv (x, w1)
          ar = Relu (a)
          b = Conv (ar, w2)
          d = Conv (x, w3)
          s = Add (d, b)
          y = Relu (s)
        }""",
        w1=w(16, 16, 1, 1), w2=w(16, 16, 1, 1), w3=w(16, 16, 1, 1),
    )  # fmt: skip
    result, _ = quantized(model, {"x": RNG.standard_normal((40, 16, 12, 12)).astype(np.float32)})

    assert [behind_pair(t) for t in node(result, "Add", "s").inputs] == [True, False]


def test_what_meets_in_a_concat_shares_its_scale() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 16, 8, 8] x) => (float[N, 16, 8, 8] y) {
          a = Conv (x, w1)
          b = Conv (a, w2)
          c = Concat <axis = 1> (a, b)
          y = Conv (c, w3)
        }""",
        w1=w(16, 16, 1, 1), w2=w(16, 16, 1, 1), w3=w(16, 32, 1, 1),
    )  # fmt: skip
    data = {"x": RNG.standard_normal((40, 16, 8, 8)).astype(np.float32)}
    result, _ = quantized(model, data)

    concat = node(result, "Concat", "c")
    reader = node(result, "Conv", "y")
    scales = {float(producer(t).inputs[1].values) for t in (*concat.inputs, reader.inputs[0])}
    assert len(scales) == 1
    assert sqnr(model, result, data) > 30


def test_vectors_and_few_channels_stay_in_float_with_a_reason() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 8, 6, 6] x) => (float[1, 64] y) {
          a = Conv (x, w1)
          p = GlobalAveragePool (a)
          f = Flatten (p)
          y = Gemm <transB = 1> (f, w2)
        }""",
        w1=w(32, 8, 3, 3), w2=w(64, 32),
    )  # fmt: skip
    result, record = quantized(model, {"x": RNG.standard_normal((8, 8, 6, 6)).astype(np.float32)})

    assert record.details["quantized"] == 0
    assert len(record.refused) == 2
    assert all("fp16" in r.reason for r in record.refused)
    assert not any(n.op == "QuantizeLinear" for n in result.graph.nodes)


def test_a_transposed_convolution_is_quantized_along_its_output_channels() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 16, 6, 6] x) => (float[N, 24, 12, 12] y) {
          y = ConvTranspose <strides = [2, 2]> (x, w1, b1)
        }""",
        w1=w(16, 24, 2, 2), b1=w(24),
    )  # fmt: skip
    data = {"x": RNG.standard_normal((40, 16, 6, 6)).astype(np.float32)}
    result, record = quantized(model, data)

    dequantize = producer(node(result, "ConvTranspose", "y").inputs[1])
    assert dequantize is not None
    assert dequantize.attrs["axis"] == 1
    assert dequantize.inputs[1].shape == (24,)
    assert record.details["quantized"] == 1
    assert sqnr(model, result, data) > 30


def test_the_cuda_provider_gets_no_int8() -> None:
    ctx = Context(data=open_data(PICTURES, open_session(residual()).inputs), target="cuda")
    model = residual()

    record = run_pass(Pipeline.parse("quantize").passes[0], model, ctx)

    assert record.rewrites == 0
    assert "convert-fp16" in record.refused[0].reason


def test_without_the_provider_the_file_is_built_and_verified_if_no_speed_is_asked_for(tmp_path: Path) -> None:
    import onnxruntime

    if TENSORRT in onnxruntime.get_available_providers():
        pytest.skip("the provider is here")
    arguments: dict[str, Any] = {"calib": MODELS / "data" / "digits_resnet.calib.npz", "target": "tensorrt"}

    with pytest.raises(ProviderError, match="--bench-seconds 0"):
        onnxcomp.optimize(MODELS / "digits_resnet.onnx", tmp_path / "o.onnx", **arguments)
    assert list(tmp_path.iterdir()) == []
    report = onnxcomp.optimize(MODELS / "digits_resnet.onnx", tmp_path / "o.onnx", bench_seconds=0, **arguments)

    assert report.path.is_file()
    assert report.verification is not None
    assert report.verification.passed
    assert report.benchmark is None
    assert any("was not measured" in note for note in report.notes)
    assert report.optimized["file_bytes"] < 0.4 * report.original["file_bytes"]
