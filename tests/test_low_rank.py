"""Two factors for one weight."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp.passes.low_rank import Scheme, Split

RNG = np.random.default_rng(0)
SCHEMES: tuple[Scheme, ...] = ("outputs", "inputs", "spatial")


def case(channels: int = 6, kernel: tuple[int, int] = (3, 2), outputs: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """A weight and the second moment of inputs of very different power."""
    length = channels * kernel[0] * kernel[1]
    x = RNG.normal(size=(500, length)) @ RNG.normal(size=(length, length)) * np.logspace(0, -2, length)
    return RNG.normal(size=(length, outputs)), x.T @ x / 500


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_full_rank_gives_the_weight_back(scheme: Scheme) -> None:
    weight, moment = case()
    split = Split.of(weight, moment, scheme, (3, 2))

    product = split.product(*split.factors(split.rank))

    np.testing.assert_allclose(product, weight, rtol=1e-5, atol=1e-5)
    assert split.lost(split.rank) == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_errors_fall_with_the_rank(scheme: Scheme) -> None:
    split = Split.of(*case(), scheme, (3, 2))
    errors = [split.error(split.product(*split.factors(r))) for r in range(1, split.rank + 1)]

    assert (np.diff(errors) <= 1e-9).all()
    assert errors[0] > 0.05
    assert errors[-1] < 1e-8


def test_the_predicted_error_of_a_matrix_is_that_of_its_outputs() -> None:
    weight, moment = case()
    split = Split.of(weight, moment, "outputs", (3, 2))

    assert split.error(split.product(*split.factors(3))) == pytest.approx(split.lost(3), rel=1e-3)


def test_it_knows_which_inputs_matter() -> None:
    weight, moment = case()
    split = Split.of(weight, moment, "outputs", (3, 2))
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    plain = (left[:, :3] * values[:3]) @ right[:3]

    assert split.error(split.product(*split.factors(3))) < 0.7 * split.error(plain)


def test_a_weight_of_low_rank_loses_nothing_at_that_rank() -> None:
    _, moment = case()
    weight = RNG.normal(size=(36, 2)) @ RNG.normal(size=(2, 7))
    split = Split.of(weight, moment, "outputs", (3, 2))

    assert split.error(split.product(*split.factors(2))) < 1e-9
