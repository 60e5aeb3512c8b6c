"""4-bit blocks and dynamic int8: the kernels that run, what the file holds, and how close the outputs stay."""

from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp.calibration.data import open_data
from onnxcomp.errors import UsageError
from onnxcomp.graph import Model
from onnxcomp.manager import Context, Pipeline, run_pass
from onnxcomp.profiling import executed_kernels
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto, to_bytes

RNG = np.random.default_rng(0)
INT4 = "quantize:mode=weights:weight-bits=4"
DYNAMIC = "quantize:mode=dynamic"


def parse(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    return from_proto(proto)


def w(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def products() -> Model:
    return parse(
        """<ir_version: 8, opset_import: ["" : 13]>
        g (float[N, 64] x) => (float[N, 96] y) {
          a = MatMul (x, w1)
          t = Tanh (a)
          y = Gemm <transB = 1, alpha = 0.5> (t, w2, b2)
        }""",
        w1=w(64, 64), w2=w(96, 64), b2=w(96),
    )  # fmt: skip


def changed(model: Model, spec: str, data: Any = None) -> Model:
    dataset = None if data is None else open_data(data, open_session(model).inputs)
    copy = model.copy()
    run_pass(Pipeline.parse(spec).passes[0], copy, Context(data=dataset))
    return copy


def kernels(model: Model, feeds: dict[str, np.ndarray]) -> dict[str, int]:
    return {k.op: round(k.count) for k in executed_kernels(to_bytes(model), feeds, runs=2)}


def sqnr(a: Model, b: Model, feeds: dict[str, np.ndarray]) -> float:
    x, y = (open_session(m).run(feeds)[0].astype(np.float64) for m in (a, b))
    return float(10 * np.log10(np.square(x).sum() / np.square(x - y).sum()))


def correlated(rows: int) -> dict[str, np.ndarray]:
    """Inputs of few directions, as those of real layers are."""
    mix = np.random.default_rng(1).standard_normal((8, 64))
    return {"x": (RNG.standard_normal((rows, 8)) @ mix / 3).astype(np.float32)}


def test_4_bit_blocks_are_multiplied_without_unpacking() -> None:
    model = products()
    result = changed(model, INT4)

    ran = kernels(result, {"x": correlated(1)["x"]})
    assert ran["MatMulNBits"] == 2
    assert "DequantizeLinear" not in ran
    types = [i.weight.data_type for i in result.graph.initializers if len(i.shape) == 2]
    assert types.count(onnx.TensorProto.INT4) == 2
    assert result.opset == 21
    assert sqnr(model, result, correlated(16)) > 15


def test_second_moments_of_the_inputs_make_4_bits_more_exact() -> None:
    model, fresh = products(), correlated(64)

    near, close = changed(model, INT4), changed(model, INT4, correlated(256))

    assert sqnr(model, close, fresh) > sqnr(model, near, fresh) + 3


def test_second_moments_make_8_bit_weights_more_exact() -> None:
    model, fresh = products(), correlated(64)

    near, close = changed(model, "quantize:mode=weights"), changed(model, "quantize:mode=weights", correlated(256))

    assert sqnr(model, close, fresh) > sqnr(model, near, fresh) + 1


def test_a_tied_matrix_is_fused_wherever_it_is_read() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 64] x) => (float[N, 64] y) { a = MatMul (x, w1) b = Tanh (a) y = MatMul (b, w1) }""",
        w1=w(64, 64),
    )
    result = changed(model, INT4)

    assert kernels(result, correlated(1))["MatMulNBits"] == 2


def test_what_does_not_divide_into_blocks_is_stored_in_8_bits() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 50] x) => (float[N, 64] y) { y = MatMul (x, w1) }""",
        w1=w(50, 64),
    )
    result = changed(model, INT4)

    assert [i.dtype for i in result.graph.initializers if i.dtype == np.int8]


def test_4_bits_are_for_weights_alone() -> None:
    with pytest.raises(UsageError, match="mode=weights"):
        changed(products(), "quantize:weight-bits=4", correlated(32))


