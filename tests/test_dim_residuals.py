"""Residual branches as removable units: which they are, exact removal, and what a plan makes of them."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxcomp.calibration.data import open_data
from onnxcomp.graph import Model
from onnxcomp.manager import Context, Pipeline
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.dim_costs import Costs
from onnxcomp.passes.dim_plan import levels
from onnxcomp.passes.dim_probe import plain_form
from onnxcomp.passes.dim_proof import removal_error
from onnxcomp.passes.dims import Coupling, couple
from onnxcomp.passes.repair import resolve
from onnxcomp.passes.surgery import remove
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto


def network(body: str, **shapes: tuple[int, ...]) -> Model:
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> net (float[n, 8, 6, 6] x) => (float[n, 4, 6, 6] y) {{ {body} }}'
    )
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        proto.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    return from_proto(proto)


def two_blocks(strength: float = 1.0) -> Model:
    """Two blocks behind a stem, the first of which adds `strength` times as much as it might."""
    model = network(
        """a = Conv (x, w0) r = Relu (a)
        b1 = Conv <pads = [1, 1, 1, 1]> (r, w1) c1 = Relu (b1) d1 = Conv <pads = [1, 1, 1, 1]> (c1, w2)
        s1 = Add (r, d1) r1 = Relu (s1)
        b2 = Conv <pads = [1, 1, 1, 1]> (r1, w3) c2 = Relu (b2) d2 = Conv <pads = [1, 1, 1, 1]> (c2, w4)
        s2 = Add (d2, r1) r2 = Relu (s2)
        y = Conv (r2, w5)""",
        w0=(16, 8, 1, 1), w1=(16, 16, 3, 3), w2=(16, 16, 3, 3), w3=(16, 16, 3, 3), w4=(16, 16, 3, 3), w5=(4, 16, 1, 1),
    )  # fmt: skip
    weight = next(i for i in model.graph.initializers if i.name == "w2")
    weight.values = weight.values * np.float32(strength)
    return model


def coupled(model: Model) -> Coupling:
    return couple(plain_form(model))


def test_a_branch_is_what_only_its_sum_needs() -> None:
    first, second = coupled(two_blocks()).residuals
    assert {n.outputs[0].name for n in first.nodes} == {"b1", "c1", "d1"}
    assert (first.gone.name, first.stays.name) == ("d1", "r")
    assert {n.outputs[0].name for n in second.nodes} == {"b2", "c2", "d2"}


@pytest.mark.parametrize("gone", [[0], [1], [0, 1]])
def test_without_branches_the_model_is_the_original_with_their_results_set_to_zero(gone: list[int]) -> None:
    found = coupled(two_blocks())
    units = [found.residuals[k].unit for k in gone]
    cut = remove(found, units)
    assert found.probe.larger is not None
    assert removal_error(found, units, cut.model, [found.probe.feeds, found.probe.larger]) < 1e-6


def test_what_a_branch_held_leaves_the_model() -> None:
    found = coupled(two_blocks())
    model = remove(found, [found.residuals[0].unit]).model
    Cleanup().run(model, Context())
    assert [n.op for n in model.graph.nodes].count("Conv") == 4
    assert [n.op for n in model.graph.nodes].count("Relu") == 3  # Relu of Relu is one
    assert not {"w1", "w2"} & {i.name for i in model.graph.initializers}


def test_of_two_branches_into_one_sum_the_heavier_one_can_go() -> None:
    model = network(
        """a = Conv (x, w0) b = Conv <pads = [1, 1, 1, 1]> (a, w1) c = Conv (a, w2) s = Add (b, c) y = Conv (s, w3)""",
        w0=(16, 8, 1, 1), w1=(16, 16, 3, 3), w2=(16, 16, 1, 1), w3=(4, 16, 1, 1),
    )  # fmt: skip
    (found,) = coupled(model).residuals
    assert found.gone.name == "b"


@pytest.mark.parametrize(
    "body",
    [
        "a = Conv (x, w0) b = Relu (a) s = Add (a, b) y = Conv (s, w3)",  # nothing but an activation
        "a = Conv (x, w0) b = Conv (a, w1) c = Relu (b) d = Add (a, b) s = Concat <axis = 1> (c, d) y = Conv (s, w4)",
        "a = Conv (x, w0) m = GlobalAveragePool (a) b = Conv (m, w1) s = Add (a, b) y = Conv (s, w3)",  # broadcast
    ],
)
def test_what_is_needed_elsewhere_or_is_no_branch_stays(body: str) -> None:
    shapes = {"w0": (16, 8, 1, 1), "w1": (16, 16, 1, 1), "w3": (4, 16, 1, 1), "w4": (4, 32, 1, 1)}
    model = network(body, **{k: v for k, v in shapes.items() if f"{k})" in body})
    assert coupled(model).residuals == ()


def test_a_branch_goes_or_stays_and_saves_all_of_its_multiplications() -> None:
    found = coupled(two_blocks())
    groups = [*found.groups, *found.branches]
    costs = Costs(found, groups)
    whole = [0] * len(groups)
    without = [0] * (len(groups) - 2) + [1, 0]
    assert levels(groups[-1], 8, 8) == [0, 1]
    assert costs.gain("macs", whole, len(groups) - 2, 1) == 2 * 36 * 9 * 16 * 16
    assert costs.of("params", whole) - costs.of("params", without) == 2 * 9 * 16 * 16


def test_the_next_block_makes_up_for_one_that_is_gone() -> None:
    found = coupled(two_blocks(0.3))
    cut = remove(found, [found.residuals[0].unit])
    x = {"x": np.random.default_rng(1).normal(size=(64, 8, 6, 6)).astype(np.float32)}
    data = open_data(x, open_session(found.model).inputs)
    expected, before = open_session(found.model).run(x)[0], open_session(cut.model).run(x)[0]
    resolve(cut, data, samples=None, threads=1, seed=0)
    after = open_session(cut.model).run(x)[0]
    assert np.square(after - expected).mean() < 0.5 * np.square(before - expected).mean()


def test_only_the_nearest_operators_are_solved_if_so_asked() -> None:
    found = coupled(two_blocks())
    cut = remove(found, [found.residuals[0].unit])
    x = {"x": np.random.default_rng(1).normal(size=(16, 8, 6, 6)).astype(np.float32)}
    data = open_data(x, open_session(found.model).inputs)
    assert len(resolve(cut, data, samples=None, threads=1, seed=0, nearest=2).errors) == 2


def test_a_plan_takes_a_branch_that_does_little() -> None:
    model = two_blocks(0.01)
    x = {"x": np.random.default_rng(1).normal(size=(64, 8, 6, 6)).astype(np.float32)}
    data = open_data(x, open_session(model).inputs)
    pruned = model.copy()
    (record,) = Pipeline.parse("prune-channels:macs=0.6").run(pruned, Context(data=data))
    assert len(record.details["removed_branches"]) == 1
    assert record.details["zero_slice_error"] < 1e-5
    assert [n.op for n in pruned.graph.nodes].count("Conv") == 4
    kept = model.copy()
    (record,) = Pipeline.parse("prune-channels:macs=0.6:branches=false").run(kept, Context(data=data))
    assert record.details["removed_branches"] == []
