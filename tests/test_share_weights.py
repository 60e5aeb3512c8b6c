"""share-weights: how many values, how close the outputs, which kernels, and what is left alone."""

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest

import onnxcomp
from onnxcomp.calibration.data import open_data
from onnxcomp.errors import UsageError
from onnxcomp.graph import Constant, Model
from onnxcomp.manager import Context, Pipeline
from onnxcomp.passes.share_weights import ShareWeights
from onnxcomp.profiling import executed_kernels
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto, to_bytes

RNG = np.random.default_rng(0)


def w(*shape: int, scale: float = 0.2) -> np.ndarray:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def parse(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    return from_proto(proto)


def residual(**changed: np.ndarray) -> Model:
    weights = {"w1": w(16, 3, 3, 3), "b1": w(16), "w2": w(16, 16, 3, 3), "w3": w(20, 16), "b3": w(20), **changed}
    return parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 12, 12] x) => (float[N, 20] y) {
          a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
          ar = Relu (a)
          b = Conv <pads = [1, 1, 1, 1]> (ar, w2)
          s = Add (b, ar)
          sr = Relu (s)
          p = GlobalAveragePool (sr)
          f = Flatten (p)
          y = Gemm <transB = 1> (f, w3, b3)
        }""",
        **weights,
    )


IMAGES = {"x": RNG.standard_normal((40, 3, 12, 12)).astype(np.float32)}
FRESH = {"x": np.random.default_rng(9).standard_normal((16, 3, 12, 12)).astype(np.float32)}


_START = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """The numbers of a test do not depend on the tests before it."""
    RNG.bit_generator.state = _START


def shared(model: Model, data: Any, spec: str) -> tuple[Model, Any, Context]:
    ctx = Context(data=None if data is None else open_data(data, open_session(model).inputs))
    copy = model.copy()
    record = Pipeline.parse(spec).run(copy, ctx)[-1]
    return copy, record, ctx


def sqnr(a: Model, b: Model, feeds: dict[str, np.ndarray]) -> float:
    x, y = (open_session(m).run(feeds)[0].astype(np.float64) for m in (a, b))
    return float(10 * np.log10(np.square(x).sum() / np.square(x - y).sum()))


def matrices(model: Model) -> dict[str, np.ndarray]:
    items = [i for s in model.graph.scopes() for i in s.initializers if isinstance(i, Constant)]
    return {i.name: i.values for i in items if len(i.shape) >= 2 and i.weight.size >= 256}


@pytest.mark.parametrize("form", ["tensor", "channels"])
def test_no_weight_holds_more_values_than_its_bits_allow(form: str) -> None:
    result, record, _ = shared(residual(), IMAGES, f"share-weights:bits=3:form={form}")

    assert record.details["shared"] == record.rewrites == 3
    assert max(len(np.unique(v)) for v in matrices(result).values()) <= 8
    assert len(matrices(result)) == 3
    kinds = {v.dtype for v in matrices(result).values()}
    assert kinds == {np.dtype(np.int8 if form == "channels" else np.float32)}


def test_outputs_of_a_trained_model_stay_closer_than_with_nearest_k_means(root: Any) -> None:
    model = onnxcomp.load(root / "models" / "digits_mlp.onnx")
    Pipeline.parse("cleanup,fold-constants,fuse").run(model, Context())
    data = str(root / "models" / "data" / "digits_mlp.calib.npz")
    evaluation = open_data(str(root / "models" / "data" / "digits_mlp.eval.npz"), open_session(model).inputs)
    feeds = next(evaluation.batches(200)).feeds
    scores = model.graph.outputs[-1].name

    def noise(spec: str) -> float:
        result, _, _ = shared(model, data, spec)
        x, y = (np.asarray(open_session(m).run(feeds, [scores])[0], np.float64) for m in (model, result))
        return float(np.square(x - y).sum())

    assert noise("share-weights:bits=2") < 0.25 * noise("share-weights:bits=2:form=tensor:assignment=nearest")


def test_fitting_in_sequence_does_not_lose_to_weights_on_their_own() -> None:
    model = residual()

    _, apart, _ = shared(model, IMAGES, "share-weights:bits=2:refit=false")
    _, together, _ = shared(model, IMAGES, "share-weights:bits=2")

    assert together.details["sqnr_db"] >= apart.details["sqnr_db"]


def test_zeros_of_a_pruned_weight_stay_zeros() -> None:
    sparse = w(16, 16, 3, 3)
    sparse[RNG.random(sparse.shape) < 0.6] = 0
    model = residual(w2=sparse)

    result, _, _ = shared(model, IMAGES, "share-weights:bits=2:form=tensor")

    values = matrices(result)["w2"]
    assert not values[sparse == 0].any()
    assert len(np.unique(values)) <= 4


def test_an_int8_model_keeps_its_kernels_and_holds_few_codes() -> None:
    model = residual()
    eight, _, _ = shared(model, IMAGES, "quantize:islands=false")

    result, record, _ = shared(eight, IMAGES, "share-weights:bits=4")

    ran = Counter({k.op: round(k.count) for k in executed_kernels(to_bytes(result), {"x": IMAGES["x"][:1]}, runs=2)})
    assert ran["QLinearConv"] == 2
    assert ran["QGemm"] == 1
    stored = matrices(result)
    assert {v.dtype for v in stored.values()} == {np.dtype(np.int8)}
    assert max(len(np.unique(v)) for v in stored.values()) <= 16
    assert {row["form"] for row in record.details["weights"]} == {"codes"}
    assert sqnr(eight, result, FRESH) > 15


def test_codes_behind_cast_and_mul_are_shared_too() -> None:
    stored, _, _ = shared(residual(), IMAGES, "quantize:mode=weights")

    result, record, _ = shared(stored, IMAGES, "share-weights:bits=3")

    codes = [v for v in matrices(result).values() if v.dtype == np.int8]
    assert codes
    assert max(len(np.unique(v)) for v in codes) <= 8
    assert record.details["shared"] >= len(codes)
    assert sqnr(stored, result, FRESH) > 10


def test_a_drop_decides_the_bits() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4, 16] x) => (float[N, 4, 24] y) {
          a = MatMul (x, w1)
          t = Tanh (a)
          y = MatMul (t, w2)
        }""",
        w1=w(16, 32), w2=w(32, 24),
    )  # fmt: skip
    data = {"x": w(40, 4, 16, scale=1.0)}

    _, careful, _ = shared(model, data, "share-weights:drop=0.01%:form=tensor")
    _, bold, _ = shared(model, data, "share-weights:drop=5%:form=tensor")

    assert careful.details["drop"] <= 0.0001
    assert bold.details["drop"] <= 0.05
    assert bold.details["bits_per_weight"] < careful.details["bits_per_weight"]


