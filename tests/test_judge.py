"""What a judgement on held-out samples allows."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest

from onnxcomp.calibration.data import open_data
from onnxcomp.graph import Model
from onnxcomp.passes.judge import Judge, acceptable, prudent
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto


def test_few_samples_allow_less_noise_than_many() -> None:
    seen = (21.0, 0.0, 0.0)
    assert acceptable(seen[:2], 0.01)
    assert prudent(seen, 0.01, counted=1000)
    assert not prudent(seen, 0.01, counted=20)
    assert prudent((28.0, 0.0, 0.0), 0.01, counted=20)


def test_the_drop_to_expect_counts_where_none_was_seen() -> None:
    assert prudent((40.0, 0.0, 0.007), 0.01, counted=100)
    assert not prudent((40.0, 0.0, 0.009), 0.01, counted=100)
    assert not prudent((40.0, 0.009, 0.0), 0.01, counted=100)


def test_a_ratio_of_powers_needs_no_count() -> None:
    assert prudent((20.0, 0.007, 0.007), 0.01, counted=0)


@pytest.mark.parametrize(("output", "counted"), [("y", 12), ("z", 0)])
def test_samples_are_counted_where_outputs_are_classes(output: str, counted: int) -> None:
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
        net (float[n, 3] x) => (float[{"n, 3" if output == "y" else "n, 3, 1"}] {output}) <int64[3] s = {{0, 3, 1}}> {{
            y = Relu (x)
            z = Reshape (y, s)
        }}""")
    reference: Model = from_proto(model)
    x = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    data = open_data({"x": x}, open_session(reference).inputs)
    assert Judge(reference, data, samples=64).counted == counted


@pytest.mark.parametrize(("after", "counted"), [("Identity", 0), ("Softmax", 12)])
def test_values_of_which_one_is_always_the_largest_are_classes_only_as_probabilities(after: str, counted: int) -> None:
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
        net (float[n, 3] x) => (float[n, 3] y) <float[3] far = {{0, 9, 0}}> {{
            a = Add (x, far)
            y = {after} (a)
        }}""")
    reference: Model = from_proto(model)
    x = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    data = open_data({"x": x}, open_session(reference).inputs)
    assert Judge(reference, data, samples=64).counted == counted


@pytest.mark.parametrize(("enough", "taken"), [(None, 12), (1, 4), (4 * 2 * 50 + 1, 12), (10**9, 12)])
def test_where_each_sample_has_much_to_compare_few_are_taken(enough: int | None, taken: int) -> None:
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        net (float[n, 5, 10] x) => (float[n, 5, 10] y) { y = Relu (x) }""")
    reference: Model = from_proto(model)
    x = np.random.default_rng(0).normal(size=(12, 5, 10)).astype(np.float32)
    data = open_data({"x": x}, open_session(reference).inputs)

    judge = Judge(reference, data, samples=64, enough=enough)

    assert sum(len(values[0]) for values in judge._expected) == taken


def test_one_sample_with_a_large_error_hardly_moves_the_typical_ratio() -> None:
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        net (float[n, 5, 10] x) => (float[n, 5, 10] y) <float[1] top = {TOP}, float[1] one = {1.01}> {
            c = Min (x, top)
            y = Mul (c, one)
        }""".replace("TOP", "1e9"))
    clipped: Model = from_proto(model)
    x = np.random.default_rng(0).normal(size=(40, 5, 10)).astype(np.float32)
    x[7] *= 100
    reference = from_proto(onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        net (float[n, 5, 10] x) => (float[n, 5, 10] y) { y = Identity (x) }"""))
    data = open_data({"x": x}, open_session(reference).inputs)
    even = Judge(reference, open_data({"x": x[8:]}, open_session(reference).inputs)).assess(clipped)
    uneven = Judge(reference, data).assess(clipped)

    assert even.typical == pytest.approx(even.sqnr, abs=0.2)
    assert uneven.sqnr == pytest.approx(40, abs=0.2)
    assert uneven.typical > uneven.sqnr + 8
