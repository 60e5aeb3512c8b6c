"""Held-out samples: none lost, none in both parts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp.calibration.data import Dataset, open_data, sample_hashes
from onnxcomp.calibration.split import hold_out, limited
from onnxcomp.errors import DataError
from onnxcomp.runtime import TensorSpec

INPUT = [TensorSpec("x", "tensor(float)", ("N", 2))]


def data(count: int, batch: int = 16) -> Dataset:
    rows = np.arange(2 * count, dtype=np.float32).reshape(count, 2)
    return open_data({"x": rows, "labels": np.arange(count)}, INPUT, batch=batch)


def labels(part: Dataset) -> list[int]:
    return [int(v) for b in part.batches() if b.labels is not None for v in b.labels]


@given(st.integers(5, 60), st.integers(1, 20))
def test_every_sample_is_in_exactly_one_part(count: int, batch: int) -> None:
    fit, held = hold_out(data(count, batch))

    assert sorted(labels(fit) + labels(held)) == list(range(count))
    assert (fit.length, held.length) == (len(labels(fit)), len(labels(held)))
    assert len(labels(held)) == count // 5


def test_rows_and_labels_stay_together() -> None:
    _, held = hold_out(data(40))

    for batch in held.batches():
        assert batch.labels is not None
        assert (batch.feeds["x"][:, 0] == 2 * batch.labels).all()


def test_feeds_that_cannot_be_cut_are_dealt_out_whole() -> None:
    feeds = [{"x": np.full((3, 2), i, np.float32)} for i in range(10)]
    whole = open_data(feeds, [TensorSpec("x", "tensor(float)", (3, 2))])

    fit, held = hold_out(whole)

    hashes = [{h for b in part.batches() for h in sample_hashes(b)} for part in (fit, held)]
    assert not hashes[0] & hashes[1]
    assert sum(b.count for part in (fit, held) for b in part.batches()) == 30


def test_a_limit_takes_the_first_samples() -> None:
    assert labels(limited(data(40), 7)) == list(range(7))
    assert limited(data(40), None).length == 40


def test_too_few_samples_leave_the_second_part_empty() -> None:
    _, held = hold_out(data(3))

    assert held.length == 0
    with pytest.raises(DataError):
        list(held.batches())
