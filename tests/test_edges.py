"""Unusual inputs: what they are, and what a candidate has to do with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.parser import parse_model

from onnxcomp.calibration.data import open_data
from onnxcomp.edges import edge_feeds, empty_axes, made_up_feeds, resized
from onnxcomp.runtime import TensorSpec, open_session
from onnxcomp.verification import verify

MODELS = Path(__file__).parent.parent / "models"
HEAD = '<ir_version: 10, opset_import: ["" : 17]>\n'


def test_edge_inputs_change_floats_only_and_leave_the_feed_alone() -> None:
    feeds = {"x": np.arange(12, dtype=np.float32).reshape(1, 3, 4), "n": np.array([3], dtype=np.int64)}
    before = feeds["x"].copy()
    edges = edge_feeds(feeds)
    assert set(edges) == {"zeros", "ones", "large", "extremes", "constant channel"}
    assert set(np.unique(edges["extremes"]["x"])) == {0.0, 11.0}
    assert (edges["large"]["x"] == before * 10).all()
    flat = edges["constant channel"]["x"]
    assert (flat[:, 0] == flat[0, 0, 0]).all()
    assert (flat[:, 1:] == before[:, 1:]).all()
    assert all(edge["n"] is feeds["n"] for edge in edges.values())
    assert (feeds["x"] == before).all()


def test_a_model_without_float_inputs_has_no_edge_inputs() -> None:
    assert edge_feeds({"n": np.array([3])}) == {}


def test_open_axes_are_resized_one_by_one_and_stay_consistent() -> None:
    specs = [TensorSpec("a", "tensor(float)", ("N", "T", 2)), TensorSpec("b", "tensor(float)", ("N", None))]
    feeds = {"a": np.arange(24, dtype=np.float32).reshape(3, 4, 2), "b": np.ones((3, 5), np.float32)}
    made = resized(feeds, specs, (0, 7))
    assert set(made) == {"N = 0", "N = 7", "T = 0", "T = 7", "b:1 = 0", "b:1 = 7"}
    assert [made["N = 7"][k].shape for k in "ab"] == [(7, 4, 2), (7, 5)]
    assert [made["T = 0"][k].shape for k in "ab"] == [(3, 0, 2), (3, 5)]
    assert (made["N = 7"]["a"][3:6] == feeds["a"]).all()


def test_indices_go_to_both_ends_of_the_table() -> None:
    proto = parse_model(HEAD + """m (int64[N, 3] ids) => (float[N, 3, 1] y) <float[5, 1] table = {0, 1, 2, 3, 4}>
        { y = Gather(table, ids) }""")
    made = made_up_feeds({"ids": np.ones((2, 3), np.int64)}, open_session(proto).inputs, proto, seed=0)
    assert (made["first index"]["ids"] == 0).all()
    assert (made["last index"]["ids"] == 4).all()
    assert made["synthesized 0"]["ids"].shape == (2, 3)


def test_a_recurrent_model_that_would_end_the_process_on_an_empty_batch_is_not_given_one() -> None:
    path = MODELS / "digits_gru.onnx"
    assert empty_axes(path, open_session(path).inputs) == frozenset()


def test_a_model_that_takes_an_empty_batch_is_given_one() -> None:
    path = MODELS / "cancer_mlp.onnx"
    assert empty_axes(path, open_session(path).inputs) == {"batch = 0"}


def failure(original: str, candidate: str, x: str = "float[N, 3] x", y: str = "float[N, 3] y") -> str:
    """Why a float candidate fails that agrees on 16 ordinary samples."""
    head = f"{HEAD} m ({x}) => ({y}) "
    sides = [parse_model(head + body) for body in (original, candidate)]
    spec = open_session(sides[0]).inputs
    rng = np.random.default_rng(0)
    array = rng.random((16, 3), np.float32) + 1 if "float" in x else rng.integers(0, 3, (16, 3))
    found = verify(sides[0], sides[1], open_data({"x": array}, spec), effect="float")
    assert found.verdict == "failed", found.verdict
    return "; ".join(found.reasons)


def test_a_table_that_lost_its_last_row_fails_on_the_last_index() -> None:
    reason = failure(
        "<float[4, 1] t = {5, 6, 7, 8}> { y = Gather(t, x) }", "<float[3, 1] t = {5, 6, 7}> { y = Gather(t, x) }",
        x="int64[N, 3] x", y="float[N, 3, 1] y",
    )  # fmt: skip
    assert "'last index'" in reason


def test_a_candidate_that_holds_for_the_usual_length_only_fails_on_others() -> None:
    reason = failure("{ y = Identity(x) }", "<int64[2] s = {16, 3}> { y = Reshape(x, s) }")
    assert "does not run on inputs of kind 'N = 7'" in reason


def test_a_candidate_that_is_right_for_positive_values_only_fails_on_made_up_ones() -> None:
    reason = failure("{ y = Identity(x) }", "{ y = Abs(x) }")
    assert "'synthesized 0'" in reason


def test_another_shape_on_an_edge_input_fails() -> None:
    narrow = """<float zero = {0}, int64[1] axis = {0}, int64[1] start = {0}, int64[1] end = {0}, int64[1] far = {99}>
        { top = ReduceMax<keepdims = 0>(x) some = Greater(top, zero)
          stop = Where(some, far, end)  y = Slice(x, start, stop, axis) }"""
    assert "has the shape (0, 3) on inputs of kind 'zeros'" in failure("{ y = Identity(x) }", narrow)


@pytest.mark.parametrize("effect", ["float", "lossy"])
def test_a_candidate_that_changes_between_two_runs_fails(effect: str) -> None:
    head = f"{HEAD} m (float[N, 3] x) => (float[N, 3] y) "
    original = parse_model(head + "{ y = Identity(x) }")
    noisy = parse_model(head + "<float small = {0.01}> { n = RandomNormalLike(x) m = Mul(n, small) y = Add(x, m) }")
    data = open_data({"x": np.ones((16, 3), np.float32)}, open_session(original).inputs)
    found = verify(original, noisy, data, effect=effect, max_drop=1.0)  # type: ignore[arg-type]
    assert found.verdict == "failed"
    assert any("changes between two equal runs" in r or "off by" in r for r in found.reasons)


def test_edges_do_not_fail_a_candidate_that_is_the_original() -> None:
    for name in ("digits_transformer", "digits_gru", "digits_mlp"):
        proto = onnx.load(MODELS / f"{name}.onnx")
        data = open_data(str(MODELS / "data" / f"{name}.calib.npz"), open_session(proto).inputs)
        assert verify(proto, proto, data, effect="float", samples=16).verdict == "equivalent"
