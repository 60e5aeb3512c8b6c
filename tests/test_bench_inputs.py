from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxcomp.bench_inputs import data_feeds, made_feeds, parse_shapes, require_same_inputs, with_batch, with_shapes
from onnxcomp.errors import DataError, UsageError
from onnxcomp.runtime import TensorSpec, open_session

HEADER = '<ir_version: 10, opset_import: ["" : 17]>'
OPEN = f"{HEADER} g (float[N, 3, H, W] x) => (float[N, 3, H, W] y) {{ y = Relu (x) }}"
FIXED = f"{HEADER} g (float[2, 3] x) => (float[2, 3] y) {{ y = Relu (x) }}"
STATE = f"{HEADER} g (float[N, 4] x, float[2, N, 4] h) => (float[2, N, 4] y) {{ y = Add (x, h) }}"
FOUR = f"""{HEADER} g (float[N, K] x) => (float[N, 4] y) <int64[2] to = {{-1, 4}}> {{
    wide = Reshape (x, to)
    y = Concat <axis = 1> (wide)
}}"""


def feeds(text, *, shapes=None, batch=None):
    proto = onnx.parser.parse_model(text)
    made = made_feeds(open_session(proto), proto, shapes=shapes or {}, batch=batch, seed=0)
    return {name: value.shape for name, value in made[0].items()}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {}),
        ("x=1x3x224x224", {"x": (1, 3, 224, 224)}),
        (["input:0=1x8", "b=2"], {"input:0": (1, 8), "b": (2,)}),
        ("a=1x2,b=3X4", {"a": (1, 2), "b": (3, 4)}),
        ("1x8", {"": (1, 8)}),
        ("sr=", {"sr": ()}),
        ({"x": [1, 8]}, {"x": (1, 8)}),
    ],
)
def test_shapes_are_given_as_text_or_mapping(given, expected):
    assert parse_shapes(given) == expected


@pytest.mark.parametrize("given", ["x=1xN", "x=-1x3", "x=1xx3", {"x": "ab"}])
def test_a_shape_that_is_none_is_a_usage_error(given):
    with pytest.raises(UsageError, match="--shape"):
        parse_shapes(given)


def test_inputs_are_made_in_the_shape_asked_for():
    assert feeds(OPEN, shapes={"x": (2, 3, 17, 5)}) == {"x": (2, 3, 17, 5)}
    assert feeds(OPEN, shapes={"": (1, 3, 9, 9)}) == {"x": (1, 3, 9, 9)}


def test_a_batch_stands_wherever_its_symbol_does():
    assert feeds(STATE, batch=8) == {"x": (8, 4), "h": (2, 8, 4)}
    assert feeds(STATE, shapes={"x": (3, 4)}) == {"x": (3, 4), "h": (2, 3, 4)}


def test_a_batch_that_the_model_fixes_is_accepted_as_it_is_and_no_other():
    assert feeds(FIXED, batch=2) == {"x": (2, 3)}
    with pytest.raises(UsageError, match="batch is 8, but the model fixes its inputs: x"):
        feeds(FIXED, batch=8)


def test_an_unnamed_first_dimension_takes_the_batch():
    specs = (TensorSpec("x", "tensor(float)", (None, 3)), TensorSpec("rate", "tensor(int64)", ()))

    assert [spec.shape for spec in with_batch(specs, 4)] == [(4, 3), ()]


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [({"y": (1,)}, "'y'"), ({"x": (1, 3)}, "'N', 3, 'H', 'W'"), ({"x": (1, 4, 8, 8)}, "'N', 3, 'H', 'W'")],
)
def test_a_shape_that_the_model_does_not_have_is_a_usage_error(shapes, expected):
    with pytest.raises(UsageError, match=expected):
        with_shapes([TensorSpec("x", "tensor(float)", ("N", 3, "H", "W"))], shapes)


def test_sizes_that_the_model_does_not_run_on_are_a_data_error():
    with pytest.raises(DataError, match=r"does not run on the inputs asked for \(x \[1, 3\]\)"):
        feeds(FOUR, shapes={"x": (1, 3)})


def test_data_come_in_batches_of_the_size_asked_for():
    session = open_session(onnx.parser.parse_model(OPEN))
    data = {"x": np.zeros((10, 3, 4, 4), np.float32)}
    found = data_feeds(data, session, preprocess=None, batch=4, seed=0)

    assert found[0]["x"].shape == (4, 3, 4, 4)


def test_data_that_cannot_fill_the_batch_are_a_usage_error():
    session = open_session(onnx.parser.parse_model(FIXED))

    with pytest.raises(UsageError, match="batch is 8"):
        data_feeds({"x": np.zeros((16, 3), np.float32)}, session, preprocess=None, batch=8, seed=0)


def test_models_with_other_inputs_are_named_with_both_sides():
    other = onnx.parser.parse_model(FIXED.replace("x)", "z)"))
    models = [("a.onnx", onnx.parser.parse_model(FIXED)), ("b.onnx", other)]

    with pytest.raises(DataError, match=r"b.onnx takes 'z' \(float\), but a.onnx takes 'x' \(float\)"):
        require_same_inputs(models)


def test_an_initializer_that_is_listed_as_an_input_does_not_count():
    old = onnx.parser.parse_model(f"{HEADER} g (float[2, 3] x, float[3] b) => (float[2, 3] y) {{ y = Add (x, b) }}")
    old.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "b"))

    require_same_inputs([("a.onnx", onnx.parser.parse_model(FIXED)), ("b.onnx", old)])


def test_a_model_without_inputs_has_no_batch():
    with pytest.raises(UsageError, match="batch is 8, but the model has no inputs"):
        with_batch((), 8)
