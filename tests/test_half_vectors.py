"""Vectors in half precision: which, what they compute, and that nothing of it is left when the model is loaded."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxcomp.graph import Model
from onnxcomp.passes.half_vectors import halve_vectors
from onnxcomp.profiling import executed_kernels
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto, to_bytes

RNG = np.random.default_rng(0)
W = RNG.standard_normal((8, 128)).astype(np.float32)
X = {"x": RNG.standard_normal((5, 8)).astype(np.float32)}


def network(bias: np.ndarray, op: str = "Add") -> Model:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 8] x) => (float[N, 128] y) {{ a = MatMul (x, w) y = {op} (a, bias) }}"""
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in (("w", W), ("bias", bias)))
    return from_proto(proto)


def test_a_bias_takes_half_the_bytes_and_no_kernel() -> None:
    bias = RNG.standard_normal(128).astype(np.float32)
    model, before = network(bias), network(bias)

    assert halve_vectors(model, lambda what: True) == 1

    x, y = (open_session(m).run(X)[0].astype(np.float64) for m in (before, model))
    assert np.abs(x - y).max() <= 2**-10 * np.abs(bias).max()
    assert "Cast" not in {k.op for k in executed_kernels(to_bytes(model), X, runs=2)}
    assert len(to_bytes(model)) < len(to_bytes(before))


@pytest.mark.parametrize(
    "bias",
    [
        np.full(31, 0.5, np.float32),
        np.full(128, 1e5, np.float32),
        np.full(128, 1e-7, np.float32) * np.linspace(1, 2, 128, dtype=np.float32),
        np.full(128, np.nan, np.float32),
        np.zeros(128, np.float32),
        np.ones(128, np.float64).astype(np.float16),
    ],
)
def test_what_half_precision_does_not_hold_stays(bias: np.ndarray) -> None:
    model = network(bias)

    assert halve_vectors(model, lambda what: True) == 0


def test_other_readers_and_what_is_not_allowed_stay() -> None:
    bias = RNG.standard_normal(128).astype(np.float32)

    assert halve_vectors(network(bias, "Div"), lambda what: True) == 0
    assert halve_vectors(network(bias), lambda what: False) == 0
