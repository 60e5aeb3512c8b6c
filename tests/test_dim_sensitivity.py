"""dim_sensitivity: what a measurement may cost follows from the model's size."""

from __future__ import annotations

import pytest

from onnxcomp.passes.dim_sensitivity import affordable, longest


@pytest.mark.parametrize(("macs", "groups", "samples"), [(4e7, 20, 128), (2e9, 20, 25), (4e9, 80, 8)])
def test_large_models_are_measured_on_fewer_samples(macs: float, groups: int, samples: int) -> None:
    assert affordable(macs, groups) == samples


def test_operators_whose_fit_would_take_minutes_are_not_repaired_where_groups_are_many() -> None:
    few, many = longest(4), longest(80)

    assert many < few
    assert 512 <= many < 1152  # a convolution of 64 channels, not one of 128
    assert few >= 1152


def test_models_without_groups_have_a_bound_too() -> None:
    assert affordable(0.0, 0) > 0
    assert longest(0) > 0