def test_a_size_is_kept() -> None:
    model = residual()
    before = len(model.to_bytes())

    _, record, _ = shared(model, IMAGES, "share-weights:size=3x:refit=false")

    assert record.details["estimated_bytes"] <= before / 3


def test_equal_tensors_are_tied_first() -> None:
    same = w(16, 16)
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 16] x) => (float[N, 16] y) {
          a = MatMul (x, w1)
          t = Tanh (a)
          y = MatMul (t, w2)
        }""",
        w1=same, w2=same.copy(),
    )  # fmt: skip

    result, record, _ = shared(model, {"x": w(64, 16, scale=1.0)}, "share-weights:bits=4")

    assert record.details["tied"] == 1
    assert len(matrices(result)) == 1


def test_a_recurrent_layer_uses_its_inputs_and_states() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[12, N, 8] x) => (float[12, 1, N, 16] y) {
          y = LSTM <hidden_size = 16> (x, w, r)
        }""",
        w=w(1, 64, 8, scale=0.5), r=w(1, 64, 16, scale=0.3),
    )  # fmt: skip
    mixing = np.random.default_rng(3).standard_normal((8, 8)) * np.linspace(0.1, 2, 8)
    data = [{"x": (RNG.standard_normal((12, 4, 8)) @ mixing).astype(np.float32)} for _ in range(24)]

    ours, _, _ = shared(model, data, "share-weights:bits=3:form=tensor")
    naive, _, _ = shared(model, data, "share-weights:bits=3:form=tensor:assignment=nearest")

    assert sqnr(model, ours, data[0]) > sqnr(model, naive, data[0]) + 1.5


