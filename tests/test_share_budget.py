"""share-weights within a drop: which plan is found, what it costs to find it, and what the check that counts says."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp.blame import Clock
from onnxcomp.calibration.data import open_data
from onnxcomp.graph import Constant, Model
from onnxcomp.manager import Context
from onnxcomp.passes.share_budget import turning_point
from onnxcomp.passes.share_weights import ShareWeights
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto

RNG = np.random.default_rng(4)


def w(*shape: int, scale: float = 0.2) -> np.ndarray:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def network() -> Model:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4, 16] x) => (float[N, 4, 24] y) {
          a = MatMul (x, w1)
          t = Tanh (a)
          y = MatMul (t, w2)
        }"""
    )
    weights = {"w1": w(16, 64), "w2": w(64, 24)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    return from_proto(proto)


DATA = {"x": w(60, 4, 16, scale=1.0)}


def run(model: Model, check: Any, data: Any = DATA, **options: Any) -> tuple[Model, Any, Context]:
    copy = model.copy()
    ctx = Context(data=open_data(data, open_session(model).inputs), max_drop=0.05, check=check)
    return copy, ShareWeights(**options).run(copy, ctx), ctx


def values(model: Model) -> dict[str, int]:
    items = [i for s in model.graph.scopes() for i in s.initializers if isinstance(i, Constant)]
    return {i.name: len(np.unique(i.values)) for i in items if i.weight.size >= 256}


def noise(a: Model, b: Model) -> float:
    x, y = (open_session(m).run(DATA)[0].astype(np.float64) for m in (a, b))
    return float(np.square(x - y).sum() / np.square(x).sum())


@given(st.integers(1, 90), st.data())
def test_the_last_good_place_is_found_from_anywhere(count: int, data: st.DataObject) -> None:
    last = data.draw(st.integers(0, count - 1))
    start = data.draw(st.integers(0, count - 1))
    asked: list[int] = []

    def good(place: int) -> bool:
        asked.append(place)
        return place <= last

    assert turning_point(good, start, count, most=100) == last
    assert len(asked) == len(set(asked))
    assert len(asked) <= 2 * (2 + int(np.log2(abs(last - start) + 2)))


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.data())
def test_the_place_is_good_whatever_the_answers_and_the_number_of_questions_are(
    answers: list[bool], data: st.DataObject
) -> None:
    start, most = data.draw(st.integers(0, len(answers) - 1)), data.draw(st.integers(1, 9))
    asked: list[int] = []

    def good(place: int) -> bool:
        asked.append(place)
        return answers[place]

    place = turning_point(good, start, len(answers), most=most)

    assert place == 0 or (answers[place] and place in asked)
    assert len(asked) <= most


@pytest.mark.parametrize(("last", "asked"), [(80, [40]), (30, [40, 38, 34, 26])])
def test_when_the_time_is_up_the_first_good_place_does(last: int, asked: list[int]) -> None:
    places: list[int] = []

    def good(place: int) -> bool:
        places.append(place)
        return place <= last

    found = turning_point(good, 40, 90, most=9, clock=Clock(0.0))

    assert places == asked
    assert found == asked[-1]


def test_the_check_that_counts_decides_where_it_is_stricter_than_the_judge() -> None:
    model = network()

    free, _, _ = run(model, None)
    strict, details, _ = run(model, lambda m: noise(model, m) <= 0.002)

    assert noise(model, free) > 0.002
    assert noise(model, strict) <= 0.002
    assert details["shared"]


def test_a_weight_that_the_budget_does_not_allow_to_change_stays_as_it_is() -> None:
    model = network()

    result, details, ctx = run(model, lambda m: noise(model, m) <= 5e-7)

    assert details["shared"] < 2
    assert len(ctx.rewrites) == details["shared"]
    assert noise(model, result) <= 5e-7


def test_nothing_is_shared_where_every_candidate_fails_the_check() -> None:
    model = network()

    result, details, ctx = run(model, lambda m: False)

    assert details["shared"] == 0
    assert not ctx.rewrites
    assert values(result) == values(model)


@pytest.mark.parametrize("samples", [1, 3, 19, 21])
def test_few_samples_are_enough(samples: int) -> None:
    model = network()

    result, details, _ = run(model, lambda m: noise(model, m) <= 0.02, {"x": DATA["x"][:samples]})

    assert details["shared"]
    assert noise(model, result) <= 0.02


def test_a_stream_that_cannot_be_split_is_judged_on_itself() -> None:
    model = network()

    _, details, _ = run(model, None, lambda: iter([DATA]))

    assert details["shared"] == 2
