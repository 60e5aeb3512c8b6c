"""Equalization: the function stays, the ranges of channels come closer, and what must not be scaled is not."""

import numpy as np
import onnx
import pytest

from onnxcomp.calibration.data import open_data
from onnxcomp.errors import UsageError
from onnxcomp.graph import Model
from onnxcomp.manager import Context, run_pass
from onnxcomp.passes.equalize import Equalize
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto


def parse(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    return from_proto(proto)


def uneven(*shape: int, seed: int = 0) -> np.ndarray:
    """A weight whose output channels differ by up to a factor of 100."""
    rng = np.random.default_rng(seed)
    factor = 10.0 ** rng.uniform(-1, 1, shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
    return (rng.standard_normal(shape) * 0.3 * factor).astype(np.float32)


X = np.random.default_rng(1).standard_normal((24, 3, 8, 8)).astype(np.float32)


def equalized(model: Model, **options: float) -> tuple[Model, int]:
    copy = model.copy()
    record = run_pass(Equalize(**options), copy, Context(data=open_data({"x": X}, open_session(model).inputs)))
    return copy, record.details["groups"]


def same(a: Model, b: Model) -> bool:
    x, y = (open_session(m).run({"x": X})[0] for m in (a, b))
    return bool(np.allclose(x, y, rtol=1e-4, atol=1e-4 * np.abs(x).max()))


def test_a_chain_with_a_depthwise_convolution_keeps_its_function() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) {
          a = Conv (x, w1, b1)
          ar = Relu (a)
          d = Conv <group = 6, pads = [1, 1, 1, 1]> (ar, w2, b2)
          dr = Relu (d)
          y = Conv (dr, w3, b3)
        }""",
        w1=uneven(6, 3, 1, 1), b1=uneven(6), w2=uneven(6, 1, 3, 3), b2=uneven(6), w3=uneven(4, 6, 1, 1), b3=uneven(4),
    )  # fmt: skip

    result, groups = equalized(model)

    assert groups == 1
    assert same(model, result)


def test_two_groups_that_share_a_node_are_both_scaled() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) {
          a = Conv (x, w1, b1)
          ar = Relu (a)
          b = Conv <pads = [1, 1, 1, 1]> (ar, w2, b2)
          br = Relu (b)
          y = Conv (br, w3)
        }""",
        w1=uneven(6, 3, 1, 1), b1=uneven(6), w2=uneven(5, 6, 3, 3), b2=uneven(5), w3=uneven(4, 5, 1, 1),
    )  # fmt: skip

    result, groups = equalized(model)

    assert groups == 2
    assert same(model, result)


def test_channels_come_closer_in_range() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) {
          a = Conv (x, w1)
          y = Conv (a, w2)
        }""",
        w1=uneven(6, 3, 1, 1), w2=uneven(4, 6, 1, 1),
    )  # fmt: skip

    result, _ = equalized(model, strength=1.0)

    def spread(m: Model) -> float:
        from onnxcomp.calibration.runner import expose

        peaks = np.abs(expose(m, ["a"]).run({"x": X}, ["a"])[0]).max(axis=(0, 2, 3))
        return float(peaks.max() / peaks.min())

    assert spread(result) < 0.25 * spread(model)


def test_values_of_a_residual_sum_are_scaled_alike() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 8, 8] x) => (float[N, 4] y) {
          a = Conv (x, w1, b1)
          ar = Relu (a)
          b = Conv (ar, w2)
          s = Add (b, ar)
          sr = Relu (s)
          p = GlobalAveragePool (sr)
          f = Flatten (p)
          y = Gemm <transB = 1> (f, w3, b3)
        }""",
        w1=uneven(6, 3, 1, 1), b1=uneven(6), w2=uneven(6, 6, 1, 1), w3=uneven(4, 6), b3=uneven(4),
    )  # fmt: skip

    result, groups = equalized(model)

    assert groups == 1
    assert same(model, result)


