from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcomp.timing import (
    FASTER,
    SAME,
    SLOWER,
    PairedRatio,
    latency_quantiles,
    median_half_width,
    paired_ratio,
    student_quantile,
    verdict,
)

log_ratios = hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(-1, 1, width=32))


def noisy_rounds(rng, log_ratio, rounds=3, pairs=40, noise=0.05, spikes=0.05, between=0.0):
    """Log ratios with Laplace noise and a few preemptions on either side."""
    drawn = rng.laplace(log_ratio, noise, size=(rounds, pairs)) + rng.normal(0, between, size=(rounds, 1))
    hit = rng.random((rounds, pairs)) < spikes
    return list(np.where(hit, drawn + rng.choice([-1.6, 1.6], size=drawn.shape), drawn))


def test_the_interval_holds_the_true_speedup_in_about_95_percent_of_trials():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(50):
        ratio = paired_ratio(noisy_rounds(rng, math.log(1.7)), rng, resamples=150)
        held += ratio.ci[0] <= 1.7 <= ratio.ci[1]
    assert held >= 43


@settings(max_examples=30, deadline=None)
@given(st.lists(log_ratios, min_size=1, max_size=4), st.integers(0, 99))
def test_swapping_the_models_inverts_the_speedup_and_its_interval(rounds, seed):
    one = paired_ratio(rounds, np.random.default_rng(seed), resamples=50)
    other = paired_ratio([-r for r in rounds], np.random.default_rng(seed), resamples=50)

    assert other.log == pytest.approx(-one.log, abs=1e-12)
    assert (other.low, other.high) == pytest.approx((-one.high, -one.low), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(log_ratios, min_size=1, max_size=4), st.integers(0, 99))
def test_the_interval_holds_the_median_and_the_counts_are_kept(rounds, seed):
    ratio = paired_ratio(rounds, np.random.default_rng(seed), resamples=50)

    assert ratio.low - 1e-12 <= ratio.log <= ratio.high + 1e-12
    assert (ratio.pairs, ratio.rounds) == (sum(map(len, rounds)), len(rounds))


@pytest.mark.parametrize("rounds", [3, 5])
def test_the_interval_is_honest_where_processes_differ_more_than_pairs(rounds):
    rng = np.random.default_rng(6)
    held = 0
    for _ in range(100):
        drawn = noisy_rounds(rng, 0.0, rounds=rounds, pairs=12, noise=0.002, spikes=0.0, between=0.05)
        ratio = paired_ratio(drawn, rng, resamples=100)
        held += ratio.low <= 0 <= ratio.high
    assert held >= 88  # of 100; the bootstrap alone holds it in about 75 of three rounds


@pytest.mark.parametrize(("degrees", "expected"), [(1, 12.706), (2, 4.303), (9, 2.262), (10, 2.228), (30, 2.042)])
def test_students_quantile_is_that_of_the_tables(degrees, expected):
    assert student_quantile(degrees) == pytest.approx(expected, abs=0.003)


def test_a_round_without_pairs_does_not_count():
    with_empty = paired_ratio([np.array([0.1, 0.2]), np.array([])], np.random.default_rng(0))
    without = paired_ratio([np.array([0.1, 0.2])], np.random.default_rng(0))

    assert with_empty == without


def test_no_pairs_at_all_are_an_error():
    with pytest.raises(ValueError, match="at least one pair"):
        paired_ratio([np.array([])], np.random.default_rng(0))


def test_a_model_against_itself_is_hardly_ever_called_faster_or_slower():
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(50):
        ratio = paired_ratio(noisy_rounds(rng, 0.0, between=0.03), rng, resamples=100)
        control = paired_ratio(noisy_rounds(rng, 0.0, pairs=10, between=0.03), rng, resamples=100)
        wrong += verdict(ratio, control.bound) != SAME
    assert wrong <= 2


@pytest.mark.parametrize(("log_ratio", "expected"), [(math.log(1.8), FASTER), (-math.log(1.8), SLOWER)])
def test_a_large_effect_is_found_in_noise(log_ratio, expected):
    rng = np.random.default_rng(2)
    ratio = paired_ratio(noisy_rounds(rng, log_ratio), rng)
    control = paired_ratio(noisy_rounds(rng, 0.0, pairs=10), rng)

    assert verdict(ratio, control.bound) == expected


@pytest.mark.parametrize(
    ("ratio", "floor"),
    [
        pytest.param(PairedRatio(0.05, -0.01, 0.11, 100, 3), 0.0, id="interval holds no difference"),
        pytest.param(PairedRatio(0.05, 0.04, 0.06, 100, 3), 0.06, id="below the noise floor"),
        pytest.param(PairedRatio(0.009, 0.008, 0.0095, 100, 3), 0.0, id="below one percent"),
        pytest.param(PairedRatio(0.5, 0.4, 0.6, 5, 3), 0.0, id="too few pairs"),
        pytest.param(PairedRatio(0.5, 0.4, 0.6, 100, 1), 0.0, id="one process"),
    ],
)
def test_what_is_not_proven_is_no_measurable_difference(ratio, floor):
    assert verdict(ratio, floor) == SAME


@pytest.mark.parametrize(
    ("size", "tails"), [(1, []), (28, []), (29, ["p90"]), (298, ["p90"]), (299, ["p90", "p99"])]
)
def test_a_tail_quantile_needs_enough_runs(size, tails):
    found = latency_quantiles(np.arange(size))

    assert found["p50"] is not None
    assert [name for name in ("p90", "p99") if found[name] is not None] == tails


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.int64, st.integers(299, 400), elements=st.integers(1, 10**9)))
def test_quantiles_are_measured_values_with_the_right_share_below(times):
    found = latency_quantiles(times)

    for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert found[name] in times
        assert np.mean(times <= found[name]) >= q
        assert np.mean(times < found[name]) < q


def test_quantiles_of_no_runs_are_none():
    assert latency_quantiles(np.empty(0)) == {"p50": None, "p90": None, "p99": None}


def test_the_quick_interval_of_the_median_is_unknown_below_eight_values():
    assert median_half_width(range(7)) == math.inf
    assert median_half_width(range(8)) == 3.5


def test_the_quick_interval_of_the_median_shrinks_with_the_root_of_the_number_of_values():
    values = np.random.default_rng(3).normal(size=6400)

    assert median_half_width(values) == pytest.approx(median_half_width(values[:400]) / 4, rel=0.4)
