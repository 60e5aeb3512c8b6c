"""Second-order rounding of weights that were made sparse."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp.calibration.gram import Gram
from onnxcomp.graph import Constant, Node
from onnxcomp.linear import Linear
from onnxcomp.passes.qdq import quantize_weight
from onnxcomp.passes.rounding import as_rows, round_groups, round_to_grid, round_with


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_pruned_weight_keeps_code_zero(share: float) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(12, 40)).astype(np.float32)
    pruned = rng.random(weight.shape) < share
    weight[pruned] = 0
    x = rng.normal(size=(1, 500, 40)) @ (np.eye(40) + 0.9 * np.eye(40, k=1))
    gram = Gram.empty(1, 40)
    gram.add(x)
    view = Linear(Node("Gemm", attrs={"transB": 1}), Constant("w", weight), None)

    nearest = quantize_weight(view, 7)
    rounded, _ = round_with(view, nearest, gram, limit=7)

    assert not rounded.codes[pruned].any()
    assert (rounded.codes != nearest.codes).any()


def test_a_dense_weight_may_use_every_code() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(12, 40)).astype(np.float32)
    weight[:, 0] = 0  # a few zeros are chance
    gram = Gram.empty(1, 40)
    gram.add(rng.normal(size=(1, 500, 40)) @ (np.eye(40) + 0.9 * np.eye(40, k=1)))
    view = Linear(Node("Gemm", attrs={"transB": 1}), Constant("w", weight), None)

    rounded, _ = round_with(view, quantize_weight(view, 7), gram, limit=7)

    assert rounded.codes[:, 0].any()


def test_depthwise_weights_get_the_scales_that_lose_least() -> None:
    rng = np.random.default_rng(4)
    weight = Constant("w", rng.standard_normal((8, 1, 3, 3)).astype(np.float32))
    view = Linear(Node("Conv", attrs={"group": 8}), weight, None)
    gram = Gram.empty(8, 9)
    gram.add(rng.standard_normal((8, 500, 9)) + rng.standard_normal((8, 500, 1)))
    nearest = quantize_weight(view)

    found, _ = round_with(view, nearest, gram)

    w = as_rows(view, view.weight.values.astype(np.float64))
    own = round_groups(w, nearest.scales.reshape(8, 1, 1), gram.covariance, np.rint, coarse=False)
    lost = [
        np.einsum("gok,gkl,gol->g", d, gram.covariance, d)
        for d in (as_rows(view, found.dequantized()) - w, own * nearest.scales.reshape(8, 1, 1) - w)
    ]
    assert (lost[0] <= 1.02 * lost[1]).all()  # damping is part of what is minimized
    assert lost[0].sum() < 0.8 * lost[1].sum()


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("length", [1, 9, 70])
def test_groups_are_rounded_at_once_as_one_by_one(length: int, coarse: bool) -> None:
    rng = np.random.default_rng(length)
    w = rng.normal(size=(7, 3, length))
    mixing = rng.normal(size=(7, length, length))
    covariance = np.matmul(mixing, mixing.transpose(0, 2, 1)) / length
    scale = rng.uniform(0.2, 0.5, (7, 3, 1))
    free = rng.random(w.shape) < 0.7

    together = round_groups(w, scale, covariance, np.rint, free, coarse=coarse)

    for g in range(7):
        alone = round_to_grid(w[g], scale[g], covariance[g], np.rint, free[g], coarse=coarse)
        assert np.array_equal(together[g], alone)
    assert not together[~free].any()


def test_groups_whose_covariance_has_no_factor_are_rounded_as_one_alone() -> None:
    w = np.random.default_rng(0).normal(size=(2, 3, 2))
    covariance = np.array([[1.0, 2.0], [2.0, 1.0]])
    scale = np.full((3, 1), 0.1)

    found = round_groups(w, np.stack([scale, scale]), np.stack([covariance, covariance]), np.rint)

    for g in range(2):
        assert np.array_equal(found[g], round_to_grid(w[g], scale, covariance, np.rint, coarse=True))
