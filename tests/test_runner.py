"""The pass over the data: what it sees of a model, with any batches, within the memory it may use."""

from collections.abc import Iterator

import numpy as np
import onnx
import pytest

from onnxcomp import runtime
from onnxcomp.calibration import probes, runner
from onnxcomp.calibration.data import Dataset, open_data
from onnxcomp.calibration.runner import collect, expose, observe
from onnxcomp.errors import DataError, ModelError, ResourceError
from onnxcomp.graph import Model
from onnxcomp.passes.judge import Judge
from onnxcomp.runtime import Session, open_session
from onnxcomp.serde import from_proto, to_bytes

IMAGES = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 2, h, w] x) => (float[n, 3, a, b] y) {
  c = Conv <pads = [1, 1, 1, 1]> (x, kernel)
  r = Relu (c)
  y = Conv (r, mix)
}
"""

BRANCHES = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 4] x, bool c) => (float[n, 4] y) {
  z = Relu (x)
  y = If (c) <
    then_branch = t () => (float[n, 4] ty) { doubled = Add (z, z) ty = Neg (doubled) },
    else_branch = e () => (float[n, 4] ey) { squared = Mul (x, x) ey = Abs (squared) }
  >
}
"""

LOOP = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[4] x) => (float[4] y)
<int64 trips = {3}, bool go = {1}>
{
  y = Loop (trips, go, x) <
    body = b (int64 i, bool ok, float[4] state) => (bool ok_out, float[4] next) {
      ok_out = Identity (ok)
      doubled = Add (state, state)
      next = Neg (doubled)
    }
  >
}
"""


def parsed(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    return from_proto(proto)


def images() -> Model:
    rng = np.random.default_rng(3)
    kernel = rng.standard_normal((4, 2, 3, 3)).astype(np.float32)
    return parsed(IMAGES, kernel=kernel, mix=rng.standard_normal((3, 4, 1, 1)).astype(np.float32))


def given(model: Model, *feeds: np.ndarray, **options: int) -> Dataset:
    source = feeds[0] if len(feeds) == 1 else [{"x": f} for f in feeds]
    return open_data({"x": source} if len(feeds) == 1 else source, open_session(model).inputs, **options)


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_statistics_of_probed_maps_have_the_extremes_of_all_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_LARGE", 1)
    model, x = images(), random_images(4, 2, 96, 96)
    found = collect(model, given(model, x), {"c": None, "r": None})
    c, r = expose(model, ["c", "r"]).run({"x": x}, ["c", "r"])

    assert (found["c"].minimum, found["c"].maximum) == (pytest.approx(c.min()), pytest.approx(c.max()))
    assert (found["r"].minimum, found["r"].maximum) == (0.0, pytest.approx(r.max()))
    assert 0 < found["c"].count < c.size  # a sample of positions left the graph
    centers, counts = found["r"].histogram.bins()
    assert (centers * counts).sum() / counts.sum() == pytest.approx(r.mean(), rel=0.2)


def test_maps_that_are_not_known_to_hold_channels_first_are_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_LARGE", 1)
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[1, 8, 8, 3] x) => (float[1, 8, 8, 3] y) { y = Relu (x) }'
    model, x = parsed(text), random_images(1, 8, 8, 3)
    found = collect(model, given(model, x), {"y": None})

    assert found["y"].count == x.size


@pytest.mark.parametrize("memory", [1, 20_000, 1 << 30])
def test_whatever_the_memory_budget_every_value_is_seen_once(memory: int) -> None:
    model, x = images(), random_images(6, 2, 12, 12)
    seen: dict[str, list[np.ndarray]] = {"x": [], "c": [], "r": [], "y": []}
    count = observe(model, given(model, x, batch=4), list(seen), lambda n, v, count: seen[n].append(v), memory=memory)
    expected = expose(model, ["c", "r"]).run({"x": x}, ["c", "r", "y"])

    assert count == 6
    for name, whole in zip(("x", "c", "r", "y"), [x, *expected], strict=True):
        assert np.allclose(np.concatenate(seen[name]), whole, atol=1e-5)


def test_no_run_fetches_more_than_the_budget_where_batches_can_be_cut() -> None:
    model, x = images(), random_images(16, 2, 32, 32)
    largest = 0

    def take(name: str, value: np.ndarray, count: int) -> None:
        nonlocal largest
        largest = max(largest, value.nbytes)

    observe(model, given(model, x, batch=16), ["c", "r"], take, memory=100_000)

    assert largest <= 100_000


def test_values_of_unknown_size_do_not_take_a_run_each(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        g (float[N, 8] x) => (float[N, 8] y) {
          a = com.microsoft.FastGelu (x)
          b = com.microsoft.FastGelu (a)
          c = com.microsoft.FastGelu (b)
          y = Relu (c)
        }"""
    )
    runs = []
    run = Session.run
    monkeypatch.setattr(Session, "run", lambda self, *a: (runs.append(a[1]), run(self, *a))[1])
    seen: dict[str, int] = {}

    observe(model, given(model, random_images(16, 8)), ["a", "b", "c"], lambda n, v, count: seen.update({n: len(v)}))

    assert seen == {"a": 16, "b": 16, "c": 16}
    assert len(runs) <= 2


def test_batches_of_other_sizes_and_shapes_are_seen_together() -> None:
    model = images()
    feeds = [random_images(1, 2, 8, 8), 2 * random_images(3, 2, 16, 12), random_images(2, 2, 5, 40)]
    found = collect(model, given(model, *feeds), {"x": None, "r": None, "c": 1})
    values = [expose(model, ["c"]).run({"x": x}, ["c"])[0] for x in feeds]

    assert found["x"].count == sum(x.size for x in feeds)
    assert found["c"].maximum == pytest.approx(max(v.max() for v in values))
    assert found["c"].channels is not None
    assert found["c"].channels.count == sum(v[:, 0].size for v in values)
    assert found["c"].channels.mean == pytest.approx(sum(v.sum((0, 2, 3)) for v in values) / found["c"].channels.count)


