"""Statistics of activations: what merges, and what ranges come out of a histogram."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onnxcomp.calibration.ranges import choose, parameters, squared_error
from onnxcomp.calibration.statistics import Channels, Histogram, TensorStatistics
from onnxcomp.errors import UsageError

FLOATS = st.floats(-1e6, 1e6, width=32)


def seen(*parts: np.ndarray, axis: int | None = None) -> TensorStatistics:
    statistics = TensorStatistics()
    for part in parts:
        statistics.add(np.asarray(part, np.float32), axis)
    return statistics


@given(arrays(np.float32, st.integers(1, 200), elements=FLOATS))
def test_bins_are_within_one_percent_of_the_values_they_count(values: np.ndarray) -> None:
    histogram = Histogram()
    histogram.add(values)

    centers, counts = histogram.bins()

    assert counts.sum() == values.size
    expanded = np.repeat(centers, counts.astype(int))
    assert np.allclose(expanded, np.sort(values), rtol=0.008, atol=1e-37)


@settings(max_examples=30)
@given(st.lists(arrays(np.float32, (3, 4), elements=FLOATS), min_size=2, max_size=5), st.randoms())
def test_merging_shards_in_any_order_gives_the_same_counts_and_extremes(parts: list[np.ndarray], random) -> None:
    whole = seen(*parts, axis=1)
    shards = [seen(p, axis=1) for p in parts]
    random.shuffle(shards)
    merged = shards[0]
    for shard in shards[1:]:
        merged.merge(shard)

    assert (merged.histogram.counts == whole.histogram.counts).all()
    assert (merged.minimum, merged.maximum, merged.count) == (whole.minimum, whole.maximum, whole.count)
    assert merged.channels is not None
    assert whole.channels is not None
    assert np.allclose(merged.channels.total, whole.channels.total, rtol=1e-12, atol=1e-9)
    assert (merged.channels.peak == whole.channels.peak).all()


def test_channels_hold_sums_squares_and_peaks_along_the_axis() -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)

    channels = Channels.of(x, 1)

    assert channels.total == pytest.approx(x.sum(axis=(0, 2)))
    assert channels.squares == pytest.approx(np.square(x).sum(axis=(0, 2)))
    assert channels.mean == pytest.approx(x.mean(axis=(0, 2)))
    assert list(channels.peak) == [15, 19, 23]


def test_zero_and_negative_zero_share_a_bin() -> None:
    histogram = Histogram()
    histogram.add(np.array([0.0, -0.0, 1.0], np.float32))

    centers, counts = histogram.bins()

    assert list(centers[:1]) == [0.0]
    assert list(counts) == [2, 1]


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.booleans())
def test_zero_is_always_exact(low: float, high: float, signed: bool) -> None:
    chosen = parameters(min(low, high), max(low, high), signed=signed)

    assert chosen.apply(np.array([0.0]))[0] == 0.0
    assert chosen.scale > 0


def test_a_relu_output_uses_all_codes() -> None:
    chosen = choose(seen(np.linspace(0, 6, 1000)), "minmax")

    assert chosen.zero_point == 0
    assert chosen.high == pytest.approx(6)


def test_squared_error_ranges_are_never_worse_than_the_extremes() -> None:
    rng = np.random.default_rng(0)
    for tail in (0.0, 5.0, 100.0):
        statistics = seen(np.append(rng.standard_normal(20000), tail))
        by_error, by_extremes = choose(statistics, "mse"), choose(statistics, "minmax")
        assert squared_error(statistics, by_error) <= squared_error(statistics, by_extremes)


def test_one_outlier_moves_the_extremes_but_not_the_other_methods() -> None:
    rng = np.random.default_rng(0)
    statistics = seen(np.append(rng.standard_normal(60000), 100.0))

    assert choose(statistics, "minmax").high == pytest.approx(100, rel=0.01)
    assert choose(statistics, "percentile", share=0.999).high < 6
    assert choose(statistics, "entropy").high < 50


def test_an_unseen_tensor_gets_a_usable_scale() -> None:
    assert choose(TensorStatistics(), "mse").scale > 0


def test_an_unknown_method_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="known: minmax"):
        choose(seen(np.ones(3)), "magic")  # type: ignore[arg-type]
