"""Smoothing: the function stays, outliers move into the weights, and quantization gains from it."""

import numpy as np
import onnx
import pytest

from onnxcomp.calibration.data import open_data
from onnxcomp.calibration.runner import collect
from onnxcomp.graph import Model
from onnxcomp.manager import Context, run_pass
from onnxcomp.passes.quantize import Quantize
from onnxcomp.passes.smooth import sites, smooth
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto

RNG = np.random.default_rng(0)
DATA = {"x": RNG.standard_normal((80, 32)).astype(np.float32)}


def block(text: str) -> Model:
    """A normalization whose gamma has outliers, in front of two products."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    gamma = np.ones(32, np.float32)
    gamma[[3, 17]] = 60
    w = (RNG.standard_normal((32, 24)) / 6).astype(np.float32)
    w[[3, 17]] /= 60
    values = {"gamma": gamma, "beta": RNG.standard_normal(32).astype(np.float32), "w1": w, "w2": w[:, ::-1].copy()}
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in values.items() if k in used)
    return from_proto(proto)


NORMALIZED = """g (float[N, 32] x) => (float[N, 24] y, float[N, 24] z) {
  v = LayerNormalization (x, gamma, beta) y = MatMul (v, w1) z = MatMul (v, w2) }"""
IN_PIECES = """g (float[N, 32] x) => (float[N, 24] y) {
  u = Tanh (x) m = Mul (gamma, u) v = Add (m, beta) y = Gemm (v, w1) }"""
WITH_RESIDUAL = """g (float[N, 32] x) => (float[N, 24] y, float[N, 32] z) {
  v = LayerNormalization (x, gamma, beta) y = MatMul (v, w1) z = Add (v, x) }"""


def outputs(model: Model) -> list[np.ndarray]:
    return [np.asarray(o) for o in open_session(model).run(DATA)]


@pytest.mark.parametrize("text", [NORMALIZED, IN_PIECES])
def test_the_function_stays_and_outliers_move_into_the_weights(text: str) -> None:
    model = block(text)
    before, data = outputs(model), open_data(DATA, open_session(model).inputs)
    name = sites(model)[0].value.name
    seen = collect(model, data, {name: -1}, histogram=False)

    assert smooth(model, seen) == 1

    for old, new in zip(before, outputs(model), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-3, atol=1e-4)
    after = collect(model, data, {name: -1}, histogram=False)[name].channels
    first = seen[name].channels
    assert after is not None
    assert first is not None
    assert after.peak.max() / np.median(after.peak) < 0.3 * first.peak.max() / np.median(first.peak)


def test_a_value_that_something_else_reads_stays() -> None:
    assert sites(block(WITH_RESIDUAL)) == []


def test_quantization_smooths_where_that_wins() -> None:
    scores = {}
    for rescale in (False, True):
        model = block(NORMALIZED)
        ctx = Context(data=open_data(DATA, open_session(model).inputs))
        scores[rescale] = run_pass(Quantize(rescale=rescale, islands=False), model, ctx).details["sqnr_db"]

    assert scores[True] > scores[False] + 3