def test_values_in_both_branches_of_an_if_are_seen() -> None:
    model = parsed(BRANCHES)
    ones = np.ones((2, 4), np.float32)
    feeds = [{"x": 2 * ones, "c": np.array(True)}, {"x": 3 * ones, "c": np.array(False)}]
    found = collect(model, open_data(feeds, open_session(model).inputs), {"z": None, "doubled": None, "squared": None})

    assert (found["doubled"].maximum, found["doubled"].count) == (4.0, 8)
    assert (found["squared"].maximum, found["squared"].count) == (9.0, 8)
    assert found["z"].count == 16


def test_a_value_in_a_loop_is_seen_in_every_iteration() -> None:
    model = parsed(LOOP)
    (values,) = expose(model, ["doubled"]).run({"x": np.ones(4, np.float32)}, ["doubled"])

    assert values[:, 0].tolist() == [2.0, -4.0, 8.0]


def test_a_value_that_does_not_exist_is_a_model_error() -> None:
    with pytest.raises(ModelError):
        expose(images(), ["nowhere"])


def test_an_activation_that_is_not_finite_is_a_data_error() -> None:
    model = images()

    with pytest.raises(DataError, match="not finite"):
        collect(model, given(model, np.full((1, 2, 8, 8), 3e38, np.float32)), {"c": None})


def test_data_are_read_once() -> None:
    model, reads = images(), 0

    def read() -> Iterator[dict[str, np.ndarray]]:
        nonlocal reads
        reads += 1
        yield {"x": random_images(1, 2, 8, 8)}

    data = open_data(read, open_session(model).inputs)
    reads = 0
    collect(model, data, {"c": None, "r": None}, memory=1)

    assert reads == 1


# --- models above the size of one message ---


def large(monkeypatch: pytest.MonkeyPatch) -> tuple[Model, np.ndarray]:
    """A model whose weights do not fit into a message, as the limit is lowered."""
    rng = np.random.default_rng(0)
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 32] x) => (float[n, 32] y) { a = MatMul (x, w) b = Relu (a) wide = Cast <to = 1> (h)
        y = MatMul (b, wide) }"""
    weights = {"w": rng.standard_normal((32, 32)), "h": rng.standard_normal((32, 32))}
    model = parsed(text, w=weights["w"].astype(np.float32), h=weights["h"].astype(np.float16))
    monkeypatch.setattr(runtime, "_MESSAGE_LIMIT", 2000)
    return model, rng.standard_normal((3, 32)).astype(np.float32)


@pytest.mark.parametrize("optimize", [True, False])
def test_a_model_above_the_message_limit_gives_the_same_outputs(
    monkeypatch: pytest.MonkeyPatch, optimize: bool
) -> None:
    model, x = large(monkeypatch)
    small = open_session(to_bytes(model), optimize=optimize).run({"x": x})[0]

    assert (open_session(model, optimize=optimize).run({"x": x})[0] == small).all()
    assert (expose(model, ["b"], optimize=optimize).run({"x": x}, ["y"])[0] == small).all()


def test_a_model_above_the_message_limit_is_calibrated_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = large(monkeypatch)
    data = given(model, x)

    assert collect(model, data, {"b": None})["b"].count == x.size
    assert Judge(model, data).score(model)[1] == 0.0


def test_weights_that_cannot_be_handed_over_are_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[n, 32] x, bool c) => (float[n, 32] y) {
        y = If (c) <then_branch = t () => (float[n, 32] ty) <float[32, 32] w> { ty = MatMul (x, w) },
                    else_branch = e () => (float[n, 32] ey) { ey = Identity (x) }> }"""
    proto = onnx.parser.parse_model(text.replace("<float[32, 32] w>", ""))
    branch = next(a.g for a in proto.graph.node[0].attribute if a.name == "then_branch")
    branch.initializer.append(onnx.numpy_helper.from_array(np.ones((32, 32), np.float32), "w"))
    model = from_proto(proto)
    monkeypatch.setattr(runtime, "_MESSAGE_LIMIT", 2000)

    with pytest.raises(ResourceError, match="save the model"):
        open_session(model)


@pytest.mark.slow
def test_a_model_of_more_than_two_gigabytes_runs_and_is_calibrated() -> None:
    width, layers = 8192, 9  # 2.4 GB of float32
    nodes = " ".join(f"v{i + 1} = MatMul (v{i}, v0)" for i in range(layers))  # the weights come below
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, {width}] v0) => (float[n, {width}] v{layers}) {{ {nodes} }}"""
    model = from_proto(onnx.parser.parse_model(text))
    scope = model.graph
    for i, node in enumerate(scope.nodes):
        weight = np.zeros((width, width), np.float32)
        np.fill_diagonal(weight, 1.0 + i)
        node.inputs[1] = model.constant(scope, f"weight{i}", weight)
    x = np.ones((1, width), np.float32)

    with pytest.raises(ResourceError):
        to_bytes(model)
    values = expose(model, ["v1"]).run({"v0": x}, ["v1", f"v{layers}"])
    assert values[0].max() == 1.0
    assert values[1].max() == pytest.approx(float(np.prod(np.arange(1.0, layers + 1))))
    data = open_data({"v0": x}, open_session(model).inputs)
    assert runner.collect(model, data, {"v2": None})["v2"].maximum == 2.0
