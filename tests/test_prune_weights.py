"""The pass prune-weights: budgets, patterns, kinds of operators, and zeros that later passes keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

import onnxcomp
from onnxcomp import io
from onnxcomp.calibration.data import open_data
from onnxcomp.calibration.split import limited
from onnxcomp.errors import UsageError
from onnxcomp.graph import Model
from onnxcomp.manager import Context, PassRecord, Pipeline
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto

Array = npt.NDArray[Any]


def parse(text: str, **weights: Array) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in weights.items())
    return from_proto(proto)


def normal(*shape: int) -> Array:
    return np.random.default_rng(shape).standard_normal(shape)


def w(*shape: int) -> Array:
    return (0.3 * normal(*shape)).astype(np.float32)


def images(count: int = 60, channels: int = 4, size: int = 8) -> dict[str, Array]:
    """Pictures with neighbours alike, as real ones are."""
    x = normal(count, channels, size, size)
    for axis in (1, 2, 3):
        x = x + np.roll(x, 1, axis)
    return {"x": x.astype(np.float32)}


def network() -> Model:
    return parse(
        """net (float[N, 4, 8, 8] x) => (float[N, 6] y) {
            a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
            r = Relu (a)
            b = Conv <group = 16, pads = [1, 1, 1, 1]> (r, w2, b2)
            s = Add (b, r)
            c = Conv <group = 2> (s, w3)
            t = Relu (c)
            d = ConvTranspose <strides = [2, 2]> (t, w4, b4)
            p = GlobalAveragePool (d)
            f = Flatten (p)
            g = MatMul (f, w5)
            h = Add (g, b5)
            y = Gemm <transB = 1> (h, w6, b6)
        }""",
        w1=w(16, 4, 3, 3), b1=w(16), w2=w(16, 1, 3, 3), b2=w(16), w3=w(16, 8, 1, 1), w4=w(16, 8, 3, 3), b4=w(8),
        w5=w(8, 12), b5=w(12), w6=w(6, 12), b6=w(6),
    )  # fmt: skip


def run(model: Model, spec: str, data: Any = None, **given: Any) -> tuple[Model, PassRecord]:
    copy = model.copy()
    opened = None if data is None else open_data(data, open_session(model).inputs)
    (record,) = Pipeline.parse(spec).run(copy, Context(data=opened, **given))
    return copy, record


def weights(model: Model) -> dict[str, Array]:
    return {i.name: i.values for scope in model.graph.scopes() for i in scope.initializers if len(i.shape) >= 2}


def sparsity(model: Model) -> float:
    found = weights(model).values()
    return sum(int((v == 0).sum()) for v in found) / sum(v.size for v in found)


def noise(a: Model, b: Model, feeds: dict[str, Array]) -> float:
    x, y = (open_session(m).run(feeds)[0].astype(np.float64) for m in (a, b))
    return float(np.square(x - y).sum() / np.square(x - x.mean(axis=0)).sum())


# --- budgets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.9])
def test_a_ratio_is_met_over_all_weights(ratio: float) -> None:
    model = network()
    pruned, record = run(model, f"prune-weights:ratio={ratio}:method=wanda:sensitivity=false", images())

    assert sparsity(pruned) == pytest.approx(ratio, abs=0.01)
    assert record.details["sparsity"] == pytest.approx(sparsity(pruned), abs=1e-4)
    assert {name: v.shape for name, v in weights(pruned).items()} == {n: v.shape for n, v in weights(model).items()}


def test_outputs_stay_far_closer_than_by_magnitude() -> None:
    model, fresh = network(), images()
    plain, _ = run(model, "prune-weights:ratio=0.5:method=magnitude:update=false:allocation=uniform")
    best, _ = run(model, "prune-weights:ratio=0.5", images(300))

    assert noise(model, best, fresh) < 0.1 * noise(model, plain, fresh)


def test_a_uniform_ratio_is_met_by_each_weight() -> None:
    pruned, _ = run(network(), "prune-weights:ratio=0.5:allocation=uniform", images())

    for name, values in weights(pruned).items():
        assert np.mean(values == 0) == pytest.approx(0.5, abs=0.02), name


def test_ratios_by_name_leave_the_others_alone() -> None:
    model = network()
    pruned, record = run(model, "prune-weights:ratios=w1=0.5+Gemm*=75%:sequential=false", images())

    before, after = weights(model), weights(pruned)
    assert np.mean(after["w1"] == 0) == 0.5
    assert np.mean(after["w6"] == 0) == 0.75
    assert all(np.array_equal(before[n], after[n]) for n in before if n not in ("w1", "w6"))
    assert record.rewrites == 2


def test_ratios_come_from_a_recipe_table() -> None:
    given = Pipeline.parse([{"name": "prune-weights", "ratios": {"w1": 0.5, "w6": "75%"}}])
    assert given == Pipeline.parse("prune-weights:ratios=w1=0.5+w6=75%")


def test_only_and_skip_choose_weights_by_node_or_weight() -> None:
    model = network()
    spec = "prune-weights:ratio=0.5:only=Conv*+w5:skip=w3:allocation=uniform:sequential=false"
    pruned, _ = run(model, spec, images())

    before, after = weights(model), weights(pruned)
    assert {n for n in before if not np.array_equal(before[n], after[n])} == {"w1", "w2", "w4", "w5"}


def test_the_drop_bounds_what_goes() -> None:
    model, data = network(), images(60)
    quick = "method=wanda:sensitivity=false:sequential=false"
    strict, loose = (run(model, f"prune-weights:drop={drop}:{quick}", data)[1].details for drop in (0.01, 0.2))

    assert strict["held_out_drop"] <= 0.01
    assert loose["held_out_drop"] <= 0.2
    assert loose["sparsity"] > strict["sparsity"]


def test_a_limit_on_rewrites_leaves_later_weights_dense() -> None:
    pruned, record = run(network(), "prune-weights:ratio=0.5:allocation=uniform:sequential=false", images(), limit=2)

    assert [n for n, v in weights(pruned).items() if np.mean(v == 0) > 0.3] == ["w1", "w2"]
    assert record.rewrites == 2


def test_the_same_run_gives_the_same_weights() -> None:
    model, data = network(), images()
    first, second = (run(model, "prune-weights:ratio=0.6:allocation=uniform", data)[0].to_bytes() for _ in range(2))
    assert first == second


def test_without_data_a_ratio_goes_by_magnitude() -> None:
    model = network()
    pruned, record = run(model, "prune-weights:ratio=0.5:allocation=uniform")

    assert {r["method"] for r in record.details["weights"]} == {"magnitude"}
    values = weights(model)["w1"]
    kept = weights(pruned)["w1"] != 0
    assert np.abs(values[kept]).min() >= np.abs(values[~kept]).max()
    np.testing.assert_array_equal(weights(pruned)["w1"][kept], values[kept])


def test_biases_are_not_pruned() -> None:
    pruned, _ = run(network(), "prune-weights:ratio=0.9:method=wanda:allocation=uniform", images())
    assert all(np.all(i.values != 0) for i in pruned.graph.initializers if len(i.shape) == 1)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ratio=0.5:drop=0.1", "one budget"),
        ("ratio=1.5", "from 0 to 0.99"),
        ("pattern=3", "unstructured, N:M"),
        ("ratios=conv1", "NAME=SHARE"),
        ("ratios=conv1=2", "NAME=SHARE"),
    ],
)
def test_options_that_make_no_sense_are_refused(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Pipeline.parse(f"prune-weights:{spec}")


def test_a_name_that_fits_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="nowhere"):
        run(network(), "prune-weights:ratios=nowhere=0.5", images())


def test_without_data_and_budget_it_says_what_to_give() -> None:
    with pytest.raises(UsageError, match=r"ratio=0\.5"):
        run(network(), "prune-weights")


def test_replaced_biases_do_not_stay_in_the_file() -> None:
    model = network()
    pruned, _ = run(model, "prune-weights:ratio=0.5:allocation=uniform:method=wanda", images())

    with_new_bias = 16  # the Conv that had none
    sizes = [sum(i.weight.size for i in m.graph.initializers) for m in (model, pruned)]
    assert sizes[1] == sizes[0] + with_new_bias


def test_the_account_counts_what_is_there() -> None:
    pruned, record = run(network(), "prune-weights:ratio=0.6:allocation=uniform", images())

    found = weights(pruned)
    for row in record.details["weights"]:
        assert row["zeros"] == int((found[row["weight"]] == 0).sum())
        assert row["error"] < 1
    assert record.details["bytes_packed"] < 0.5 * record.details["bytes_dense"]
    assert "multiply them like any other number" in record.details["notes"][0]


def test_a_sparse_model_is_kept_though_its_file_is_as_large(root: Path, tmp_path: Path) -> None:
    data = root / "models" / "data"
    report = onnxcomp.optimize(
        root / "models" / "cancer_mlp.onnx",
        tmp_path / "sparse.onnx",
        calib=data / "cancer_mlp.calib.npz",
        passes="prune-weights:ratio=0.3",
        max_drop=1.0,
        bench_seconds=0.2,
    )

    assert report.passes[0].reverted is None
    assert sparsity(io.load(tmp_path / "sparse.onnx")) == pytest.approx(0.3, abs=0.01)


# --- patterns -----------------------------------------------------------------------------------------------


def test_two_of_four_input_channels_stay() -> None:
    pruned, record = run(network(), "prune-weights:ratio=0.5:pattern=2:4", images())

    found = weights(pruned)
    assert ((found["w1"].reshape(16, 1, 4, 9) != 0).sum(axis=2) <= 2).all()
    assert ((found["w3"].reshape(16, 2, 4) != 0).sum(axis=2) <= 2).all()
    assert ((found["w4"].reshape(4, 4, 72) != 0).sum(axis=1) <= 2).all()
    assert ((found["w5"].reshape(2, 4, 12) != 0).sum(axis=1) <= 2).all()
    assert ((found["w6"].reshape(6, 3, 4) != 0).sum(axis=2) <= 2).all()
    assert any("1 input channels are no multiple of 4" in r.reason for r in record.refused)


def test_blocks_go_as_a_whole() -> None:
    pruned, _ = run(network(), "prune-weights:ratio=0.5:pattern=4x1:only=w1+w6", images())

    zero = (weights(pruned)["w1"] == 0).reshape(4, 4, -1)
    assert (zero.all(axis=1) == zero.any(axis=1)).all()


def test_tensorrt_is_told_which_weights_its_sparse_kernels_fit() -> None:
    _, record = run(network(), "prune-weights:ratio=0.5:pattern=2:4", images(), target="tensorrt")
    assert "3 of 5 weights belong to a Conv or Gemm" in record.details["notes"][1]


# --- operators ----------------------------------------------------------------------------------------------


def test_a_shared_weight_stays_shared() -> None:
    model = parse(
        """net (float[N, 16] x) => (float[N, 16] y) {
            a = MatMul (x, w1)
            t = Tanh (a)
            y = MatMul (t, w1)
        }""",
        w1=w(16, 16),
    )
    data = {"x": normal(60, 16).astype(np.float32) @ w(16, 16)}
    pruned, record = run(model, "prune-weights:ratio=0.5", data)

    first, _, second = pruned.graph.nodes
    assert first.inputs[1] is second.inputs[1]
    assert sparsity(pruned) == 0.5
    plain, _ = run(model, "prune-weights:ratio=0.5:method=magnitude:update=false")
    assert noise(model, pruned, data) < 0.5 * noise(model, plain, data)
    assert len(record.details["weights"][0]["nodes"]) == 2


def test_a_weight_that_is_also_a_table_is_left_alone() -> None:
    model = parse(
        """net (int64[N] i, float[N, 8] x) => (float[N, 8] y) {
            e = Gather (w1, i)
            s = Add (e, x)
            y = MatMul (s, w1)
        }""",
        w1=w(8, 8),
    )
    pruned, record = run(model, "prune-weights:ratio=0.5")

    assert sparsity(pruned) == 0
    assert any("Gather" in r.reason for r in record.refused)


@pytest.mark.parametrize("outputs", ["ys", ", h"])
@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_recurrent_weights_are_solved_for_inputs_and_states(op: str, outputs: str) -> None:
    gates = 4 if op == "LSTM" else 3
    last = "ys" if outputs == "ys" else "h"
    rank = "a, b, c, d" if outputs == "ys" else "a, b, c"
    model = parse(
        f"""net (float[T, N, 12] x) => (float[{rank}] {last}) {{
            {outputs} = {op} <hidden_size = 10, direction = "bidirectional"> (x, w, r, b)
        }}""",
        w=w(2, gates * 10, 12), r=w(2, gates * 10, 10), b=w(2, gates * 20),
    )  # fmt: skip
    x = np.cumsum(normal(60, 9, 1, 12), axis=1).astype(np.float32) @ w(12, 12)
    feeds = [{"x": value} for value in x]
    pruned, record = run(model, "prune-weights:ratio=0.5:allocation=uniform", lambda: iter(feeds))
    plain, _ = run(model, "prune-weights:ratio=0.5:allocation=uniform")

    assert record.details["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert {r["method"] for r in record.details["weights"]} == {"admm"}
    assert noise(model, pruned, feeds[0]) < 0.7 * noise(model, plain, feeds[0])


def test_weights_of_branches_are_pruned_for_what_comes_there() -> None:
    model = parse(
        """net (float[N, 8] x, bool c) => (float[M, 5] y) {
            a = MatMul (x, w1)
            y = If (c) <
                then_branch = yes () => (float[M, 5] p) { p = Gemm (a, w2, b2) },
                else_branch = no () => (float[M, 5] q) { q = MatMul (a, w3) }
            >
        }""",
        w1=w(8, 8), w2=w(8, 5), b2=w(5), w3=w(8, 5),
    )  # fmt: skip
    x = normal(40, 6, 8).astype(np.float32) @ w(8, 8)
    feeds = [{"x": value, "c": np.array(i % 2 == 0)} for i, value in enumerate(x)]
    pruned, record = run(model, "prune-weights:ratio=0.5:allocation=uniform", lambda: iter(feeds))

    assert sparsity(pruned) == pytest.approx(0.5, abs=0.02)
    assert [r["method"] for r in record.details["weights"]] == ["admm"] * 3
    for sample in feeds[:2]:
        assert noise(model, pruned, sample) < 0.5


def test_a_constant_first_operand_goes_by_magnitude() -> None:
    model = parse("net (float[8, N] x) => (float[8, N] y) { y = MatMul (w1, x) }", w1=w(8, 8))
    pruned, record = run(model, "prune-weights:ratio=0.5", {"x": normal(20, 8, 5).astype(np.float32)})

    assert sparsity(pruned) == 0.5
    assert record.details["weights"][0]["method"] == "magnitude"


# --- zeros that stay ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sparse(root: Path) -> tuple[Model, Any]:
    """A trained network of the project before fusion, 60 % of its weights zero; calibration data."""
    model = io.load(root / "models" / "digits_keras.onnx")
    data = open_data(root / "models" / "data" / "digits_keras.calib.npz", open_session(model).inputs)
    Pipeline.parse("cleanup,fold-constants,cleanup").run(model, Context())
    Pipeline.parse("prune-weights:ratio=0.6:allocation=uniform:sequential=false").run(model, Context(data=data))
    return model, limited(data, 100)


def zeros(model: Model) -> int:
    return sum(int((v == 0).sum()) for v in weights(model).values())


@pytest.mark.parametrize(
    "spec",
    [
        "fuse",
        "fuse,equalize",
        "fuse,quantize:islands=false",
        "fuse,equalize,quantize:islands=false",
        "fuse,quantize:mode=weights",
    ],
)
def test_later_passes_keep_zeros(sparse: tuple[Model, Any], spec: str) -> None:
    model, data = sparse
    later = model.copy()
    Pipeline.parse(spec).run(later, Context(data=data))

    assert later.to_bytes() != model.to_bytes()
    assert zeros(later) >= zeros(model)
