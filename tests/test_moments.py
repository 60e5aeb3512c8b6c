"""The pass that quantization makes: shards of the data give the numbers of the whole."""

import numpy as np
import onnx
import pytest

from onnxcomp.calibration.data import Dataset, open_data
from onnxcomp.calibration.store import model_hash
from onnxcomp.graph import Model
from onnxcomp.manager import Context
from onnxcomp.passes.moments import Moments, observe_inputs
from onnxcomp.passes.placement import place
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto
from onnxcomp.shapes import infer

NETWORK = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[n, 3, 12, 12] x) => (float[n, 5] y)
<int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}>
{
  c = Conv (x, first)
  r = Relu (c)
  p = Pad (r, pads)
  d = Conv (p, second)
  pooled = GlobalAveragePool (d)
  flat = Flatten (pooled)
  y = Gemm <transB = 1> (flat, last)
}
"""


def network() -> Model:
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(NETWORK)
    for name, shape in (("first", (4, 3, 3, 3)), ("second", (8, 4, 3, 3)), ("last", (5, 8))):
        weight = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    return from_proto(proto)


def samples(model: Model, *parts: np.ndarray) -> Dataset:
    return open_data([{"x": part} for part in parts], open_session(model).inputs)


def seen(model: Model, data: Dataset, total: int) -> Moments:
    plan = place(model, model.graph, infer(model), Context())
    return observe_inputs(
        model, plan, data,
        grams=True, threads=1, memory=1 << 30, seed=0, progress=lambda share, text: None, samples=total,
    )  # fmt: skip


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_shards_in_any_order_merge_to_the_numbers_of_one_pass(order: tuple[int, ...]) -> None:
    model = network()
    rng = np.random.default_rng(1)
    batches = [rng.standard_normal((8, 3, 12, 12)).astype(np.float32) for _ in range(4)]
    whole = seen(model, samples(model, *batches), 32)
    shards = [seen(model, samples(model, batches[i]), 32).seen for i in order]
    merged = shards[0]
    for shard in shards[1:]:
        merged.merge(shard)

    assert merged.samples == whole.seen.samples == 32
    assert merged.tensors.keys() == whole.statistics.keys()
    for name, one in whole.statistics.items():
        other = merged.tensors[name]
        assert (one.minimum, one.maximum, one.count) == (other.minimum, other.maximum, other.count)
        assert (one.histogram.counts == other.histogram.counts).all()
    assert merged.grams.keys() == whole.grams.keys()
    assert {"c", "d", "y"} <= whole.grams.keys()
    for key, gram in whole.grams.items():
        assert (gram.products == merged.grams[key].products).all()
        assert (gram.totals == merged.grams[key].totals).all()
        assert gram.rows == merged.grams[key].rows


def test_a_value_that_only_moved_has_the_statistics_of_its_source() -> None:
    model = network()
    found = seen(model, samples(model, np.ones((1, 3, 12, 12), np.float32)), 1).statistics

    assert found["flat"].maximum == found["pooled"].maximum
    assert found["flat"] is not found["pooled"]


def test_the_hash_follows_weights_and_structure() -> None:
    one, other = network(), network()
    assert model_hash(one) == model_hash(other)

    scope = other.graph
    scope.nodes[0].inputs[1].values = scope.nodes[0].inputs[1].values + np.float32(1e-3)
    assert model_hash(one) != model_hash(other)
