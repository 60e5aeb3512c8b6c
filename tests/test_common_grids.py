"""One scale for values that meet in a sum: what it saves, when it is worth it, and what else decides a range."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp.calibration.data import open_data
from onnxcomp.calibration.ranges import choose
from onnxcomp.calibration.statistics import TensorStatistics
from onnxcomp.graph import Model
from onnxcomp.manager import Context
from onnxcomp.passes.common_grids import on_common_grids
from onnxcomp.passes.moments import observe_inputs
from onnxcomp.passes.placement import Placement, place
from onnxcomp.passes.read_through import read_through
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto
from onnxcomp.shapes import infer

X = np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)


def network(body: str, **scales: float) -> Model:
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[N, 3, 8, 8] x) => (float[N, 3, 8, 8] y) {{ {body} }}'
    )
    rng = np.random.default_rng(1)
    for name in ("w1", "w2", "w3"):
        values = (rng.standard_normal((3, 3, 1, 1)) * scales.get(name, 1.0)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return from_proto(proto)


def placed(model: Model) -> Placement:
    return place(model, model.graph, infer(model), Context())


def statistics(model: Model, plan: Placement) -> dict[str, TensorStatistics]:
    data = open_data({"x": X}, open_session(model).inputs)
    return observe_inputs(
        model, plan, data, grams=False, threads=1, memory=1 << 30, seed=0, progress=lambda share, text: None
    ).statistics


def shared(model: Model) -> dict[str, Any] | None:
    plan = placed(model)
    seen = statistics(model, plan)
    return on_common_grids(plan, {name: choose(s, "mse") for name, s in seen.items()}, seen)


SUM = "a = Conv (x, w1) b = Conv (x, w2) s = Add (a, b) r = Relu (s) y = Conv (r, w3)"


def test_terms_of_like_size_and_their_sum_get_one_scale() -> None:
    found = shared(network(SUM))

    assert found is not None
    assert found["a"].scale == found["b"].scale == found["r"].scale
    assert found["r"].zero_point == 0
    assert found["x"].scale != found["r"].scale


def test_a_sum_on_the_grid_of_its_terms_is_not_rounded() -> None:
    found = shared(network(SUM))
    assert found is not None
    terms = [found[name].apply(np.random.default_rng(2).uniform(-1, 1, 1000)) for name in ("a", "b")]
    total = np.maximum(terms[0] + terms[1], 0)

    np.testing.assert_allclose(found["r"].apply(total), total, atol=1e-6)


def test_sums_of_small_values_stay_off_the_grid_of_a_large_one_that_is_added_later() -> None:
    found = shared(
        network(
            "a = Conv (x, w1) b = Conv (x, w3) s = Add (a, b) c = Conv (x, w2) t = Add (s, c) y = Conv (t, w3)",
            w1=0.01,
            w3=0.01,
        )
    )

    assert found is not None
    assert found["a"].scale < found["t"].scale / 10


def test_positive_values_keep_their_codes_through_a_leaky_relu() -> None:
    leaky = "a = Conv (x, w1) r = LeakyRelu <alpha = 0.01> (a) m = MaxPool <kernel_shape = [1, 1]> (r)"
    found = shared(network(f"{leaky} y = Conv (m, w3)"))

    assert found is not None
    assert found["a"].scale == found["r"].scale


def test_a_term_that_is_always_zero_is_no_trouble() -> None:
    found = shared(network(SUM, w1=0.0))

    assert found is not None
    assert found["a"].apply(np.zeros(1)) == 0


def test_a_graph_without_sums_has_nothing_to_share() -> None:
    assert shared(network("a = Conv (x, w1) r = Relu (a) y = Conv (r, w3)")) is None


def test_a_term_of_a_rectified_sum_counts_as_far_down_as_the_other_one_reaches() -> None:
    model = network(SUM)
    session = open_session(network(SUM.replace("y = Conv (r, w3)", "y = Max (a, n) n = Neg (b)")), optimize=False)
    effective = session.run({"x": X})[0]

    seen = statistics(model, placed(model))

    assert (seen["a"].minimum, seen["a"].maximum) == pytest.approx((effective.min(), effective.max()))


@pytest.mark.parametrize("extra", ["", "t = Add (s, s) "])
def test_a_sum_that_is_not_rectified_takes_its_terms_whole(extra: str) -> None:
    model = network(f"a = Conv (x, w1) b = Conv (x, w2) s = Add (a, b) {extra} y = Conv (s, w3)")
    whole = open_session(network("y = Conv (x, w1)")).run({"x": X})[0]

    seen = statistics(model, placed(model))

    assert seen["a"].minimum == pytest.approx(whole.min(), rel=1e-5)


@pytest.mark.parametrize(
    ("body", "x", "expected"),
    [
        ("h = HardSwish (a)", [-4.0, -1.5, 3.5], [0.0, -0.375, 3.5]),
        ("g = Sigmoid (a) h = Mul (g, a)", [0.0, 2.0], [0.0, 1.7615942]),
        ("g = HardSigmoid <alpha = 0.2, beta = 0.5> (a) h = Mul (a, g)", [-3.0, 1.0], [0.0, 0.7]),
        ("h = LeakyRelu <alpha = 0.25> (a)", [-4.0, 2.0], [-1.0, 2.0]),
        ("h = Tanh (a)", [0.5], [0.46211717]),
    ],
)
def test_the_function_through_which_a_value_is_read_is_found(body: str, x: list[float], expected: list[float]) -> None:
    model = network(f"a = Conv (x, w1) {body} y = Conv (h, w3)")

    function = read_through(placed(model))["a"]

    np.testing.assert_allclose(function(np.array(x)), expected, rtol=1e-6)


@pytest.mark.parametrize("body", ["h = HardSwish (a) k = Add (a, h)", "g = Sigmoid (a) h = Mul (g, x) k = Add (h, a)"])
def test_a_value_that_is_read_otherwise_too_has_no_function(body: str) -> None:
    assert "a" not in read_through(placed(network(f"a = Conv (x, w1) {body} y = Conv (k, w3)")))


def test_a_range_need_not_reach_where_the_function_is_flat() -> None:
    seen = TensorStatistics()
    seen.add(np.random.default_rng(3).normal(scale=3, size=8000).astype(np.float32))

    def hard_swish(x: np.ndarray) -> np.ndarray:
        return x * np.clip(x / 6 + 0.5, 0, 1)

    plain, through = choose(seen, "mse"), choose(seen, "mse", through=hard_swish)
    x = np.random.default_rng(4).normal(scale=3, size=8000)
    errors = [np.square(hard_swish(q.apply(x)) - hard_swish(x)).mean() for q in (plain, through)]

    assert -4 < through.low < -2.5
    assert errors[1] < 0.6 * errors[0]
