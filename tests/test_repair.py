"""Solving weights anew after a removal."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxcomp.calibration.data import Dataset, open_data
from onnxcomp.graph import Model
from onnxcomp.passes.dim_probe import plain_form
from onnxcomp.passes.dim_readers import Reader
from onnxcomp.passes.dim_recurrent import expose_states, recurrent_sites
from onnxcomp.passes.dim_sites import collect_grams, sites
from onnxcomp.passes.dims import couple
from onnxcomp.passes.repair import Repaired, compensate, resolve
from onnxcomp.passes.surgery import Cut, remove
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto

# The reader of 12 channels of which 4 are sums of two others: what goes can be put back exactly.
READERS = {
    "Conv": ("y = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (a, w, v)", (5, 12, 3, 3)),
    "ConvTranspose": (
        "y = ConvTranspose <strides = [2, 2], pads = [1, 0, 0, 1], output_padding = [1, 0], dilations = [1, 2]> "
        "(a, w, v)",
        (12, 5, 3, 3),
    ),
    "Gemm": ("p = GlobalAveragePool (a) q = Flatten (p) y = Gemm <alpha = 0.5, transB = 1> (q, w, v)", (5, 12)),
    "GRU": (
        "p = ReduceMean <axes = [3], keepdims = 0> (a) q = Transpose <perm = [2, 0, 1]> (p) "
        "y = GRU <hidden_size = 5> (q, w, u)",
        (1, 15, 12),
    ),
    "MatMul": ("p = Transpose <perm = [0, 2, 3, 1]> (a) q = MatMul (p, w) y = Add (q, v)", (12, 5)),
}


def network(reader: str) -> Model:
    text, shape = READERS[reader]
    rank = {"Gemm": "n, c"}.get(reader, "n, c, h, w2")
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> net (float[n, 8, 6, 6] x) => (float[{rank}] y) '
        f"{{ a = Conv (x, m, b) {text} }}"
    )
    rng = np.random.default_rng(0)
    m = rng.normal(size=(12, 8, 1, 1))
    b = rng.normal(size=12)
    for values in (m, b):
        values[8:] = values[:4] + values[4:8]
    for name, values in (
        ("m", m),
        ("b", b),
        ("w", rng.normal(size=shape)),
        ("v", rng.normal(size=5)),
        *([("u", rng.normal(size=(1, 15, 5)))] if reader == "GRU" else []),
    ):
        proto.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    return from_proto(proto)


def compensate_all(cut: Cut, data: Dataset) -> None:
    model = cut.coupling.model
    found: list[Reader] = [*sites(model), *recurrent_sites(model)]
    compensate(cut, found, collect_grams(model, found, data, threads=1, memory=1 << 30, seed=0))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("method", ["compensate", "resolve"])
def test_what_other_channels_know_is_put_back(reader: str, method: str) -> None:
    model = plain_form(network(reader))
    coupling = couple(model)
    (group,) = coupling.groups
    producer = next(t for t, _ in group.axes if t.name.startswith("m"))
    gone = coupling.label(producer, 0)[8:].tolist()
    cut = remove(coupling, gone)
    x = {"x": np.random.default_rng(1).normal(size=(48, 8, 6, 6)).astype(np.float32)}
    data = open_data(x, open_session(model).inputs)
    expected, before = open_session(model).run(x)[0], open_session(cut.model).run(x)[0]
    if method == "compensate":
        compensate_all(cut, data)
    else:
        resolve(cut, data, samples=None, threads=1, seed=0)
    after = open_session(cut.model).run(x)[0]
    power = np.square(expected - expected.mean()).mean()
    assert np.square(before - expected).mean() > 0.1 * power
    assert np.square(after - expected).mean() < 1e-3 * power


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("method", ["compensate", "resolve"])
def test_zeros_of_a_sparse_weight_stay(reader: str, method: str) -> None:
    model = plain_form(network(reader))
    weight = next(i for i in model.graph.initializers if i.name == "w")
    mask = np.random.default_rng(3).random(weight.shape) > 0.5
    weight.values = weight.values * mask
    coupling = couple(model)
    (group,) = coupling.groups
    producer = next(t for t, _ in group.axes if t.name.startswith("m"))
    cut = remove(coupling, coupling.label(producer, 0)[8:].tolist())
    x = {"x": np.random.default_rng(1).normal(size=(48, 8, 6, 6)).astype(np.float32)}
    data = open_data(x, open_session(model).inputs)
    expected, before = open_session(model).run(x)[0], open_session(cut.model).run(x)[0]
    if method == "compensate":
        compensate_all(cut, data)
    else:
        resolve(cut, data, samples=None, threads=1, seed=0)
    after = open_session(cut.model).run(x)[0]
    read = next(n.inputs[1].values for n in reversed(cut.model.graph.nodes) if n.op == reader)
    axis = mask.shape.index(12)
    assert not read[~np.take(mask, range(8), axis=axis)].any()
    assert np.square(after - expected).mean() < np.square(before - expected).mean()


def without_three_channels(proto: onnx.ModelProto, shapes: dict[str, tuple[int, ...]]) -> tuple[Cut, Any, Repaired]:
    """A model with random weights, of which "m" has lost three outputs and the rest was solved anew, and the data."""
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        proto.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    model = plain_form(from_proto(proto))
    coupling = couple(model)
    producer = next(t for g in coupling.groups for t, _ in g.axes if t.name.startswith("m"))
    cut = remove(coupling, coupling.label(producer, 0)[:3].tolist())
    x = {"x": rng.normal(size=(40, 8, 6, 6)).astype(np.float32)}
    return cut, x, resolve(cut, open_data(x, open_session(model).inputs), samples=None, threads=1, seed=0)


def test_an_error_ahead_of_a_sum_with_a_shortcut_is_fitted_after_it() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> net (float[n, 8, 6, 6] x) => (float[n, 4, 6, 6] y) {
        a = Conv (x, m)
        s = Conv (a, w1)
        r = Conv (a, w2)
        z = Add (r, s)
        y = Conv (z, w3)
    }"""
    proto = onnx.parser.parse_model(text)
    for node in proto.graph.node:
        if node.output[0] == "r":
            node.attribute.append(onnx.helper.make_attribute("pads", [1, 1, 1, 1]))
    cut, x, found = without_three_channels(
        proto, {"m": (12, 8, 1, 1), "w1": (6, 12, 1, 1), "w2": (6, 12, 3, 3), "w3": (4, 6, 1, 1)}
    )
    for before, after in found.errors.values():
        assert after < before
    expected, after_all = open_session(cut.coupling.model).run(x)[0], open_session(cut.model).run(x)[0]
    assert np.square(expected - after_all).mean() < 0.05 * np.square(expected).mean()


