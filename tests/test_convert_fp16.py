"""Half precision: what is converted, what stays and why, and that the interface and the results stay."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import onnxcomp
from onnxcomp.calibration.data import open_data
from onnxcomp.graph import Model, producer
from onnxcomp.manager import Context, PassRecord, Pipeline, run_pass
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto

RNG = np.random.default_rng(0)
MODELS = Path(__file__).parents[1] / "models"
HALF = onnx.TensorProto.FLOAT16


def parse(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    return from_proto(proto)


def w(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) * 0.2).astype(np.float32)


def converted(model: Model, data: Any = None, spec: str = "convert-fp16") -> tuple[Model, PassRecord]:
    dataset = None if data is None else open_data(data, open_session(model).inputs)
    copy = model.copy()
    return copy, run_pass(Pipeline.parse(spec).passes[0], copy, Context(data=dataset, target="cuda"))


def halves(model: Model) -> set[str]:
    """Operators that read or write a float16 value or weight."""
    found = set()
    for scope in model.graph.scopes():
        made = {n.outputs[0] for n in scope.nodes if n.op == "Cast" and n.attrs["to"] == HALF}
        for node in scope.nodes:
            weights = any(t.dtype == np.float16 for t in node.inputs if hasattr(t, "weight"))
            if node.op != "Cast" and (weights or any(t in made for t in node.inputs)):
                found.add(node.op)
            if node.op != "Cast" and any(t in made for t in node.inputs):
                made.update(node.outputs)
    return found


def error(a: Model, b: Model, feeds: dict[str, np.ndarray]) -> float:
    x, y = (open_session(m).run(feeds)[0].astype(np.float64) for m in (a, b))
    return float(np.square(x - y).sum() / np.square(x).sum())


def test_the_interface_stays_float32_with_one_conversion_at_each_border() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) {
          a = Conv <pads = [1, 1, 1, 1]> (x, w1)
          b = Relu (a)
          y = Conv <pads = [1, 1, 1, 1]> (b, w2)
        }""",
        w1=w(4, 3, 3, 3), w2=w(4, 4, 3, 3),
    )  # fmt: skip
    data = {"x": RNG.standard_normal((4, 3, 8, 8)).astype(np.float32)}

    result, record = converted(model)

    assert Counter(n.op for n in result.graph.nodes) == {"Cast": 2, "Conv": 2, "Relu": 1}
    session = open_session(result)
    assert [(i.name, i.kind) for i in (*session.inputs, *session.outputs)] == [
        ("x", "tensor(float)"), ("y", "tensor(float)"),
    ]  # fmt: skip
    assert {i.dtype for i in result.graph.initializers} == {np.dtype(np.float16)}
    assert record.details["float16"] == 3
    assert 0 < error(model, result, data) < 1e-5


def test_sums_of_squares_and_exponentials_stay_in_float32() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 8] x) => (float[N, 8] y) {
          a = MatMul (x, w1)
          m = ReduceMean <axes = [-1]> (a)
          c = Sub (a, m)
          p = Pow (c, two)
          v = ReduceMean <axes = [-1]> (p)
          e = Add (v, eps)
          r = Sqrt (e)
          d = Div (c, r)
          y = MatMul (d, w2)
        }""",
        w1=w(8, 8), w2=w(8, 8), two=np.float32([2]), eps=np.float32([1e-5]),
    )  # fmt: skip

    result, record = converted(model)

    assert halves(result) == {"MatMul"}
    assert any("range of float16" in r.reason for r in record.refused)


def test_a_weight_above_the_range_keeps_its_operator_and_a_mask_is_clamped() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4] x, bool[N, 4] c) => (float[N, 4] y) {
          a = MatMul (x, w1)
          b = Where (c, a, mask)
          s = Softmax (b)
          y = MatMul (s, big)
        }""",
        big=w(4, 4) * 1e6, w1=w(4, 4), mask=np.float32([-1e9]),
    )  # fmt: skip

    result, record = converted(model)

    assert [r.reason for r in record.refused if "65504" in r.reason] == ["a weight is above 65504"]
    mask = next(i for i in result.graph.initializers if i.name.startswith("mask"))
    assert mask.values.tolist() == [-65504.0]


