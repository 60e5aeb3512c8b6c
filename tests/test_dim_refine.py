"""Pairs of operators trained together after a removal, and the products that they are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxcomp.calibration.data import Dataset, open_data
from onnxcomp.graph import Model
from onnxcomp.passes.dim_probe import plain_form
from onnxcomp.passes.dim_products import Product
from onnxcomp.passes.dim_sites import Site, sites
from onnxcomp.passes.dims import Coupling, couple
from onnxcomp.passes.repair import resolve
from onnxcomp.passes.surgery import Cut, remove
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto

Array = npt.NDArray[Any]


def model_of(text: str, **weights: tuple[int, ...]) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        values = rng.normal(size=shape) / np.sqrt(max(1, np.prod(shape[1:])))
        values = {"low": np.zeros(()), "high": np.full((), 2.0)}.get(name, values)
        proto.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    return plain_form(from_proto(proto))


# --- products -----------------------------------------------------------------------------------------------

PRODUCTS = {
    "plain": ("Conv <pads = [1, 0, 1, 2], strides = [2, 1], dilations = [1, 2]> (x, w)", (4, 6, 3, 3)),
    "grouped": ("Conv <group = 3, pads = [1, 1, 1, 1]> (x, w)", (9, 2, 3, 3)),
    "same": ('Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w)', (4, 6, 3, 3)),
}


def product(case: str) -> tuple[Model, Site, Product, Array]:
    call, shape = PRODUCTS[case]
    model = model_of(f"net (float[n, 6, 7, 8] x) => (float[n, o, h, v] y) {{ y = {call} }}", w=shape)
    (site,) = sites(model)
    weight = site.matrix().transpose(0, 2, 1)
    weight = weight.reshape(*weight.shape[:2], -1, int(np.prod(shape[2:]))).astype(np.float32)
    return model, site, Product(site.form, (7, 8)), weight


@pytest.mark.parametrize("case", PRODUCTS)
def test_a_product_is_what_the_operator_computes(case: str) -> None:
    model, _, found, weight = product(case)
    x = np.random.default_rng(1).normal(size=(5, 6, 7, 8)).astype(np.float32)
    expected = open_session(model).run({"x": x})[0]
    np.testing.assert_allclose(found.forward(np.moveaxis(x, 1, 0), weight), np.moveaxis(expected, 1, 0), atol=1e-5)


@pytest.mark.parametrize("case", PRODUCTS)
def test_gradients_are_the_adjoints_of_the_product(case: str) -> None:
    """<W x, g> is linear in x and in W: both gradients give it back."""
    _, _, found, weight = product(case)
    rng = np.random.default_rng(2)
    x = rng.normal(size=(6, 5, 7, 8)).astype(np.float32)
    y = found.forward(x, weight)
    g = rng.normal(size=y.shape).astype(np.float32)
    inner = float(np.vdot(y, g))
    assert float(np.vdot(x, found.to_input(weight, g))) == pytest.approx(inner, rel=1e-4)
    assert float(np.vdot(weight, found.to_weight(x, g))) == pytest.approx(inner, rel=1e-4)


# --- pairs --------------------------------------------------------------------------------------------------

CONVOLUTIONS = "net (float[n, 4, 6, 6] x) => (float[n, 4, 6, 6] y)"
NETWORKS = {
    "Conv": (
        CONVOLUTIONS + " { a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) r = Relu (a) p = Conv (r, w2) "
        "y = Conv (p, w3) }",
        {"w1": (16, 4, 3, 3), "b1": (16,), "w2": (8, 16, 1, 1), "w3": (4, 8, 1, 1)},
    ),
    "fixed batch": (
        CONVOLUTIONS.replace("n,", "1,") + " { a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) r = Clip (a, low, high) "
        "p = Conv (r, w2) y = Conv (p, w3) }",
        {"w1": (16, 4, 3, 3), "b1": (16,), "w2": (8, 16, 1, 1), "w3": (4, 8, 1, 1), "low": (), "high": ()},
    ),
    "MatMul": (
        "net (float[n, 5, 8] x) => (float[n, 5, 4] y) { a = MatMul (x, w1) b = Add (a, b1) "
        "s = Sigmoid (b) r = Mul (b, s) p = MatMul (r, w2) q = Add (p, b2) y = MatMul (q, w3) }",
        {"w1": (8, 16), "b1": (16,), "w2": (16, 8), "b2": (8,), "w3": (8, 4)},
    ),
}


def narrowed(name: str) -> tuple[Cut, Dataset, Coupling]:
    """A network whose first operator loses half of its outputs."""
    text, weights = NETWORKS[name]
    coupling = couple(model_of(text, **weights))
    group = next(g for g in coupling.groups if any(t.name.startswith("w1") for t, _ in g.axes))
    shape = [200, *(d if isinstance(d, int) else 1 for d in coupling.model.graph.inputs[0].shape[1:])]
    x = {"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}
    data = open_data(x, open_session(coupling.model).inputs)
    return remove(coupling, group.units[::2]), data, coupling


def noise(cut: Cut, coupling: Coupling) -> float:
    shape = [100, *coupling.model.graph.inputs[0].shape[1:]]
    x = {"x": np.random.default_rng(2).normal(size=shape).astype(np.float32)}
    batches = open_data(x, open_session(coupling.model).inputs).batches()
    runs = [[open_session(m).run(b.feeds)[0] for m in (coupling.model, cut.model)] for b in batches]
    expected, found = (np.concatenate(y) for y in zip(*runs, strict=True))
    return float(np.square(found - expected).mean() / np.square(expected).mean())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pair_trained_together_loses_less_than_one_solved_alone(name: str) -> None:
    left = {}
    for refine in (False, True):
        cut, data, coupling = narrowed(name)
        resolve(cut, data, samples=None, threads=1, seed=0, refine=refine)
        left[refine] = noise(cut, coupling)
    assert left[True] < 0.9 * left[False]


def test_what_others_read_in_between_is_left_alone() -> None:
    """The first operator's outputs go to two readers: training it for one would spoil the other."""
    text = CONVOLUTIONS + " { a = Conv (x, w1) r = Relu (a) p = Conv (r, w2) q = Conv (r, w3) y = Add (p, q) }"
    coupling = couple(model_of(text, w1=(16, 4, 1, 1), w2=(4, 16, 1, 1), w3=(4, 16, 1, 1)))
    (group,) = coupling.groups
    x = {"x": np.random.default_rng(1).normal(size=(200, 4, 6, 6)).astype(np.float32)}
    data = open_data(x, open_session(coupling.model).inputs)
    models = []
    for refine in (False, True):
        cut = remove(coupling, group.units[:8])
        resolve(cut, data, samples=None, threads=1, seed=0, refine=refine)
        models.append(cut.model.to_bytes())
    assert models[0] == models[1]


