"""Groups of layers that are slower in 8 bits go back to float. Times are given here, not measured."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp.calibration.data import open_data
from onnxcomp.graph import Model
from onnxcomp.manager import Context, PassRecord, Pipeline, run_pass
from onnxcomp.node_times import NodeTimes
from onnxcomp.passes import latency
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto

RNG = np.random.default_rng(0)
DATA = {"x": RNG.standard_normal((40, 4, 6, 6)).astype(np.float32)}


def two_groups() -> Model:
    """Two convolutions in a row, a Tanh that has no 8-bit kernel, and a third one."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4, 6, 6] x) => (float[N, 4, 6, 6] y) {
          a = Conv (x, w)
          b = Conv (a, w)
          t = Tanh (b)
          y = Conv (t, w)
        }"""
    )
    w = (RNG.standard_normal((4, 4, 1, 1)) * 0.3).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    return from_proto(proto)


def quantized(
    monkeypatch: pytest.MonkeyPatch, times: Mapping[str, float], ratio: float = 2.0
) -> tuple[Model, PassRecord]:
    """Quantize where nodes of the float model take 10 us, and those of an 8-bit model what `times` says by the name of
    their output (else 0).
    """

    def fake(model: Model, feeds: Any, **options: Any) -> NodeTimes:
        if any(n.op == "QuantizeLinear" for n in model.graph.nodes):
            found = {n: times.get(n.outputs[0].name, 0.0) for n in model.graph.nodes}
        else:
            found = dict.fromkeys(model.graph.nodes, 10.0)
        return NodeTimes(found, sum(found.values()))

    monkeypatch.setattr(latency, "node_times", fake)
    monkeypatch.setattr(latency, "speed_ratio", lambda *args, **options: ratio)
    model = two_groups()
    ctx = Context(data=open_data(DATA, open_session(model).inputs))
    return model, run_pass(Pipeline.parse("quantize:latency=true:islands=false").passes[0], model, ctx)


def test_a_group_that_loses_time_goes_back_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    _, record = quantized(monkeypatch, {"a": 5, "b": 5, "y_dq": 50})

    assert record.details["quantized"] == 2
    assert record.details["float_for_speed"] == ["Conv(y)"]


def test_conversions_count_for_the_group_that_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    _, record = quantized(monkeypatch, {"a": 5, "b": 5, "y_dq": 1, "t_q": 10})

    assert record.details["float_for_speed"] == ["Conv(y)"]


def test_at_the_border_of_a_group_that_pays_single_units_are_peeled_off(monkeypatch: pytest.MonkeyPatch) -> None:
    _, record = quantized(monkeypatch, {"a": 1, "b": 15, "y_dq": 1})

    assert record.details["float_for_speed"] == ["Conv(b)"]


def test_what_the_profile_proposes_has_to_make_the_whole_model_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    _, record = quantized(monkeypatch, {"a": 5, "b": 5, "y_dq": 50}, ratio=1.0)

    assert record.details["quantized"] == 3
    assert "float_for_speed" not in record.details


def test_where_every_group_loses_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    _, record = quantized(monkeypatch, {"a": 50, "b": 50, "y_dq": 50})

    assert record.details["quantized"] == 3


def test_a_model_is_as_fast_as_itself() -> None:
    model = two_groups()

    assert 0.2 < latency.speed_ratio(model, model, {"x": DATA["x"][:1]}, threads=1) < 5