def test_an_activation_that_does_not_commute_pins_its_channels() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) {
          a = Conv (x, w1)
          t = Sigmoid (a)
          y = Conv (t, w2)
        }""",
        w1=uneven(6, 3, 1, 1), w2=uneven(4, 6, 1, 1),
    )  # fmt: skip

    _, groups = equalized(model)

    assert groups == 0


def test_the_weights_that_were_replaced_are_gone() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) {
          a = Conv (x, w1)
          y = Conv (a, w2)
        }""",
        w1=uneven(6, 3, 1, 1), w2=uneven(4, 6, 1, 1),
    )  # fmt: skip

    result, _ = equalized(model)

    assert sorted(i.shape for i in result.graph.initializers) == [(4, 6, 1, 1), (6, 3, 1, 1)]


def test_channels_are_followed_through_slices_and_padding() -> None:
    """The shortcuts of residual networks for CIFAR-10: every second pixel, and zeros for the new channels."""
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 8, 8] x) => (float[N, 4] y)
        <int64[2] from = {0, 0}, int64[2] to = {8, 8}, int64[2] axes = {2, 3}, int64[2] step = {2, 2},
         int64[8] pads = {0, 2, 0, 0, 0, 1, 0, 0}> {
          a = Conv (x, w1, b1)
          ar = Relu (a)
          c = Slice (ar, from, to, axes, step)
          d = Pad (c, pads)
          b = Conv <strides = [2, 2], kernel_shape = [1, 1]> (ar, w2)
          s = Add (b, d)
          sr = Relu (s)
          p = GlobalAveragePool (sr)
          f = Flatten (p)
          y = Gemm <transB = 1> (f, w3, b3)
        }""",
        w1=uneven(6, 3, 1, 1), b1=uneven(6), w2=uneven(9, 6, 1, 1), w3=uneven(4, 9), b3=uneven(4),
    )  # fmt: skip

    result, groups = equalized(model)

    assert groups == 1
    assert same(model, result)


def test_channels_are_followed_through_concatenation_splits_and_resizing() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 8, 8] x) => (float[N, 4, 16, 16] y)
        <int64[2] sizes = {5, 4}, float[4] twice = {1, 1, 2, 2}> {
          a = Conv (x, w1, b1)
          b = Conv (x, w2)
          c = Concat <axis = 1> (a, b)
          r = Relu (c)
          first, second = Split <axis = 1> (r, sizes)
          u = Resize <mode = "nearest"> (first, , twice)
          v = Conv (u, w3)
          t = Conv (second, w4)
          w = ConvTranspose <strides = [2, 2], kernel_shape = [2, 2]> (t, w5)
          y = Add (v, w)
        }""",
        w1=uneven(6, 3, 1, 1), b1=uneven(6), w2=uneven(3, 3, 1, 1), w3=uneven(4, 5, 1, 1), w4=uneven(4, 4, 1, 1),
        w5=uneven(4, 4, 2, 2),
    )  # fmt: skip

    result, groups = equalized(model)

    assert groups == 1
    assert same(model, result)


def test_halves_of_a_value_that_are_added_to_each_other_pin_it() -> None:
    """Its channels would have two places in the group."""
    model = parse(
        """<ir_version: 8, opset_import: ["" : 18]>
        g (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) {
          a = Conv (x, w1, b1)
          first, second = Split <axis = 1, num_outputs = 2> (a)
          s = Add (first, second)
          y = Conv (s, w2)
        }""",
        w1=uneven(6, 3, 1, 1), b1=uneven(6), w2=uneven(4, 3, 1, 1),
    )  # fmt: skip

    _, groups = equalized(model)

    assert groups == 0


@pytest.mark.parametrize("strength", [-3.0, 1.5, float("nan")])
def test_a_strength_that_is_no_exponent_from_0_to_1_is_refused(strength: float) -> None:
    with pytest.raises(UsageError, match=r"'strength' of pass 'equalize' is .* from 0 to 1"):
        Equalize(strength)