def test_few_samples_train_nothing() -> None:
    cut, data, _ = narrowed("Conv")
    few = Dataset(data.source, data.labelled, 100, lambda: data.batches(100), data.divisible)
    resolve(cut, few, samples=None, threads=1, seed=0, refine=True)
    plain, _, _ = narrowed("Conv")
    resolve(plain, few, samples=None, threads=1, seed=0)
    assert cut.model.to_bytes() == plain.model.to_bytes()


def test_values_of_a_declared_batch_are_trained_on_in_larger_ones() -> None:
    """Between two operators that keep their widths the model says that the batch is 1."""
    text = (
        "net (float[1, 8, 6, 6] x) => (float[1, 4, 6, 6] y) { a = Conv (x, w0) "
        "b = Conv (a, w1) r = Relu (b) c = Conv (r, w2) s = Add (a, c) "
        "d = Conv (s, w3) t = Relu (d) e = Conv (t, w4) u = Add (s, e) y = Conv (u, w5) }"
    )
    shapes = {f"w{k}": (16, 16, 1, 1) for k in range(1, 5)}
    proto = onnx.load_from_string(model_of(text, w0=(16, 8, 1, 1), w5=(4, 16, 1, 1), **shapes).to_bytes())
    coupling = couple(from_proto(onnx.shape_inference.infer_shapes(proto)))
    x = {"x": np.random.default_rng(1).normal(size=(200, 8, 6, 6)).astype(np.float32)}
    data = open_data(x, open_session(coupling.model).inputs)
    models = []
    for refine in (False, True):
        cut = remove(coupling, [coupling.residuals[0].unit])
        resolve(cut, data, samples=None, threads=1, seed=0, refine=refine)
        models.append(cut.model.to_bytes())
    assert models[0] != models[1]