def test_weights_of_branches_are_shared() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 16] x, bool c) => (float[N, 20] y) {
          y = If (c) <then_branch = t () => (float[N, 20] u) { u = MatMul (x, w1) },
                      else_branch = e () => (float[N, 20] v) { v = MatMul (x, w2) }>
        }""",
        w1=w(16, 20), w2=w(16, 20),
    )  # fmt: skip

    result, record, _ = shared(model, None, "share-weights:bits=3:form=tensor")

    assert record.details["shared"] == 2
    assert max(len(np.unique(v)) for v in matrices(result).values()) <= 8


def trained() -> Model:
    """Weights as training leaves them: most small, few large."""
    rng = np.random.default_rng(5)
    heavy = {"w2": rng.laplace(0, 0.05, (64, 64, 3, 3)).astype(np.float32), "w1": w(64, 3, 3, 3), "b1": w(64)}
    return residual(**heavy, w3=w(20, 64))


def test_with_zeros_plans_keep_to_the_size_and_are_closer() -> None:
    model = trained()
    wanted = len(to_bytes(model)) // 8

    dense, _, _ = shared(model, IMAGES, f"share-weights:size={wanted}")
    result, record, _ = shared(model, IMAGES, f"share-weights:size={wanted}:zeros=true")

    rows = {row["weight"]: row for row in record.details["weights"]}
    assert any(row["step"] for row in rows.values())
    for name, values in matrices(result).items():
        assert np.mean(values == 0) >= rows[name]["zeros"] - 0.01
    assert record.details["estimated_bytes"] <= wanted
    assert sqnr(model, result, FRESH) > sqnr(model, dense, FRESH) + 1.5


def test_the_check_sees_vectors_in_half_precision() -> None:
    model, seen = residual(b1=w(16), w1=w(64, 3, 3, 3)[:16], w3=w(40, 16), b3=w(40)), []
    ctx = Context(data=open_data(IMAGES, open_session(model).inputs), check=lambda m: bool(seen.append(m)) or True)

    Pipeline.parse("share-weights:zeros=true:half-vectors=true").run(model.copy(), ctx)

    assert seen
    assert all(any(n.op == "Cast" for n in m.nodes()) for m in seen)


def test_who_asks_for_scales_of_channels_gets_no_grid() -> None:
    _, record, _ = shared(residual(), IMAGES, "share-weights:size=8x:zeros=true:form=channels")

    assert {row["form"] for row in record.details["weights"]} <= {"channels", "plain"}


def test_biases_that_were_corrected_leave_no_others_behind() -> None:
    result, _, _ = shared(residual(), IMAGES, "share-weights:bits=3")

    read = {t for n in result.nodes() for t in n.inputs}
    assert [t.name for t in result.graph.initializers if t not in read] == []


def test_a_weight_that_is_not_finite_is_left_alone() -> None:
    broken = w(16, 16, 3, 3)
    broken[0, 0, 0, 0] = np.inf

    result, record, _ = shared(residual(w2=broken), None, "share-weights:bits=2:form=tensor")

    assert record.details["shared"] == 2
    assert np.array_equal(matrices(result)["w2"], broken)


@pytest.mark.parametrize(("options", "left"), [("only=w2", {"w1", "w3"}), ("skip=w2", {"w2"})])
def test_names_choose_the_weights(options: str, left: set[str]) -> None:
    model = residual()

    result, _, _ = shared(model, None, f"share-weights:bits=2:form=tensor:{options}")

    untouched = {k for k, v in matrices(result).items() if np.array_equal(v, matrices(model)[k])}
    assert untouched == left


def test_a_limit_of_rewrites_shares_only_the_first() -> None:
    model = residual()
    ctx = Context(limit=1)

    Pipeline.parse("share-weights:bits=2:form=tensor").run(model, ctx)

    assert sum(len(np.unique(v)) <= 4 for v in matrices(model).values()) == 1


@pytest.mark.parametrize("options", [{"bits": 9}, {"bits": 4, "drop": 0.01}, {"size": "small"}, {"drop": 2.0}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ShareWeights(**options)


def test_without_data_a_number_of_bits_is_needed() -> None:
    with pytest.raises(UsageError, match="--calib"):
        ShareWeights().run(residual(), Context())