RECURRENT = {
    "LSTM": ('direction = "bidirectional"', "Y, h", 4, 2),
    "GRU": ("linear_before_reset = 1", "Y, h", 3, 1),
    "RNN": ('activations = ["Tanh"]', ", h", 1, 1),
}


@pytest.mark.parametrize("op", RECURRENT)
@pytest.mark.parametrize("method", ["compensate", "both"])
def test_what_other_states_know_is_put_back(op: str, method: str) -> None:
    """Units 6 and 7 of eight compute what 0 and 1 do."""
    attributes, outputs, gates, directions = RECURRENT[op]
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> net (float[7, n, 4] x) => (float[d, n, 3] y) '
        f"{{ {outputs} = {op} <hidden_size = 8, {attributes}> (x, w, r, b) y = MatMul (h, m) }}"
    )
    rng = np.random.default_rng(5)
    shapes = {"w": (4,), "r": (8,), "b": ()}
    for name, rest in shapes.items():
        halves = 2 if name == "b" else 1
        values = rng.normal(size=(directions, halves * gates, 8, *rest)) * 0.5
        values[:, :, 6:] = values[:, :, :2]
        values = values.reshape(directions, halves * gates * 8, *rest)
        proto.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    proto.graph.initializer.append(numpy_helper.from_array(rng.normal(size=(8, 3)).astype(np.float32), "m"))
    model = plain_form(from_proto(proto))
    expose_states(model)
    coupling = couple(model)
    (group,) = coupling.groups
    r = next(t for t, axis in group.axes if t.name == "r")
    cut = remove(coupling, coupling.label(r, 2)[6:].tolist())
    x = {"x": rng.normal(size=(7, 64, 4)).astype(np.float32)}
    data = open_data({"x": x["x"]}, open_session(model).inputs)
    expected, before = open_session(model).run(x)[0], open_session(cut.model).run(x)[0]
    compensate_all(cut, data)
    if method == "both":
        resolve(cut, data, samples=None, threads=1, seed=0)
    after = open_session(cut.model).run(x)[0]
    assert np.square(before - expected).mean() > 0.01 * np.square(expected).mean()
    assert np.square(after - expected).mean() < 1e-3 * np.square(before - expected).mean()


def test_a_bool_may_live_between_two_fitted_operators() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        net (float[n, 8, 6, 6] x) => (float[n, 4, 6, 6] y) <float k = {0}> {
            a = Conv (x, m)
            g = Greater (a, k)
            s = Conv (a, w1)
            z = Where (g, s, a)
            y = Conv (z, w2)
        }""")
    _, _, found = without_three_channels(proto, {"m": (12, 8, 1, 1), "w1": (12, 12, 1, 1), "w2": (4, 12, 1, 1)})
    before, after = found.errors["Conv(s)"]
    assert after < 0.01 * before
