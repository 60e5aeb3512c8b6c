"""Patterns of zeros."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp.errors import UsageError
from onnxcomp.passes.sparse_patterns import Pattern, held_zeros


def scores(groups: int, channels: int, taps: int, outputs: int) -> np.ndarray:
    return np.random.default_rng(0).random((groups, channels * taps, outputs))


@given(groups=st.integers(1, 3), channels=st.integers(1, 9), taps=st.integers(1, 4), outputs=st.integers(1, 7))
def test_blocks_taken_apart_and_put_together_are_the_same(groups: int, channels: int, taps: int, outputs: int) -> None:
    pattern = Pattern.parse("3x2")
    mask = scores(groups, channels, taps, outputs) > 0.5

    blocks, _ = pattern._blocks(mask, taps)

    np.testing.assert_array_equal(pattern._unblocked(blocks, mask.shape, taps), mask)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.97])
def test_unstructured_keeps_the_largest(sparsity: float) -> None:
    found = scores(2, 8, 3, 5)

    mask = Pattern.parse("unstructured").choose(found, 3, sparsity)

    assert mask.sum() == round((1 - sparsity) * found.size)
    assert found[mask].min() >= found[~mask].max(initial=0)


@pytest.mark.parametrize(("text", "kept", "of"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
def test_of_m_neighbouring_channels_n_stay_at_each_kernel_position(text: str, kept: int, of: int) -> None:
    found = scores(2, 16, 9, 5)

    mask = Pattern.parse(text).choose(found, 9, 0.1)

    neighbours = mask.reshape(2, 16 // of, of, 9, 5)
    assert (neighbours.sum(axis=2) == kept).all()
    grouped = found.reshape(neighbours.shape)
    assert (np.where(neighbours, grouped, 2).min(axis=2) >= np.where(neighbours, -1, grouped).max(axis=2)).all()


def test_blocks_stay_or_go_as_a_whole() -> None:
    mask = Pattern.parse("4x2").choose(scores(1, 6, 9, 8), 9, 0.5)

    blocks = mask.reshape(3, 2, 9, 2, 4).transpose(0, 2, 3, 1, 4).reshape(-1, 8)
    assert set(blocks.sum(axis=1)) == {0, 8}
    assert mask.mean() == 0.5


@pytest.mark.parametrize("text", ["4:2", "0:4", "2x", "0x4", "magnitude", "2:4:8", ""])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="unstructured, N:M"):
        Pattern.parse(text)


@pytest.mark.parametrize("text", ["unstructured", "2:4", "4x1"])
def test_a_pattern_is_written_as_it_is_read(text: str) -> None:
    assert str(Pattern.parse(text)) == text


def test_what_does_not_divide_is_said() -> None:
    assert Pattern.parse("2:4").misfit(8, 3) == "its 3 input channels are no multiple of 4"
    assert Pattern.parse("4x1").misfit(2, 3) == "a block takes 4 outputs, it has 2"
    assert Pattern.parse("4x1").misfit(9, 3) is None


def test_zeros_are_held_from_a_quarter_on() -> None:
    values = np.ones(8, np.float32)
    values[0] = 0
    assert held_zeros(values) is None
    values[1] = 0
    zeros = held_zeros(values)
    assert zeros is not None
    assert zeros.tolist() == [True, True, *[False] * 6]
