"""Inputs made from the graph: in range, reproducible, and accepted by the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.parser import parse_model

from onnxcomp.errors import InconclusiveError
from onnxcomp.runtime import TensorSpec, open_session
from onnxcomp.synthesis import synthesize, usable_inputs

ZOO = Path("/work/shared/zoo/models")
HEAD = '<ir_version: 10, opset_import: ["" : 17]>\n'


def made(text: str, count: int = 6) -> list[dict[str, Any]]:
    proto = parse_model(HEAD + text)
    return usable_inputs(open_session(proto), proto, count=count)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    specs = [TensorSpec("x", "tensor(float)", (2, "n")), TensorSpec("i", "tensor(int64)", ("n",))]
    one, again, other = (synthesize(specs, None, seed=s, count=3, sizes={"n": 5}) for s in (1, 1, 2))
    for a, b, c in zip(one, again, other, strict=True):
        assert a["x"].tobytes() == b["x"].tobytes() != c["x"].tobytes()
        assert a["i"].tobytes() == b["i"].tobytes()


def test_a_dimension_has_one_size_in_all_inputs_and_sums_of_dimensions_add_up() -> None:
    specs = [
        TensorSpec("x", "tensor(float)", ("b", "n")),
        TensorSpec("y", "tensor(float)", ("b", "n + past", 3)),
    ]
    feed = synthesize(specs, None, seed=0, count=1, sizes={"b": 2, "n": 5, "past": 4})[0]
    assert feed["x"].shape == (2, 5)
    assert feed["y"].shape == (2, 9, 3)


def test_float_inputs_are_normal_uniform_and_sparse_in_turn() -> None:
    feeds = synthesize([TensorSpec("x", "tensor(float)", (1000,))], None, seed=0, count=3)
    normal, uniform, sparse = (feed["x"] for feed in feeds)
    assert normal.dtype == np.float32
    assert normal.min() < -1
    assert 0 <= uniform.min() < 0.1 < 0.9 < uniform.max() < 1
    assert 0.8 < (sparse == 0).mean() < 0.98


def test_indices_stay_inside_the_table_behind_casts_and_reshapes() -> None:
    feeds = made("""m (int32[N, T] ids) => (float[N, T, 4] y)
        <float[7, 4] table = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0},
         int64[2] same = {0, 0}>
        { wide = Cast<to=7>(ids)  square = Reshape(wide, same)  y = Gather(table, square) }""")
    values = np.concatenate([feed["ids"].ravel() for feed in feeds])
    assert set(values) == set(range(7))


def test_a_scalar_takes_the_constant_that_a_branch_waits_for() -> None:
    feeds = made("""m (float[1] x, int64 rate) => (float[1] y) <int64 known = {16000}>
        { hit = Equal(rate, known)
          y = If(hit) <then_branch = a () => (float[1] p) { p = Neg(x) },
                       else_branch = b () => (float[1] q) { q = Abs(x) }> }""")
    assert {int(feed["rate"]) for feed in feeds} == {16000}


def test_masks_start_with_ones_and_hold_nothing_but_zeros_and_ones() -> None:
    feeds = synthesize([TensorSpec("attention_mask", "tensor(int64)", (2, 10))], None, seed=0, count=20)
    masks = np.concatenate([feed["attention_mask"] for feed in feeds])
    assert (masks[:, 0] == 1).all()
    assert (np.diff(masks, axis=1) <= 0).all()
    assert (masks == 0).any()


def test_a_quantized_input_stays_in_the_range_of_its_scale() -> None:
    feeds = made("""m (float[64] x) => (float[64] y) <float s = {0.5}, uint8 z = {128}>
        { q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }""")
    values = np.concatenate([feed["x"] for feed in feeds])
    assert -64 <= values.min() < -32
    assert 31.5 < values.max() <= 63.5


def test_a_normalized_input_has_the_statistics_of_its_normalization() -> None:
    feeds = made(
        """m (float[1, 2, 30, 30] x) => (float[1, 2, 30, 30] y)
        <float[2] g = {1, 1}, float[2] b = {0, 0}, float[2] mean = {100, -5}, float[2] var = {4, 0.25}>
        { y = BatchNormalization(x, g, b, mean, var) }""",
        count=1,
    )
    assert feeds[0]["x"].mean(axis=(0, 2, 3)) == pytest.approx([100, -5], abs=0.3)
    assert feeds[0]["x"].std(axis=(0, 2, 3)) == pytest.approx([2, 0.5], rel=0.1)


def test_bytes_cover_their_whole_range() -> None:
    feed = synthesize([TensorSpec("pixels", "tensor(uint8)", (1, 3, 64, 64))], None, seed=0, count=1)[0]
    assert (feed["pixels"].min(), feed["pixels"].max()) == (0, 255)


def test_sizes_are_tried_until_the_model_runs() -> None:
    feeds = made(
        """m (float[batch, n] x) => (float[batch, 2] y) <float[48, 2] w>
        { k = Constant<value = int64[2] {48, 2}>()  v = Constant<value = float[1] {1}>()
          full = Expand(v, k)  y = MatMul(x, full) }""".replace(" <float[48, 2] w>", "")
    )
    assert feeds[0]["x"].shape == (1, 48)


def test_a_model_that_runs_on_nothing_made_up_is_inconclusive() -> None:
    with pytest.raises(InconclusiveError, match="--eval"):
        made("""m (float[batch, n] x) => (float[batch, 2] y)
            { k = Constant<value = int64[2] {41, 2}>()  v = Constant<value = float[1] {1}>()
              full = Expand(v, k)  y = MatMul(x, full) }""")


def test_an_input_that_numpy_cannot_hold_is_inconclusive() -> None:
    with pytest.raises(InconclusiveError, match="'s'"):
        synthesize([TensorSpec("s", "seq(tensor(float))", None)], None, seed=0, count=1)


@pytest.mark.skipif(not ZOO.is_dir(), reason="the zoo of real models is not here")
@pytest.mark.parametrize(
    "name",
    [
        "espcn_x3_d2s_op18",
        "gtcrn_simple",
        "hand_keypoint_mlp",
        "hand_point_history_mlp",
        "magika_standard_v3_3",
        "mlperf_kws_dscnn_fp32",
        "mlperf_pretrainedResnet_large_float",
        "mnist_cntk",
        "nnsplit_en",
        "ppocr_cls",
        "ppocr_en_number_rec",
        "resnet20_cifar10",
        "resnet56_cifar10",
        "sevenseg_cls_dith",
        "silero_vad_16k_op15",
        "squeezenet_winml_fp16",
        "squeezenet_winml_fp32",
        "yunet_n_dynamic",
    ],
)
def test_real_models_run_on_made_up_inputs_and_stay_finite(name: str) -> None:
    path = ZOO / f"{name}.onnx"
    session = open_session(path)
    feeds = usable_inputs(session, onnx.load(path), count=2)
    for output in session.run(feeds[1]):
        assert np.isfinite(output).all()
