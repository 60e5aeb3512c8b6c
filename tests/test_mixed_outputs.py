"""Quantities of different units in one output."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp.mixed_outputs import Part, parts

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
