"""Quantities of different units in one output."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxcomp import verify
from onnxcomp.calibration.data import open_data
from onnxcomp.mixed_outputs import Part, parts
from onnxcomp.passes.judge import Judge
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto

RNG = np.random.default_rng(0)
BOXES = RNG.uniform(5, 320, (2, 4, 100))
SCORES = RNG.uniform(0, 0.3, (2, 6, 100)) * np.array([1, 1, 1e-3, 1, 0, 1])[:, None]  # one rare class, one never seen
MASKS = RNG.standard_normal((2, 3, 100))


def test_boxes_and_scores_of_a_detector_are_two_parts() -> None:
    found = parts(np.concatenate([BOXES, SCORES], axis=1))
    assert found == [Part("large", 1, (0, 1, 2, 3)), Part("scores", 1, (4, 5, 6, 7, 8, 9))]


def test_quantities_are_found_on_the_last_axis_too() -> None:
    value = np.concatenate([BOXES, SCORES], axis=1).transpose(0, 2, 1)
    large, scores = parts(value)
    np.testing.assert_array_equal(large.take(value), BOXES.transpose(0, 2, 1))
    np.testing.assert_array_equal(scores.take(value), SCORES.transpose(0, 2, 1))


def test_mask_coefficients_beside_scores_are_a_part_of_their_own() -> None:
    found = parts(np.concatenate([SCORES, BOXES, MASKS], axis=1))
    assert found == [
        Part("large", 1, (6, 7, 8, 9)),
        Part("scores", 1, (0, 1, 2, 3, 4, 5)),
        Part("other", 1, (10, 11, 12)),
    ]


@pytest.mark.parametrize(
    "value",
    [
        BOXES,
        SCORES,
        MASKS,
        np.concatenate([BOXES / 320, SCORES], axis=1),  # no 30 times between any two
        np.concatenate([BOXES, MASKS], axis=1),  # no scores
        np.concatenate([BOXES, 0 * SCORES], axis=1),  # nothing to compare
        np.concatenate([BOXES, SCORES], axis=1)[:, :, :20],  # too few values
        np.concatenate([BOXES, SCORES], axis=1)[0],
        np.where(SCORES > 0.2, np.nan, SCORES),
        np.zeros((0, 4, 100)),
    ],
    ids=["boxes", "scores", "values", "relative", "no-scores", "silent", "few", "rank", "nan", "empty"],
)
def test_other_outputs_have_no_parts(value: np.ndarray) -> None:
    assert parts(value) == []


def detector(factor: float, shift: float) -> onnx.ModelProto:
    """Boxes and scores in one output, the scores times `factor`, the boxes moved by `shift`."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 10, 100] x) => (float[N, 10, 100] y) { m = Mul (x, f) y = Add (m, s) }"""
    )
    rows = {"f": np.where(np.arange(10) < 4, 1.0, factor), "s": np.where(np.arange(10) < 4, shift, 0.0)}
    for name, values in rows.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32)[:, None], name))
    return proto


@pytest.fixture
def found_boxes() -> dict[str, np.ndarray]:
    boxes, scores = RNG.uniform(5, 320, (12, 4, 100)), RNG.uniform(0, 0.3, (12, 6, 100))
    return {"x": np.concatenate([boxes, scores], axis=1).astype(np.float32)}


@pytest.mark.parametrize(
    ("factor", "shift", "passed", "output"),
    [(0.0, 0.0, False, "y (scores)"), (0.9, 0.0, True, "y (scores)"), (1.0, 30.0, False, "y (large)")],
)
def test_a_detector_that_lost_its_scores_or_boxes_does_not_pass(
    factor: float, shift: float, passed: bool, output: str, found_boxes: dict[str, np.ndarray]
) -> None:
    verdict = verify(detector(1.0, 0.0), detector(factor, shift), found_boxes, max_drop=0.01)

    assert verdict.passed is passed
    assert verdict.quality is not None
    assert verdict.quality.output == output
    if factor != 1:
        assert verdict.quality.drop == pytest.approx((1 - factor) ** 2 / 3, rel=1e-3)


def test_a_search_sees_what_happens_to_the_scores(found_boxes: dict[str, np.ndarray]) -> None:
    model = from_proto(detector(1.0, 0.0))
    judge = Judge(model, open_data(found_boxes, open_session(model).inputs))

    sqnr, drop = judge.score(from_proto(detector(0.9, 0.0)))

    assert drop == pytest.approx(0.01 / 3, rel=1e-3)
    assert sqnr == pytest.approx((20 + 120) / 2, rel=1e-3)  # exact boxes count as 120 dB
