"""The pass factorize: what it splits, what it leaves, and that the pair computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxcomp.calibration.data import open_data
from onnxcomp.concrete import concrete_types
from onnxcomp.errors import UsageError
from onnxcomp.graph import Model
from onnxcomp.manager import Context, PassRecord, Pipeline
from onnxcomp.passes.dim_sites import collect_grams, sites
from onnxcomp.passes.factor_sites import apply, candidates
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto

Array = npt.NDArray[Any]


def parse(text: str, **weights: Array) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in weights.items())
    return from_proto(proto)


def normal(*shape: int) -> Array:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def low_rank(rows: int, columns: int, rank: int, noise: float = 0.0) -> Array:
    return normal(rows, rank) @ normal(rank, columns) / rank + noise * normal(rows, columns)


def run(model: Model, spec: str, data: Any) -> tuple[Model, PassRecord]:
    copy = model.copy()
    (record,) = Pipeline.parse(spec).run(copy, Context(data=open_data(data, open_session(model).inputs)))
    return copy, record


def difference(a: Model, b: Model, feeds: dict[str, Array]) -> float:
    x, y = (open_session(m).run(feeds)[0].astype(np.float64) for m in (a, b))
    return float(np.abs(x - y).max() / np.abs(x).max())


CONVOLUTIONS = {
    "1x1": ("<strides = [2, 2]>", (1, 1)),
    "3x3": ("<pads = [1, 1, 1, 1]>", (3, 3)),
    "strided": ("<pads = [0, 1, 2, 1], strides = [2, 1], dilations = [1, 2]>", (3, 2)),
    "same": ('<auto_pad = "SAME_UPPER", strides = [2, 2]>', (3, 3)),
}


@pytest.mark.parametrize("kind", [*CONVOLUTIONS, "Gemm", "MatMul"])
def test_at_full_rank_every_scheme_gives_the_same_output(kind: str) -> None:
    if kind in CONVOLUTIONS:
        attrs, kernel = CONVOLUTIONS[kind]
        model = parse(
            f"net (float[N, 5, 9, 8] x) => (float[N, 6, H, W] y) {{ y = Conv {attrs} (x, w, b) }}",
            w=normal(6, 5, *kernel), b=normal(6),
        )  # fmt: skip
        feeds = {"x": normal(20, 5, 9, 8)}
    elif kind == "Gemm":
        text = "net (float[N, 12] x) => (float[N, 6] y) { y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b) }"
        model, feeds = parse(text, w=normal(6, 12), b=normal(6)), {"x": normal(40, 12)}
    else:
        text = "net (float[N, 3, 12] x) => (float[N, 3, 6] y) { a = MatMul (x, w) y = Add (a, b) }"
        model, feeds = parse(text, w=normal(12, 6), b=normal(6)), {"x": normal(40, 3, 12)}
    data = open_data(feeds, open_session(model).inputs)
    grams = collect_grams(model, sites(model), data, threads=1, memory=1 << 30, seed=0)
    types = concrete_types(model, known={"x": feeds["x"].shape})
    shapes: dict[Any, tuple[int, ...]] = {
        t: tuple(types[t].shape) for n in model.graph.nodes for t in (n.inputs[0], n.outputs[0])  # type: ignore[arg-type]
    }
    ((*pairs,),) = candidates(model, lambda site: True, grams, shapes, lambda where, why: None)
    assert {p.split.scheme for p in pairs} >= {"outputs"}
    for pair in pairs:
        split = model.copy()
        assert apply(split, pair, pair.split.rank) < 1e-6
        assert len(split.graph.nodes) == len(model.graph.nodes) + 1
        assert difference(model, split, feeds) < 1e-4, pair.split.scheme


def two_layers(**weights: Array) -> Model:
    return parse(
        """net (float[N, 256] x) => (float[N, 10] y) {
            a = Gemm (x, w1, b1)
            r = Relu (a)
            y = Gemm (r, w2, b2)
        }""",
        **({"w1": low_rank(256, 256, 8, 1e-3), "b1": normal(256), "w2": normal(256, 10), "b2": normal(10)} | weights),
    )


def test_a_matrix_of_low_rank_is_split() -> None:
    model, feeds = two_layers(), {"x": normal(100, 256)}
    split, record = run(model, "factorize:params=0.3:goal=size", feeds)

    (layer,) = record.details["layers"]
    assert layer["rank"] < 40
    assert layer["params_after"] == layer["rank"] * 512
    assert layer["macs_after"] < layer["macs_before"]
    assert record.details["params"] <= 0.3
    assert difference(model, split, feeds) < 0.02
    assert len(split.to_bytes()) < 0.4 * len(model.to_bytes())


def test_the_drop_bounds_the_ranks() -> None:
    model, feeds = two_layers(), {"x": normal(200, 256)}
    _, record = run(model, "factorize:drop=0.01:goal=size:only=w1", feeds)

    assert record.details["held_out_drop"] <= 0.01
    assert record.details["params"] < 0.6


def test_a_pair_that_takes_longer_is_refused_with_numbers() -> None:
    model = parse(
        "net (float[N, 16] x) => (float[N, 12] y) { y = Gemm (x, w, b) }", w=low_rank(16, 12, 2), b=normal(12)
    )
    same, record = run(model, "factorize:ratio=0.2", {"x": normal(60, 16)})

    assert record.details["factorized"] == 0
    assert same.to_bytes() == model.to_bytes()
    assert [r for r in record.refused if "of the multiplications but" in r.reason and "of the time" in r.reason]


def test_at_the_full_rank_nothing_is_saved_and_nothing_split() -> None:
    _, record = run(two_layers(), "factorize:ratio=1", {"x": normal(60, 256)})

    assert record.details["factorized"] == 0
    assert all("of the multiplications" in r.reason for r in record.refused)


def test_grouped_shared_and_sparse_weights_are_left_alone() -> None:
    sparse = normal(8, 8)
    sparse[:, :4] = 0
    model = parse(
        """net (float[N, 8, 6, 6] x) => (float[N, 8] y) {
            a = Conv <group = 2> (x, w1)
            p = GlobalAveragePool (a)
            f = Flatten (p)
            b = MatMul (f, w2)
            c = MatMul (b, w2)
            y = MatMul (c, w3)
        }""",
        w1=normal(8, 4, 3, 3), w2=normal(8, 8), w3=sparse,
    )  # fmt: skip
    same, record = run(model, "factorize:ratio=0.25:goal=size", {"x": normal(40, 8, 6, 6)})

    reasons = " ".join(r.reason for r in record.refused)
    assert "2 groups" in reasons
    assert "2 nodes share its weight" in reasons
    assert "made sparse" in reasons
    assert same.to_bytes() == model.to_bytes()


def test_only_and_skip_choose_operators() -> None:
    model, feeds = two_layers(w2=low_rank(256, 10, 2)), {"x": normal(60, 256)}
    for spec, node in (("only=w2", "y"), ("skip=w1", "y"), ("skip=w2", "a")):
        _, record = run(model, f"factorize:ratio=0.1:goal=size:{spec}", feeds)
        assert [node in layer["node"] for layer in record.details["layers"]] == [True]


def test_two_budgets_are_refused() -> None:
    with pytest.raises(UsageError, match="ratio and macs"):
        Pipeline.parse("factorize:ratio=0.5:macs=0.5")
