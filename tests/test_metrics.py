"""Streaming statistics of outputs, roles of outputs, and the quality drop."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.class_metrics import ClassStats, wilson
from onnxcomp.errors import DataError
from onnxcomp.metrics import ErrorStats, OutputStats, Role, Tolerance, measure
from onnxcomp.quality import custom_quality, output_roles, quality

EXACT = (
    "elements",
    "unequal",
    "max_abs",
    "max_rel",
    "excess",
    "new_nan",
    "new_inf",
    "lost",
    "worst",
    "worst_sample",
)
SUMS = ("signal", "power", "noise", "dot")


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def errors(ref: Any, cmp: Any, **options: Any) -> ErrorStats:
    a, b = np.asarray(ref), np.asarray(cmp)
    return measure("values", a, b, count=len(a), **options).errors


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(2, 12),
    cuts=st.lists(st.integers(1, 11), max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_any_split_and_order_of_samples_gives_the_same_statistics(
    seed: int, rows: int, cuts: list[int], order: Any
) -> None:
    rng = np.random.default_rng(seed)
    ref = rng.standard_normal((rows, 7)).astype(np.float32)
    cmp = ref + rng.standard_normal(ref.shape).astype(np.float32) * 0.5
    cmp[rng.random(ref.shape) < 0.05] = np.nan
    ref[rng.random(ref.shape) < 0.05] = np.inf
    labels = rng.integers(0, 7, rows)
    limit = Tolerance(0.1, 1e-3, 1e-2)
    edges = sorted({0, rows, *(c for c in cuts if c < rows)})
    parts = [
        measure("classes", ref[i:j], cmp[i:j], count=j - i, first=i, tolerance=limit, labels=labels[i:j])
        for i, j in itertools.pairwise(edges)
    ]
    order.shuffle(parts)
    merged = sum(parts[1:], parts[0])
    whole = measure("classes", ref, cmp, count=rows, tolerance=limit, labels=labels)
    for name in EXACT:
        assert getattr(merged.errors, name) == getattr(whole.errors, name), name
    for name in SUMS:
        assert getattr(merged.errors, name) == pytest.approx(getattr(whole.errors, name), rel=1e-12), name
    assert merged.classes is not None
    assert whole.classes is not None
    assert merged.classes.kl == pytest.approx(whole.classes.kl, rel=1e-12, abs=1e-12)
    assert dataclasses.replace(merged.classes, kl=0) == dataclasses.replace(whole.classes, kl=0)


def test_error_statistics_equal_the_formulas() -> None:
    rng = np.random.default_rng(1)
    a = (rng.standard_normal((5, 3, 4)) * [[[0.5]], [[1]], [[2]], [[4]], [[8]]]).astype(np.float32)
    b = a + rng.standard_normal(a.shape).astype(np.float32) * 0.1
    x, y = a.astype(np.float64), b.astype(np.float64)
    rms = np.sqrt((x**2).mean(axis=(1, 2), keepdims=True))
    e = errors(a, b, tolerance=Tolerance(1e-3, 0.1, 1e-2))
    assert e.max_abs == np.abs(x - y).max()
    assert e.max_rel == pytest.approx((np.abs(x - y) / np.maximum(np.abs(x), rms)).max(), rel=1e-14)
    assert e.sqnr_db == pytest.approx(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()), rel=1e-12)
    assert e.cosine == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)
    assert e.worst_sample == np.abs(x - y).max(axis=(1, 2)).argmax()
    assert e.excess == pytest.approx((np.abs(x - y) / np.maximum(4e-3, 0.1 * rms + 1e-2 * np.abs(x))).max())


def test_equal_outputs_have_infinite_sqnr_and_json_without_infinities() -> None:
    stats = measure("values", np.ones((2, 3)), np.ones((2, 3)), count=2)
    assert stats.errors.sqnr_db == math.inf
    assert stats.to_json()["sqnr_db"] is None
    assert stats.to_json()["max_abs"] == 0.0


def test_only_nan_and_infinity_where_the_original_is_finite_are_new() -> None:
    e = errors([[1.0, np.nan, np.inf, 1.0, -np.inf]], [[np.nan, np.nan, np.inf, np.inf, np.inf]])
    assert (e.new_nan, e.new_inf, e.lost, e.unequal) == (1, 1, 1, 3)


def test_a_sample_with_a_new_nan_is_the_worst_one() -> None:
    e = errors([[1.0], [1.0], [1.0]], [[9.0], [np.nan], [1.0]])
    assert (e.worst_sample, e.max_abs) == (1, 8.0)


def test_signed_zeros_are_equal() -> None:
    assert errors([[0.0]], [[-0.0]]).unequal == 0


def test_empty_outputs_are_equal() -> None:
    assert measure("values", np.zeros((1, 0)), np.zeros((1, 0)), count=1).errors == ErrorStats()


def test_strings_and_integers_count_equal_elements() -> None:
    words = measure("discrete", np.array([["a", "b"]], object), np.array([["a", "c"]], object), count=1)
    numbers = measure("discrete", np.array([[1, 2, 3, 4]]), np.array([[1, 2, 3, 5]]), count=1)
    assert (words.errors.equal, numbers.errors.equal) == (0.5, 0.75)


@pytest.mark.parametrize("ready", [False, True])
def test_class_statistics_equal_the_formulas_for_logits_and_probabilities(ready: bool) -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((40, 9)), rng.standard_normal((40, 9))
    b = a + 0.7 * b
    p, q = softmax(a), softmax(b)
    c = measure("classes", p if ready else a, q if ready else b, count=40).classes
    assert c is not None
    top5 = np.argsort(-b, axis=1)[:, :5]
    assert c.top1 == (a.argmax(1) == b.argmax(1)).sum()
    assert c.top5 == (top5 == a.argmax(1)[:, None]).any(axis=1).sum()
    assert c.kl == pytest.approx((p * np.log(p / q)).sum(), rel=1e-9)


def test_a_flip_inside_the_noise_of_the_original_is_not_hard() -> None:
    ref, cmp = np.array([[1.0, 1.01, 0.0], [1.0, 5.0, 0.0]]), np.array([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    c = measure("classes", ref, cmp, count=2, tolerance=Tolerance(noise=0.01)).classes
    assert c is not None
    assert (c.rows - c.top1, c.hard_flips) == (2, 1)


def test_positions_of_a_sequence_and_of_a_map_vote_each() -> None:
    rng = np.random.default_rng(3)
    sequence = rng.standard_normal((2, 6, 4))
    image = rng.standard_normal((2, 5, 3, 3))
    other = image.copy()
    other[0, :, 1, 2] *= -1
    first = measure("positions", sequence, sequence, count=2).classes
    second = measure("positions", image, other, count=2).classes
    assert first is not None
    assert second is not None
    assert (first.rows, first.top1) == (12, 12)
    assert (second.rows, second.top1) == (18, 17)


@pytest.mark.parametrize(
    ("name", "shape", "kind", "expected"),
    [
        ("logits", (4, 10), "logits", "classes"),
        ("softmaxout_1", (4, 1000, 1, 1), "softmax", "classes"),
        ("y", (4, 2, 1), "logits", "classes"),
        ("score", (4, 1), "logits", "values"),
        ("embedding", (4, 128), "logits", "values"),
        ("y", (4, 128), "unit", "values"),
        ("y", (3, 10), "logits", "values"),  # axis 0 is not the samples
        ("y", (10,), "logits", "values"),
        ("tokens", (4, 20, 97), "logits", "positions"),
        ("map", (4, 21, 8, 8), "logits", "positions"),
        ("picture", (4, 3, 8, 8), "logits", "values"),
        ("gray", (4, 1, 8, 8), "logits", "values"),
        ("id", (4,), "integers", "predictions"),
        ("id", (4, 1), "integers", "predictions"),
        ("ids", (4, 7), "integers", "discrete"),
    ],
)
def test_role_of_a_single_output_follows_from_name_shape_and_values(
    name: str, shape: tuple[int, ...], kind: str, expected: Role
) -> None:
    value: np.ndarray = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    if kind == "softmax":
        value = np.moveaxis(softmax(np.moveaxis(value, 1, -1)), -1, 1)
    elif kind == "unit":
        value /= np.linalg.norm(value, axis=1, keepdims=True)
    elif kind == "integers":
        value = value.astype(np.int64)
    assert output_roles({name: value}, 4) == {name: expected}


def test_boxes_and_scores_over_anchors_are_no_class_scores() -> None:
    rng = np.random.default_rng(0)
    boxes, scores = rng.uniform(0, 320, (1, 4, 80)), rng.uniform(0, 0.1, (1, 18, 80))
    assert output_roles({"output0": np.concatenate([boxes, scores], axis=1)}, 1) == {"output0": "values"}


def test_logits_beside_another_float_output_are_classes_only_with_labels() -> None:
    rng = np.random.default_rng(0)
    outputs = {"logits": rng.standard_normal((4, 10)), "state": rng.standard_normal((2, 4, 8))}
    assert output_roles(outputs, 4)["logits"] == "values"
    assert output_roles(outputs, 4, np.array([1, 2, 3, 4]))["logits"] == "classes"


def test_probabilities_are_classes_whatever_stands_beside_them() -> None:
    rng = np.random.default_rng(0)
    outputs = {"state": rng.standard_normal((2, 4, 8)), "p": softmax(rng.standard_normal((4, 10)))}
    assert output_roles(outputs, 4) == {"state": "values", "p": "classes"}


def test_accuracy_drop_is_the_difference_on_the_labels() -> None:
    ref, cmp = np.eye(4), np.eye(4)[[0, 1, 3, 3]]
    found = quality({"y": measure("classes", ref, cmp, count=4, labels=np.array([0, 1, 2, 0]))})
    assert (found.kind, found.original, found.optimized, found.drop) == ("accuracy", 0.75, 0.5, 0.25)
    assert found.ci is not None
    assert found.ci[0] < found.drop < found.ci[1]


def test_without_labels_a_classifier_drops_by_the_share_of_changed_decisions() -> None:
    ref, cmp = np.eye(4), np.eye(4)[[0, 1, 3, 3]]
    found = quality({"y": measure("classes", ref, cmp, count=4)})
    assert (found.kind, found.original, found.optimized, found.drop) == ("agreement", None, 0.75, 0.25)
    assert found.ci == pytest.approx((1 - wilson(3, 4)[1], 1 - wilson(3, 4)[0]))


def test_of_several_classifiers_in_a_model_the_worst_counts() -> None:
    heads = {"a": np.eye(4)[[0, 1, 2, 0]], "b": np.eye(4)[[0, 1, 0, 0]]}
    found = quality({name: measure("classes", np.eye(4), cmp, count=4) for name, cmp in heads.items()})
    assert (found.output, found.drop) == ("b", 0.5)


@pytest.mark.parametrize(("noisy", "kind", "output"), [(0.9, "agreement", "c"), (0.2, "sqnr", "boxes")])
def test_values_beside_classes_count_if_they_lose_more(noisy: float, kind: str, output: str) -> None:
    scores, boxes = np.eye(4), np.ones((4, 3))
    changed = scores[[0, 1, 2, 2]]  # a quarter of the classes

    found = quality(
        {"c": measure("classes", scores, changed, count=4), "boxes": measure("values", boxes, boxes * noisy, count=4)}
    )

    assert (found.kind, found.output) == (kind, output)
    assert found.drop == pytest.approx(max(0.25, (1 - noisy) ** 2))


def test_other_outputs_drop_by_the_worst_noise_ratio() -> None:
    a = np.ones((2, 3))
    found = quality({k: measure("values", a, a * f, count=2) for k, f in {"x": 1.1, "y": 0.8}.items()})
    assert (found.kind, found.output) == ("sqnr", "y")
    assert found.drop == pytest.approx(0.04)


def test_a_model_that_gives_only_class_numbers_is_judged_by_them() -> None:
    stats = measure("predictions", np.array([1, 2, 3, 3]), np.array([1, 2, 3, 0]), count=4)
    assert (quality({"label": stats}).kind, quality({"label": stats}).drop) == ("agreement", 0.25)


def test_labels_that_are_no_class_positions_are_rejected() -> None:
    with pytest.raises(DataError, match="counted from 0"):
        measure("classes", np.eye(3), np.eye(3), count=3, labels=np.array([1, 2, 3]))


def test_custom_metric_sees_all_samples_at_once() -> None:
    seen: list[Any] = []

    def metric(outputs: dict[str, np.ndarray], labels: np.ndarray | None) -> float:
        seen.append((outputs["y"].shape, labels))
        return float(outputs["y"].mean())

    batches = [{"y": np.full((3, 2), 50.0)}, {"y": np.full((1, 2), 50.0)}]
    found = custom_quality(metric, batches, [{"y": b["y"] * 0.9} for b in batches], None)
    assert seen == [((4, 2), None), ((4, 2), None)]
    assert (found.original, found.optimized) == (50.0, 45.0)
    assert found.drop == pytest.approx(0.1)


def test_a_metric_that_fails_is_a_data_error() -> None:
    with pytest.raises(DataError, match="KeyError"):
        custom_quality(
            lambda outputs, _: float(outputs["z"][0]), [{"y": np.ones(1)}], [{"y": np.ones(1)}], None
        )


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_has_the_published_values(k: int, n: int, low: float, high: float) -> None:
    # Newcombe 1998, table I, method 3
    assert wilson(k, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("ref", "kind"),
    [
        (np.tile([1.0, 2.0, 4.0], (9, 1)), "sqnr"),
        (np.tile([1.0, 2.0, 4.0], (7, 1)), "agreement"),
        (np.tile([0.25, 0.25, 0.5], (9, 1)), "agreement"),
        (np.concatenate([np.tile([1.0, 2.0, 4.0], (8, 1)), [[1.0, 8.0, 4.0]]]), "agreement"),
    ],
)
def test_scores_of_which_the_same_one_always_wins_are_no_classes_unless_they_are_probabilities(
    ref: np.ndarray, kind: str
) -> None:
    halves = [measure("classes", part, part * 1.1, count=len(part)) for part in (ref[:4], ref[4:])]
    assert quality({"y": halves[0] + halves[1]}).kind == kind


def test_adding_nothing_changes_nothing() -> None:
    stats = measure("classes", np.eye(3), np.eye(3)[::-1], count=3)
    assert OutputStats("classes", ErrorStats(), ClassStats()) + stats == stats


def test_the_interval_of_the_noise_ratio_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(200):
        ref = rng.standard_normal((60, 20)) * rng.uniform(0.5, 2, (60, 1))
        noisy = ref + 0.1 * rng.standard_normal(ref.shape) * rng.uniform(0.5, 2, (60, 1))
        low, high = measure("values", ref, noisy, count=60).errors.noise_ratio_ci or (1.0, 0.0)
        hits += low <= 0.01 <= high
    assert 0.88 * 200 <= hits <= 200


def test_the_interval_of_the_noise_ratio_does_not_depend_on_how_samples_are_split() -> None:
    rng = np.random.default_rng(6)
    ref = rng.standard_normal((30, 4))
    noisy = ref + 0.1 * rng.standard_normal(ref.shape)
    whole = measure("values", ref, noisy, count=30).errors
    cuts = [(ref[a : a + 7], noisy[a : a + 7]) for a in range(0, 30, 7)]
    parts = [measure("values", a, b, count=len(a)).errors for a, b in cuts]
    assert sum(parts[1:], parts[0]).noise_ratio_ci == pytest.approx(whole.noise_ratio_ci)
    assert measure("values", ref[:1], noisy[:1], count=1).errors.noise_ratio_ci is None
