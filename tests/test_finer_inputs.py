"""finer inputs: the first layers read their input on two grids, and the function stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp.calibration.affine import QuantParameters
from onnxcomp.calibration.data import open_data
from onnxcomp.graph import Model
from onnxcomp.manager import Context
from onnxcomp.passes import quantize_search
from onnxcomp.passes.finer_inputs import with_finer_inputs
from onnxcomp.passes.quantize import Quantize
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto

RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((60, 3, 12, 12)).astype(np.float32)


def model(attributes: str = "pads = [1, 1, 1, 1]") -> Model:
    """A first layer that holds little of the work of three."""
    proto = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, H, W] x) => (float[N, 8, H2, W2] y) {{
          a = Conv <{attributes}> (x, w1, b1)  ar = Relu (a)
          b = Conv <pads = [1, 1, 1, 1]> (ar, w2)  br = Relu (b)
          y = Conv (br, w3)
        }}""")
    shapes = {"w1": (4, 3, 3, 3), "w2": (64, 4, 3, 3), "w3": (8, 64, 1, 1), "b1": (4,)}
    for name, shape in shapes.items():
        values = (np.random.default_rng(7).standard_normal(shape) * 0.2).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return from_proto(proto)


def quantized(original: Model, **options: Any) -> tuple[Model, dict[str, Any]]:
    copy = original.copy()
    data = open_data({"x": IMAGES}, open_session(original).inputs)
    details = Quantize(**{"islands": False, "island_cost": 1.0, **options}).run(copy, Context(data=data, max_drop=0.5))
    return copy, dict(details)


def copies(m: Model) -> int:
    """How often the first convolution reads a channel of the input."""
    weights = [n.inputs[1] for n in m.graph.nodes if n.op == "Conv"]
    source = weights[0].inputs[0].inputs[0] if weights[0].inputs else weights[0]
    return int(source.shape[1]) // 3


@pytest.mark.parametrize("attributes", ["pads = [1, 1, 1, 1]", "strides = [2, 2]", 'auto_pad = "SAME_UPPER"'])
def test_reading_the_input_twice_leaves_the_function(attributes: str) -> None:
    original = model(attributes)

    twice = with_finer_inputs(original, {"a"}, {"x": QuantParameters(0.02, 128, False)})

    before, after = (open_session(m).run({"x": IMAGES[:2]})[0] for m in (original, twice))
    assert copies(twice) == 2
    assert np.allclose(before, after, atol=1e-5)


def test_convolutions_that_read_one_input_share_its_copies() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 12, 12] x) => (float[N, 4, 12, 12] y) {
          a = Conv (x, w1)
          b = Conv (x, w2)
          y = Mul (a, b)
        }""")
    for name in ("w1", "w2"):
        values = RNG.standard_normal((4, 3, 1, 1)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    original = from_proto(proto)

    twice = with_finer_inputs(original, {"a", "b"}, {"x": QuantParameters(0.02, 128, False)})

    assert sorted(n.op for n in twice.graph.nodes) == ["Add", "Concat", "Conv", "Conv", "Mul"]
    before, after = (open_session(m).run({"x": IMAGES[:2]})[0] for m in (original, twice))
    assert np.allclose(before, after, atol=1e-5)


def test_zeros_around_a_picture_stay_zeros() -> None:
    """With a large step the shifts would show at the border if they did not add up to nothing."""
    original = model()

    twice = with_finer_inputs(original, {"a"}, {"x": QuantParameters(100.0, 128, False)})

    before, after = (open_session(m).run({"x": 0 * IMAGES[:1]})[0] for m in (original, twice))
    assert np.allclose(before[:, :, 3:-3, 3:-3], after[:, :, 3:-3, 3:-3], atol=1e-3)
    assert np.allclose(before, after, atol=1e-3)


def test_finer_inputs_bring_the_outputs_closer() -> None:
    original = model()

    fine, told = quantized(original)
    coarse, plain = quantized(original, finer_inputs=False)

    assert copies(fine) == 2
    assert copies(coarse) == 1
    assert told["steps_db"]["finer inputs"] > plain["steps_db"]["second-order rounding"] + 0.3


def test_a_first_layer_with_much_of_the_work_is_left_alone() -> None:
    fine, told = quantized(model(), island_cost=0.01)

    assert copies(fine) == 1
    assert "finer inputs" not in told["steps_db"]


def test_a_first_layer_that_is_faster_in_float_reads_its_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_is_slow(best: Any, build: Any, *_: Any, **__: Any) -> Any:
        return build(replace(best.decisions, skip=best.decisions.skip | {"a"}))

    monkeypatch.setattr(quantize_search, "drop_slow_groups", first_is_slow)
    monkeypatch.setattr(quantize_search, "speed_ratio", lambda *_, **__: 1.0)

    result, told = quantized(model(), latency=True)

    assert told["steps_db"]["finer inputs"] > 0
    assert told["quantized"] == 2
    assert copies(result) == 1
    x, y = (open_session(m).run({"x": IMAGES[:4]})[0] for m in (model(), result))
    assert np.square(x - y).sum() < 0.01 * np.square(x).sum()


def test_what_is_not_worth_its_time_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_search, "drop_slow_groups", lambda best, *_, **__: best)
    monkeypatch.setattr(quantize_search, "speed_ratio", lambda *_, **__: 0.5)

    refused, told = quantized(model(), latency=True)
    never, plain = quantized(model(), latency=True, finer_inputs=False)

    assert told["steps_db"].pop("finer inputs") > 0
    assert told["steps_db"] == plain["steps_db"]
    x, y = (open_session(m).run({"x": IMAGES[:4]})[0] for m in (refused, never))
    assert np.array_equal(x, y)