def test_dynamic_products_run_fused_and_share_the_conversion_of_their_input() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 64] x) => (float[N, 96] y, float[N, 64] z) {
          y = Gemm <transB = 1> (x, w2, b2)
          z = MatMul (x, w1)
        }""",
        w1=w(64, 64), w2=w(96, 64), b2=w(96),
    )  # fmt: skip
    result = changed(model, DYNAMIC)

    ran = kernels(result, correlated(1))
    assert "MatMul" not in ran
    assert "Gemm" not in ran
    assert ran.get("MatMulIntegerToFloat", 0) + ran.get("DynamicQuantizeMatMul", 0) == 2
    assert sum(n.op == "DynamicQuantizeLinear" for n in result.graph.nodes) == 1
    assert sqnr(model, result, correlated(16)) > 35


def test_an_lstm_runs_on_8_bits_with_its_states_and_both_directions() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[T, N, 16] x, float[2, N, 12] h, float[2, N, 12] c) => (float[T, 2, N, 12] y, float[2, N, 12] hn) {
          y, hn = LSTM <hidden_size = 12, direction = "bidirectional"> (x, w1, r1, b1, , h, c)
        }""",
        w1=w(2, 48, 16), r1=w(2, 48, 12), b1=w(2, 96),
    )  # fmt: skip
    feeds = {"x": RNG.standard_normal((5, 2, 16)).astype(np.float32)}
    feeds |= {name: RNG.standard_normal((2, 2, 12)).astype(np.float32) for name in "hc"}

    result = changed(model, DYNAMIC)

    assert kernels(result, feeds)["DynamicQuantizeLSTM"] == 1
    assert sqnr(model, result, feeds) > 30
    assert len(to_bytes(result)) < 0.6 * len(to_bytes(model))


def test_an_lstm_with_peepholes_stays() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[T, 1, 4] x) => (float[T, 1, 1, 4] y) { y = LSTM <hidden_size = 4> (x, w1, r1, , , , , p1) }""",
        w1=w(1, 16, 4), r1=w(1, 16, 4), p1=w(1, 12),
    )  # fmt: skip
    result = changed(model, DYNAMIC)

    assert [n.op for n in result.graph.nodes] == ["LSTM"]


def recurrent(op: str, gates: int, *, turns: int = 2) -> tuple[Model, dict[str, np.ndarray]]:
    model = parse(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[T, N, 24] x) => (float[T, {turns}, N, 24] y) {{
          y = {op} <hidden_size = 24, direction = "{"bidirectional" if turns == 2 else "forward"}"> (x, w1, r1)
        }}""",
        w1=w(turns, gates * 24, 24), r1=w(turns, gates * 24, 24),
    )  # fmt: skip
    common = RNG.standard_normal((6, 40, 1))
    return model, {"x": (common + 0.1 * RNG.standard_normal((6, 40, 24))).astype(np.float32)}


@pytest.mark.parametrize(
    ("op", "gates", "turns", "spec"),
    [
        ("LSTM", 4, 1, DYNAMIC),
        ("LSTM", 4, 2, DYNAMIC),
        ("LSTM", 4, 2, "quantize:mode=weights"),
        ("GRU", 3, 1, "quantize:mode=weights"),
    ],
)
def test_weights_of_recurrent_layers_are_rounded_for_what_they_are_multiplied_with(
    op: str, gates: int, turns: int, spec: str
) -> None:
    model, feeds = recurrent(op, gates, turns=turns)
    data = {"x": feeds["x"][None]}  # one feed

    blind, seeing = changed(model, spec), changed(model, spec, data)

    codes = [[i.values for i in m.graph.initializers if i.dtype == np.int8 and i.values.any()] for m in (blind, seeing)]
    assert len(codes[0]) == len(codes[1]) == 2
    assert all((a != b).any() for a, b in zip(*codes, strict=True))
    least = 0.0 if spec == DYNAMIC else 3.0  # inputs of dynamic layers are rounded as well
    assert sqnr(model, seeing, feeds) > sqnr(model, blind, feeds) + least


def test_dynamic_products_are_rounded_for_their_inputs() -> None:
    model, data = products(), correlated(256)

    blind, seeing = changed(model, DYNAMIC), changed(model, DYNAMIC, data)

    assert sqnr(model, seeing, data) > sqnr(model, blind, data)
    assert sqnr(model, changed(model, DYNAMIC + ":rounding=nearest", data), data) == sqnr(model, blind, data)
