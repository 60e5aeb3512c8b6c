"""Verdicts on candidates: every verdict, what always fails, and what leaves a verdict open."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.parser import parse_model

from onnxcomp.calibration.batches import sample_hashes
from onnxcomp.calibration.data import Dataset, open_data
from onnxcomp.errors import DataError, InconclusiveError, ModelError, UsageError, VerificationError
from onnxcomp.runtime import open_session
from onnxcomp.verification import verify

HEAD = '<ir_version: 10, opset_import: ["" : 17]>\n'


def model(
    body: str, x: str = "float[N, 3] x", y: str = "float[N, 3] y", constants: str = ""
) -> onnx.ModelProto:
    return parse_model(f"{HEAD} m ({x}) => ({y}) {constants} {{ {body} }}")


def scaled(factors: Sequence[float], **kwargs: str) -> onnx.ModelProto:
    return model("y = Mul(x, f)", constants=f"<float[3] f = {{{', '.join(map(str, factors))}}}>", **kwargs)


def dataset(proto: onnx.ModelProto, samples: int = 64, labels: Any = None, **arrays: np.ndarray) -> Dataset:
    x = np.random.default_rng(0).standard_normal((samples, 3)).astype(np.float32)
    source = {"x": x, **arrays} if labels is None else {"x": x, **arrays, "labels": np.asarray(labels)}
    return open_data(source, open_session(proto).inputs, batch=10)


IDENTITY = scaled([1, 1, 1])
TRIPLE = scaled([3, 3, 3])


def test_an_exact_candidate_with_equal_bits_is_equivalent() -> None:
    v = verify(TRIPLE, TRIPLE, dataset(TRIPLE), effect="exact")
    assert (v.verdict, v.passed, v.samples, v.reasons) == ("equivalent", True, 64, ())
    v.raise_if_failed()


def test_an_exact_candidate_off_by_one_bit_fails_and_names_output_and_sample() -> None:
    v = verify(TRIPLE, scaled([3, 3, 3.0000005]), dataset(TRIPLE), effect="exact")
    assert v.verdict == "failed"
    assert "'y' differs in" in v.reasons[0]
    assert f"worst at sample {v.outputs['y'].errors.worst_sample}" in v.reasons[0]
    with pytest.raises(VerificationError, match="'y' differs"):
        v.raise_if_failed()


def test_a_float_candidate_may_round_differently_but_not_more() -> None:
    data = dataset(TRIPLE)
    assert verify(TRIPLE, scaled([3, 3, 3.0000005]), data, effect="float").verdict == "equivalent"
    v = verify(TRIPLE, scaled([3, 3, 3.01]), data, effect="float")
    assert v.verdict == "failed"
    assert "original's own noise" in v.reasons[0]


def test_a_half_precision_model_may_round_to_half_precision() -> None:
    half = {"x": "float16[N, 3] x", "y": "float16[N, 3] y"}
    x = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float16)
    one, near, far = (
        model("h = Cast<to=10>(f) y = Mul(x, h)", constants=f"<float[3] f = {{1, 1, {f}}}>", **half)
        for f in (1, 1.001, 1.05)
    )
    data = open_data({"x": x}, open_session(one).inputs)
    assert verify(one, near, data, effect="float").verdict == "equivalent"
    assert verify(one, far, data, effect="float").verdict == "failed"


def test_without_class_scores_the_drop_is_noise_over_signal() -> None:
    data = dataset(TRIPLE)
    original, candidate = (scaled(f, y="float[N, 3] y") for f in ([3, 3, 3], [3.15, 3.15, 3.15]))
    for proto in (original, candidate):
        proto.graph.node[0].output[0] = proto.graph.output[0].name = "embedding"
    v = verify(original, candidate, data)
    assert v.quality is not None
    assert (v.verdict, v.quality.kind, v.quality.output) == ("within budget", "sqnr", "embedding")
    assert v.quality.drop == pytest.approx(0.05**2, rel=1e-4)
    assert verify(original, candidate, data, max_drop=0.002).verdict == "failed"


def test_label_drop_decides_where_there_are_labels() -> None:
    x = np.eye(3, dtype=np.float32)[np.arange(60) % 3]
    data = dataset(IDENTITY, labels=np.arange(60) % 3, x=x)
    v = verify(IDENTITY, scaled([1, 1, -1]), data)
    assert v.quality is not None
    assert v.verdict == "failed"
    assert (v.quality.kind, v.quality.original) == ("accuracy", 1.0)
    assert v.quality.optimized == pytest.approx(2 / 3)
    assert v.quality.drop == pytest.approx(1 / 3)


def test_a_candidate_that_is_right_more_often_has_a_negative_drop() -> None:
    x = np.eye(3, dtype=np.float32)[np.arange(60) % 3]
    data = dataset(IDENTITY, labels=np.arange(60) % 3, x=x)
    v = verify(scaled([1, 1, -1]), IDENTITY, data)
    assert v.quality is not None
    assert v.quality.drop == pytest.approx(-1 / 3)
    assert v.passed


def test_a_passing_share_whose_interval_reaches_beyond_the_budget_says_so() -> None:
    v = verify(IDENTITY, IDENTITY, dataset(IDENTITY))
    assert v.verdict == "within budget"
    assert "about 381 samples" in v.reasons[0]


def test_few_samples_leave_a_lossy_verdict_open() -> None:
    v = verify(IDENTITY, IDENTITY, dataset(IDENTITY, samples=5))
    assert (v.verdict, v.passed) == ("inconclusive", False)
    assert "5 samples are too few" in v.reasons[0]
    with pytest.raises(InconclusiveError):
        v.raise_if_failed()


def test_few_samples_are_enough_to_show_equal_bits() -> None:
    assert verify(IDENTITY, IDENTITY, dataset(IDENTITY, samples=2), effect="exact").passed


@pytest.mark.parametrize("effect", ["exact", "float", "lossy"])
def test_a_new_nan_always_fails(effect: Any) -> None:
    root = model("r = Sqrt(x) y = Mul(r, r)")
    v = verify(model("y = Abs(x)"), root, dataset(IDENTITY), effect=effect)
    assert v.verdict == "failed"
    assert v.outputs["y"].errors.new_nan > 0
    assert "new NaN" in v.reasons[0]


def test_a_nan_that_the_original_has_too_is_no_failure() -> None:
    root = model("r = Sqrt(x) y = Mul(r, r)")
    assert verify(root, root, dataset(IDENTITY), effect="exact").passed


def test_an_infinity_on_unusual_inputs_only_fails() -> None:
    safe = model("d = Abs(x) e = Add(d, eps) y = Div(x, e)", constants="<float eps = {0.001}>")
    unsafe = model("d = Abs(x) y = Div(x, d)")
    v = verify(safe, unsafe, dataset(safe), max_drop=1.0)
    assert v.verdict == "failed"
    assert "'zeros'" in v.reasons[0]


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        (model("z = Identity(x)", y="float[N, 3] z"), "outputs are 'z'"),
        (model("y = Identity(u)", x="float[N, 3] u"), "inputs are 'u'"),
        (model("y = Cast<to=11>(x)", y="double[N, 3] y"), "type double"),
        (
            model("y = Identity(x)", x="float[M, 3] x", y="float[M, 3] y"),
            r"\[M, 3\], in the original \[N, 3\]",
        ),
        (model("y = Identity(x)", x="float[1, 3] x", y="float[1, 3] y"), r"\[1, 3\]"),
        (model("y = Identity(x) z = Neg(x)", y="float[N, 3] y, float[N, 3] z"), "'y', 'z'"),
    ],
)
def test_a_changed_interface_fails(candidate: onnx.ModelProto, words: str) -> None:
    v = verify(IDENTITY, candidate, dataset(IDENTITY))
    assert v.verdict == "failed"
    with pytest.raises(VerificationError, match=words):
        v.raise_if_failed()


def test_dropping_an_initializer_from_the_inputs_is_no_interface_change() -> None:
    old = onnx.ModelProto()
    old.CopyFrom(TRIPLE)
    old.graph.input.append(helper.make_tensor_value_info("f", onnx.TensorProto.FLOAT, [3]))
    assert verify(old, TRIPLE, dataset(TRIPLE), effect="exact").passed


def test_an_output_whose_shape_changes_at_run_time_fails() -> None:
    v = verify(
        model("y = Identity(x)", y="float[A, B] y"),
        model("y = Transpose<perm=[1, 0]>(x)", y="float[A, B] y"),
        dataset(IDENTITY),
    )
    assert v.verdict == "failed"
    assert "has the shape (3, 10)" in v.reasons[0]


def test_a_candidate_that_does_not_load_fails() -> None:
    v = verify(IDENTITY, b"no model", dataset(IDENTITY))
    assert v.verdict == "failed"
    assert "cannot be used" in v.reasons[0]


def test_an_original_that_does_not_load_is_a_model_error() -> None:
    with pytest.raises(ModelError):
        verify(b"no model", IDENTITY)


def test_a_missing_file_is_a_model_error(tmp_path: Any) -> None:
    with pytest.raises(ModelError, match="no model file"):
        verify(IDENTITY, tmp_path / "gone.onnx")


def test_data_that_the_original_refuses_is_a_data_error() -> None:
    strict = model(
        "r = Reshape(x, s) y = Reshape(r, t)", constants="<int64[2] s = {5, 6}, int64[2] t = {10, 3}>"
    )
    with pytest.raises(DataError, match="original does not run"):
        verify(strict, strict, dataset(IDENTITY, samples=12))


def test_a_random_original_is_inconclusive() -> None:
    noisy = model("n = RandomNormalLike(x) y = Add(x, n)")
    v = verify(noisy, noisy, dataset(noisy))
    assert v.verdict == "inconclusive"
    assert "'y' of the original changes" in v.reasons[0]


def test_beside_a_random_output_the_others_are_still_judged() -> None:
    two = "float[N, 3] y, float[N, 3] z"
    noisy = model("y = RandomNormalLike(x) z = Identity(x)", y=two)
    broken = model("y = RandomNormalLike(x) z = Neg(x)", y=two)
    assert verify(noisy, broken, dataset(noisy)).verdict == "failed"
    assert verify(noisy, noisy, dataset(noisy)).verdict == "inconclusive"


def test_without_data_the_verdict_says_that_real_data_are_missing() -> None:
    v = verify(IDENTITY, scaled([1.2, 1.2, 1.2]), seed=3)
    assert (v.verdict, v.passed, v.data) == (
        "unverified on real data", True, "inputs synthesized from the graph (seed 3)",
    )  # fmt: skip
    assert v.samples == 8


def test_without_data_more_error_than_signal_fails() -> None:
    v = verify(IDENTITY, scaled([-1, -1, -1]))
    assert v.verdict == "failed"
    assert "more error than signal" in v.reasons[0]


def test_samples_of_the_calibration_are_left_out() -> None:
    data = dataset(IDENTITY)
    used = [h for batch in data.batches(20) for h in sample_hashes(batch)]
    v = verify(IDENTITY, IDENTITY, data, exclude=used)
    assert (v.samples, v.excluded) == (44, 20)
    capped = verify(IDENTITY, IDENTITY, data, exclude=used, samples=15)
    assert capped.samples == 15


def test_nothing_left_after_the_calibration_is_inconclusive() -> None:
    data = dataset(IDENTITY)
    v = verify(IDENTITY, IDENTITY, data, exclude=[h for b in data.batches() for h in sample_hashes(b)])
    assert (v.verdict, v.samples, v.excluded) == ("inconclusive", 0, 64)
    assert "--eval" in v.reasons[0]


def test_a_custom_metric_replaces_the_built_in_quality() -> None:
    def mean(outputs: dict[str, np.ndarray], labels: np.ndarray | None) -> float:
        assert labels is not None
        assert outputs["y"].shape == (64, 3)
        return float(outputs["y"].mean() * 0 + outputs["y"][0, 0] / 3)

    x = np.ones((64, 3), dtype=np.float32)
    data = dataset(TRIPLE, labels=np.zeros(64, dtype=np.int64), x=x)
    v = verify(TRIPLE, scaled([2.4, 3, 3]), data, metric=mean)
    assert v.quality is not None
    assert (v.verdict, v.quality.kind) == ("failed", "custom")
    assert v.quality.drop == pytest.approx(0.2)


def test_labels_that_are_not_classes_are_reported_as_unused() -> None:
    v = verify(IDENTITY, IDENTITY, dataset(IDENTITY, labels=np.zeros((64, 4), dtype=np.float32)))
    assert any("not one class per sample" in reason for reason in v.reasons)


def test_maps_of_classifiers_are_compared_by_their_values() -> None:
    zipped = parse_model(
        '<ir_version: 10, opset_import: ["" : 17, "ai.onnx.ml" : 3]> m (float[N, 3] x) => (float[N, 3] p) '
        "{ p = Softmax(x) m = ai.onnx.ml.ZipMap<classlabels_int64s=[4, 5, 6]>(p) }"
    )
    output = zipped.graph.output.add()
    output.name = "m"
    output.type.sequence_type.elem_type.map_type.key_type = onnx.TensorProto.INT64
    output.type.sequence_type.elem_type.map_type.value_type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    v = verify(zipped, zipped, dataset(IDENTITY), effect="exact")
    assert v.verdict == "equivalent"
    assert {"p", "m.keys", "m.values"} == set(v.outputs)
    assert v.outputs["m.values"].errors.elements == 64 * 3


def test_results_do_not_depend_on_the_batch_size() -> None:
    x = np.random.default_rng(1).standard_normal((40, 3)).astype(np.float32)
    inputs = open_session(IDENTITY).inputs
    runs = [
        verify(IDENTITY, scaled([1, 0.9, 1.1]), open_data({"x": x}, inputs, batch=n), max_drop=1)
        for n in (1, 7, 40)
    ]
    found = [run.outputs["y"].errors for run in runs]
    assert len({(e.max_abs, e.worst_sample, e.elements) for e in found}) == 1
    assert found[0].noise == pytest.approx(found[2].noise, rel=1e-12)


def test_the_result_is_plain_json_with_the_keys_of_the_contract() -> None:
    loaded = json.loads(json.dumps(verify(IDENTITY, IDENTITY, dataset(IDENTITY)).to_json(), allow_nan=False))
    assert {"verdict", "data", "samples", "metrics", "drop", "ci"} <= set(loaded)
    assert loaded["metrics"]["y"]["top1_agreement"] == 1.0
    assert loaded["drop"] == 0.0


def test_progress_ends_at_one() -> None:
    seen: list[float] = []
    verify(IDENTITY, IDENTITY, dataset(IDENTITY), progress=lambda fraction, _: seen.append(fraction))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


@pytest.mark.parametrize(
    "options", [{"effect": "perfect"}, {"max_drop": -1}, {"max_drop": float("nan")}, {"samples": 0}]
)
def test_options_that_make_no_sense_are_usage_errors(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        verify(IDENTITY, IDENTITY, **options)
