"""Second moments: the rows are the vectors that the operator multiplies, and rounding with them keeps outputs close."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.calibration.gram import Gram, patches, rows_of
from onnxcomp.graph import Model
from onnxcomp.linear import Linear, linear
from onnxcomp.passes.qdq import quantize_weight
from onnxcomp.passes.rounding import as_rows, from_rows, round_with
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto


def conv(group: int, kernel: int, stride: int, dilation: int, pads: list[int], cin: int = 4, cout: int = 8) -> Model:
    rng = np.random.default_rng(1)
    w = rng.standard_normal((cout, cin // group, kernel, kernel)).astype(np.float32)
    node = onnx.helper.make_node(
        "Conv", ["x", "w"], ["y"], group=group, strides=[stride] * 2, dilations=[dilation] * 2, pads=pads
    )
    return model([node], {"w": w}, [None, cin, None, None])


def model(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], shape: list[int | None]) -> Model:
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [info("x", 1, shape)],
        [info("y", 1, None)],
        [onnx.numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    return from_proto(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8))


def view_of(m: Model) -> Linear:
    view = linear(m, m.graph.nodes[0])
    assert view is not None
    return view


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 2),
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
)
def test_patches_times_weight_is_the_convolution(
    group: int, kernel: int, stride: int, dilation: int, pads: list[int]
) -> None:
    m = conv(group, kernel, stride, dilation, pads)
    view = view_of(m)
    x = np.random.default_rng(0).standard_normal((2, 4, 9, 8)).astype(np.float32)

    rows = patches(view, x, 10**6, np.random.default_rng(0))
    y = np.einsum("gok,grk->rgo", as_rows(view, view.weight.values.astype(np.float64)), rows)

    expected = open_session(m).run({"x": x})[0]
    expected = expected.transpose(0, 2, 3, 1).reshape(-1, 8)
    assert np.allclose(y.reshape(-1, 8), expected, atol=1e-4)


def test_rows_and_weights_are_inverse_views() -> None:
    view = view_of(conv(2, 3, 1, 1, [1, 1, 1, 1]))
    w = view.weight.values

    assert (from_rows(view, as_rows(view, w)) == w).all()


def test_moments_of_shards_add_up() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 100, 5))
    whole, first, second = (Gram.empty(1, 5) for _ in range(3))
    whole.add(x)
    first.add(x[:, :30])
    second.add(x[:, 30:])
    first.merge(second)

    assert first.rows == whole.rows == 100
    assert np.allclose(first.covariance, whole.covariance)
    assert np.allclose(whole.covariance[0], np.cov(x[0].T, bias=True))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.randoms())
def test_moments_of_batches_add_up_to_the_same_bits_in_any_order(seed: int, random) -> None:
    rng = np.random.default_rng(seed)
    batches = [rng.standard_normal((2, 10, 4)).astype(np.float32) * 10.0**k for k in range(-3, 4)]
    whole, shards = Gram.empty(2, 4), [Gram.empty(2, 4) for _ in range(2)]
    for x in batches:
        whole.add(x)
        whole.flush()
    random.shuffle(batches)
    for number, x in enumerate(batches):
        shards[number % 2].add(x)
        shards[number % 2].flush()
    shards[0].merge(shards[1])

    assert (shards[0].products == whole.products).all()
    assert (shards[0].totals == whole.totals).all()
    assert shards[0].rows == whole.rows


@pytest.mark.parametrize("group", [1, 4])
def test_second_order_rounding_beats_nearest_on_correlated_inputs(group: int) -> None:
    m = conv(group, 3, 1, 1, [1, 1, 1, 1])
    view = view_of(m)
    rng = np.random.default_rng(0)
    smooth = rng.standard_normal((8, 4, 4, 4)).repeat(4, axis=2).repeat(4, axis=3) + 2.0
    rows = patches(view, smooth.astype(np.float32), 4000, rng)
    gram = Gram.empty(view.groups, rows.shape[-1])
    gram.add(rows)
    nearest = quantize_weight(view, limit=7)  # 4 bits show the difference clearly

    second, shift = round_with(view, nearest, gram, limit=7)

    def error(codes: np.ndarray, bias: np.ndarray) -> float:
        wrong = as_rows(view, codes - view.weight.values.astype(np.float64))
        out = np.einsum("gok,grk->rgo", wrong, rows).reshape(len(rows[0]), -1) + bias
        return float(np.square(out).mean())

    assert np.abs(second.codes).max() <= 7
    assert error(second.dequantized(), shift) < 0.5 * error(nearest.dequantized(), np.zeros(8))


def test_padding_for_same_upper_matches_the_runtime() -> None:
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER", strides=[2, 2])
    w = np.random.default_rng(1).standard_normal((3, 2, 3, 3)).astype(np.float32)
    m = model([node], {"w": w}, [None, 2, None, None])
    x = np.random.default_rng(0).standard_normal((1, 2, 8, 7)).astype(np.float32)

    rows = patches(view_of(m), x, 10**6, np.random.default_rng(0))

    y = np.einsum("gok,grk->rgo", w.reshape(1, 3, -1), rows).reshape(-1, 3)
    expected = open_session(m).run({"x": x})[0].transpose(0, 2, 3, 1).reshape(-1, 3)
    assert np.allclose(y, expected, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
def test_squares_of_half_precision_inputs_do_not_overflow(groups: int) -> None:
    gram = Gram.empty(groups, 2)

    gram.add(np.full((groups, 100, 2), 500.0, np.float16))

    assert (gram.products == 100 * 500.0**2).all()
    assert (gram.totals == 100 * 500.0).all()


def test_rows_that_wait_count_as_soon_as_moments_are_read() -> None:
    x = np.random.default_rng(0).standard_normal((1, 5, 3))
    gram = Gram.empty(1, 3)

    gram.add(x[:, :2])
    gram.add(x[:, 2:])

    assert gram.rows == 5
    assert np.allclose(gram.products, x[0].T @ x[0])


@pytest.mark.parametrize(("wanted", "count", "samples", "rows"), [(640, 16, 64, 160), (640, 1, 64, 10), (8, 4, 64, 16)])
def test_each_part_gives_its_share_of_the_rows(wanted: int, count: int, samples: int, rows: int) -> None:
    assert rows_of(wanted, count, samples) == rows