def test_a_weight_too_small_for_half_precision_keeps_its_operator() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4] x) => (float[N, 4] y) {
          a = Add (x, eps)
          y = MatMul (a, w1)
        }""",
        eps=np.float32([1e-12]), w1=w(4, 4),
    )  # fmt: skip

    result, _ = converted(model)

    assert halves(result) == {"MatMul"}


def test_values_that_leave_the_range_on_the_data_stay_in_float32() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4] x) => (float[N, 4] y) {
          a = MatMul (x, w1)
          b = Mul (a, large)
          c = Mul (b, b)
          d = Mul (c, small)
          y = MatMul (d, w1)
        }""",
        w1=w(4, 4), large=np.float32([5e3]), small=np.float32([1e-3]),
    )  # fmt: skip
    data = {"x": RNG.standard_normal((64, 4)).astype(np.float32)}

    result, record = converted(model, data)

    assert error(model, result, data) < 1e-5
    assert {"Mul(c)", "Mul(d)"} <= {r.where for r in record.refused if "its values reach" in r.reason}


def test_what_breaks_the_budget_in_half_precision_goes_back_to_float32() -> None:
    """A difference of large values: each is in range, but what is left of them is lost in rounding."""
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4] x) => (float[N, 4] y) {
          a = Add (x, offset)
          b = Sub (a, offset)
          c = MatMul (b, w1)
          y = Tanh (c)
        }""",
        w1=w(4, 4), offset=np.float32([4096]),
    )  # fmt: skip

    result, record = converted(model, {"x": RNG.standard_normal((64, 4)).astype(np.float32)})

    assert record.details["float16"] > 0
    assert "Add" not in halves(result)
    assert record.details["sqnr_db"] > 40


def test_weights_of_subgraphs_are_converted_once() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4] x, bool c) => (float[N, 4] y) {
          a = MatMul (x, w1)
          y = If (c) <
            then_branch = t () => (float[N, 4] u) { u = MatMul (a, w1) },
            else_branch = e () => (float[N, 4] v) { p = MatMul (a, w1) v = Relu (p) }
          >
        }""",
        w1=w(4, 4),
    )  # fmt: skip
    x = RNG.standard_normal((3, 4)).astype(np.float32)

    result, record = converted(model)

    assert record.details["float16"] == 4
    assert [i.dtype for s in result.graph.scopes() for i in s.initializers] == [np.dtype(np.float16)]
    for flag in (True, False):
        assert error(model, result, {"x": x, "c": np.asarray(flag)}) < 1e-5


def test_scales_of_a_resize_and_8_bit_operators_keep_their_types() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 2, 4, 4] x) => (float[1, 2, 8, 8] y) {
          q = QuantizeLinear (x, s, z)
          d = DequantizeLinear (q, s, z)
          a = Conv (d, w1)
          y = Resize (a, roi, scales)
        }""",
        s=np.float32(0.1), z=np.uint8(128), w1=w(2, 2, 1, 1),
        roi=np.zeros(0, np.float32), scales=np.float32([1, 1, 2, 2]),
    )  # fmt: skip
    x = RNG.standard_normal((1, 2, 4, 4)).astype(np.float32)

    result, _ = converted(model)

    resize = next(n for n in result.graph.nodes if n.op == "Resize")
    assert resize.inputs[2].dtype == np.float32
    conv = next(n for n in result.graph.nodes if n.op == "Conv")
    assert producer(conv.inputs[0]).op == "DequantizeLinear"
    assert error(model, result, {"x": x}) < 1e-5


def test_operators_and_nodes_that_are_named_stay() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4] x) => (float[N, 4] y) { a = MatMul (x, w1) b = Tanh (a) y = MatMul (b, w1) }""",
        w1=w(4, 4),
    )

    result, _ = converted(model, spec="convert-fp16:keep=Tanh:skip=MatMul(a)")

    assert halves(result) == {"MatMul"}
    first = next(n for n in result.graph.nodes if n.op == "MatMul")
    assert first.inputs[1].dtype == np.float32


def test_the_target_cuda_gets_half_precision_without_a_gpu(tmp_path: Path) -> None:
    report = onnxcomp.optimize(
        MODELS / "digits_transformer.onnx",
        tmp_path / "o.onnx",
        calib=MODELS / "data" / "digits_transformer.calib.npz",
        target="cuda",
        bench_seconds=0,
    )

    assert [p.name for p in report.passes if p.effect == "lossy"] == ["convert-fp16"]
    assert report.verification is not None
    assert report.verification.passed
    assert report.optimized["file_bytes"] < 0.6 * report.original["file_bytes"]


def test_a_pass_that_converts_nothing_leaves_the_count_of_the_passes_before_it() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4] x) => (float[N, 4] y) {
          y = Relu (x)
        }"""
    )
    ctx = Context(target="cuda", rewrites=["an earlier pass"])

    record = run_pass(Pipeline.parse("convert-fp16:keep=Relu").passes[0], model, ctx)

    assert record.rewrites == 0
    assert ctx.rewrites == ["an earlier pass"]
