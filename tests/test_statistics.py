"""Statistics of activations: what merges, and what ranges come out of a histogram."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onnxcomp.calibration.affine import QuantParameters, parameters
from onnxcomp.calibration.gram import Gram
from onnxcomp.calibration.range_errors import CLIPPED
from onnxcomp.calibration.ranges import choose
from onnxcomp.calibration.statistics import Channels, Histogram, TensorStatistics
from onnxcomp.calibration.store import Statistics
from onnxcomp.calibration.sums import ExactSum
from onnxcomp.errors import DataError, UsageError

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
    assert (merged.channels.total == whole.channels.total).all()
    assert (merged.channels.squares == whole.channels.squares).all()
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
        x = rng.standard_normal((40, 500))
        x[0, 0] = tail
        by_error, by_extremes = (np.square(choose(seen(*x), m).apply(x) - x).sum() for m in ("mse", "minmax"))
        assert by_error <= 1.02 * by_extremes  # the choice is made on a histogram


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


@settings(max_examples=60)
@given(st.lists(arrays(np.float64, 3, elements=st.floats(-1e30, 1e30)), min_size=1, max_size=8), st.randoms())
def test_an_exact_sum_has_the_same_bits_in_any_order_and_grouping(terms: list[np.ndarray], random) -> None:
    whole = ExactSum((3,))
    for term in terms:
        whole.add(term)
    shuffled = list(terms)
    random.shuffle(shuffled)
    shards = [ExactSum((3,)) for _ in range(3)]
    for number, term in enumerate(shuffled):
        shards[number % 3].add(term)
    for shard in shards[1:]:
        shards[0].merge(shard)

    assert (shards[0].digits == whole.digits).all()
    assert (shards[0].value == whole.value).all()
    peak = max(float(np.abs(t).max()) for t in terms)
    assert np.allclose(whole.value, np.sum(terms, axis=0), rtol=1e-13, atol=1e-14 * peak)


def test_an_exact_sum_keeps_small_terms_beside_a_large_one() -> None:
    total = ExactSum((1,))
    for value in (1e-6, 1e9, -1e9, 1e-6):
        total.add(np.array([value]))

    assert total.value[0] == pytest.approx(2e-6, rel=1e-9)


def test_a_term_that_is_not_finite_makes_the_sum_nan() -> None:
    total = ExactSum((1,))
    total.add(np.array([np.inf]))
    total.add(np.array([1.0]))

    assert np.isnan(total.value).all()


def test_nan_survives_in_the_extremes() -> None:
    statistics = seen(np.array([1.0, np.nan]), np.array([2.0]))

    assert np.isnan(statistics.minimum)


def test_extremes_of_an_array_of_many_blocks_are_exact() -> None:
    x = np.random.default_rng(0).standard_normal(200_001).astype(np.float32)
    statistics = seen(x)

    assert (statistics.minimum, statistics.maximum) == (x.min(), x.max())
    assert statistics.count == x.size


def filled() -> Statistics:
    gram = Gram.empty(2, 3)
    gram.add(np.random.default_rng(1).standard_normal((2, 20, 3)))
    tensors = {"a/b": seen(np.linspace(-1, 3, 60).reshape(3, 4, 5), axis=1), "unseen": TensorStatistics()}
    return Statistics("model", 3, tensors, {"conv": gram})


def test_statistics_come_back_from_a_file_as_they_were(tmp_path: Path) -> None:
    before = filled()
    before.save(tmp_path / "seen.npz")
    after = Statistics.load(tmp_path / "seen.npz", "model")

    assert (after.samples, after.version, list(after.tensors)) == (3, before.version, ["a/b", "unseen"])
    one, other = before.tensors["a/b"], after.tensors["a/b"]
    assert (one.minimum, one.maximum, one.count) == (other.minimum, other.maximum, other.count)
    assert (one.histogram.counts == other.histogram.counts).all()
    assert one.channels is not None
    assert other.channels is not None
    assert (one.channels.squares == other.channels.squares).all()
    assert after.tensors["unseen"].maximum == -np.inf
    assert (after.grams["conv"].covariance == before.grams["conv"].covariance).all()
    assert [p.name for p in tmp_path.iterdir()] == ["seen.npz"]


def test_loaded_statistics_can_be_merged_further(tmp_path: Path) -> None:
    filled().save(tmp_path / "seen.npz")
    merged = Statistics.load(tmp_path / "seen.npz", "model")
    merged.merge(filled())

    assert merged.samples == 6
    assert merged.tensors["a/b"].count == 120
    assert (merged.grams["conv"].products == 2 * filled().grams["conv"].products).all()


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    filled().save(tmp_path / "seen.npz")

    with pytest.raises(DataError, match="calibrate again"):
        Statistics.load(tmp_path / "seen.npz", "another")
    with pytest.raises(DataError, match="calibrate again"):
        filled().merge(Statistics("another"))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_a_file_without_statistics_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "seen.npz").write_bytes(content)

    with pytest.raises(DataError, match="calibrate again"):
        Statistics.load(tmp_path / "seen.npz", "model")


# --- ranges ---


@pytest.mark.parametrize(("signed", "bits", "last"), [(False, 8, 255), (True, 8, 127), (False, 4, 15), (True, 4, 7)])
def test_minmax_spends_all_codes_on_the_extremes(signed: bool, bits: int, last: int) -> None:
    chosen = choose(seen(np.linspace(0, 3, 500)), "minmax", signed=signed, bits=bits)

    assert chosen.scale == pytest.approx(3 / last)
    assert (chosen.zero_point, chosen.last) == (0, last)
    assert chosen.high == pytest.approx(3)


def test_percentile_cuts_the_share_it_was_told() -> None:
    chosen = choose(seen(np.linspace(-1, 1, 8000)), "percentile", share=0.5)

    assert chosen.low == pytest.approx(-0.5, abs=0.01)
    assert chosen.high == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("bits", "best"), [(8, 3.92), (4, 2.55)])
def test_squared_error_finds_the_known_clipping_point_of_normal_values(bits: int, best: float) -> None:
    # The clipping points in units of sigma are those of Banner et al. (arXiv:1810.05723): 3.92 and 2.55.
    x = np.random.default_rng(0).standard_normal((40, 8000))
    chosen = choose(seen(*x), "mse", signed=True, bits=bits)

    assert chosen.high == pytest.approx(best, rel=0.1)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_squared_error_ranges_are_within_two_percent_of_an_exhaustive_search(signed: bool, bits: int) -> None:
    x = np.random.default_rng(0).laplace(size=(20, 8000))
    statistics = seen(*x)
    chosen = choose(statistics, "mse", signed=signed, bits=bits)

    def error(high: float) -> float:
        return counted(parameters(-high, high, signed=signed, bits=bits))

    def counted(q: QuantParameters) -> float:
        outside = (x < q.low - q.scale / 2) | (x > q.high + q.scale / 2)
        return float((np.square(q.apply(x) - x) * np.where(outside, CLIPPED, 1.0)).mean())

    found = counted(chosen)
    assert found < 1.02 * min(error(h) for h in np.linspace(1, np.abs(x).max(), 60))


def test_entropy_keeps_a_uniform_range_whole() -> None:
    chosen = choose(seen(np.linspace(0, 6, 8000)), "entropy")

    assert chosen.high == pytest.approx(6, rel=0.05)


def test_entropy_is_not_misled_by_the_zeros_behind_a_relu() -> None:
    x = np.random.default_rng(0).standard_normal((20, 8000))
    with_zeros = choose(seen(*np.maximum(x, 0)), "entropy")
    without = choose(seen(*x[x > 0].reshape(-1, 1)[: 8000 * 9].reshape(9, -1)), "entropy")

    assert with_zeros.high == pytest.approx(without.high, rel=0.1)


def test_a_number_of_bits_that_no_code_has_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="2 to 8"):
        choose(seen(np.ones(3)), "mse", bits=1)
