"""Ranges that get wider because the outputs come closer, and when they stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp.calibration.affine import QuantParameters
from onnxcomp.calibration.data import open_data
from onnxcomp.calibration.ranges import choose
from onnxcomp.manager import Context
from onnxcomp.passes import quantize_search
from onnxcomp.passes.candidate import Candidate, Decisions, first_decisions
from onnxcomp.passes.layout import CPU
from onnxcomp.passes.moments import observe_inputs
from onnxcomp.passes.placement import Placement
from onnxcomp.passes.quantize import Quantize
from onnxcomp.passes.wider_ranges import asking, redrawn, with_wider_ranges
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto
from onnxcomp.shapes import infer

X = np.random.default_rng(0).standard_normal((64, 3, 8, 8)).astype(np.float32)
X[0, 0, 0, 0] = 12.0  # what a range by squared error cuts off


def model(tail: str = "y = Conv (a, w2)") -> Any:
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[N, 3, 8, 8] x) => (float[N, 3, 8, 8] y) '
        f"{{ a = Conv (x, w1) {tail} }}"
    )
    rng = np.random.default_rng(1)
    for name in ("w1", "w2"):
        values = rng.standard_normal((3, 3, 1, 1)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return from_proto(proto)


def widened(
    score: Callable[[dict[str, QuantParameters]], float], cut: float = 0.5
) -> tuple[dict[str, QuantParameters], dict[str, QuantParameters], int]:
    """Ranges before, after, and the candidates built, where ranges first cover the share `cut` of what was seen."""
    one = model()
    plan = CPU.place(one, one.graph, infer(one), Context(), keep_float=frozenset())
    seen = statistics(one, plan)
    before = {n: choose(s, "minmax") for n, s in seen.items()}
    before = {n: replace(q, scale=float(np.float32(q.scale * cut))) for n, q in before.items()}
    built: list[Decisions] = []

    def build(decisions: Decisions) -> Candidate:
        built.append(decisions)
        return Candidate(decisions, one, tuple(plan.units), score=score(dict(decisions.chosen)))

    best = Candidate(first_decisions(plan, frozenset(), before), one, tuple(plan.units), score=score(before))
    found = with_wider_ranges(best, plan, seen, build, lambda share, what: None)
    return before, dict(found.decisions.chosen), len(built)


def statistics(one: Any, plan: Placement) -> Any:
    data = open_data({"x": X}, open_session(one).inputs)
    return observe_inputs(
        one, plan, data, grams=False, threads=1, memory=1 << 30, seed=0, progress=lambda share, text: None
    ).statistics


def test_a_range_grows_until_it_covers_what_was_seen_if_each_step_brings_the_outputs_closer() -> None:
    before, after, _ = widened(lambda chosen: 100 * chosen["a"].scale / (chosen["a"].scale + 1))

    growth = after["a"].scale / before["a"].scale
    assert growth == pytest.approx(1.25**4, rel=1e-5)  # the first power beyond 2
    assert after["a"].zero_point == before["a"].zero_point
    assert after["x"] == before["x"]


def test_a_range_stays_if_the_outputs_hardly_come_closer() -> None:
    before, after, _ = widened(lambda chosen: 0.01 * chosen["a"].scale)

    assert after == before


@pytest.mark.parametrize("cut", [1.01, 1.0])
def test_a_range_that_cuts_nothing_off_is_not_tried(cut: float) -> None:
    before, after, built = widened(lambda chosen: chosen["a"].scale, cut=cut)

    assert (after, built) == (before, 0)


def test_values_on_a_common_grid_stay_on_it() -> None:
    one = model("s = Add (a, x) y = Conv (s, w2)")
    plan = CPU.place(one, one.graph, infer(one), Context(), keep_float=frozenset())
    seen = statistics(one, plan)
    names = [plan.root(t).name for t in plan.quantized]
    shared = dict.fromkeys(names, QuantParameters(0.01, 128))

    def build(decisions: Decisions) -> Candidate:
        return Candidate(decisions, one, tuple(plan.units), score=decisions.chosen["s"].scale * 1000)

    best = build(first_decisions(plan, frozenset(), shared))
    found = with_wider_ranges(best, plan, seen, build, lambda share, what: None)

    assert found.decisions.chosen["s"].scale > 0.01
    assert len({found.decisions.chosen[n].scale for n in names}) == 1


def test_other_grids_of_a_candidate_are_offered_as_long_as_they_are_about_as_good() -> None:
    one = model()
    plan = CPU.place(one, one.graph, infer(one), Context(), keep_float=frozenset())
    chosen = {n: choose(s, "mse") for n, s in statistics(one, plan).items()}
    best = Candidate(first_decisions(plan, frozenset(), chosen), one, tuple(plan.units), score=30.0)

    def build(decisions: Decisions) -> Candidate:
        growth = decisions.chosen["x"].scale / chosen["x"].scale
        return replace(best, decisions=decisions, score=28.0 if growth > 1.015 else 29.5)

    found = list(redrawn(best, {"x"}, build))

    growths = [c.decisions.chosen["x"].scale / chosen["x"].scale for c in found]
    assert growths == pytest.approx([1.005, 1.01], rel=1e-5)
    assert {c.decisions.chosen["a"] for c in found} == {chosen["a"]}


@pytest.mark.parametrize(("work", "asked"), [(10**6, 64), (10**10, 32)])
def test_fewer_samples_of_a_model_with_more_work_are_asked(work: int, asked: int) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 3, H, W] x) => (float[N, 1000] y) '
        "{ a = Conv (x, w) p = GlobalAveragePool (a) y = Flatten (p) }"
    )
    weight = np.random.default_rng(0).standard_normal((1000, 3, 1, 1)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    one = from_proto(proto)
    feeds = np.broadcast_to(np.random.default_rng(1).standard_normal((64, 3, 1, 1)), (64, 3, 8, 8))
    data = open_data({"x": feeds.astype(np.float32)}, open_session(one).inputs)

    judge = asking(one, data, work, threads=1)

    assert judge.counted == asked


@pytest.mark.parametrize(("ranges", "tried"), [("auto", True), ("mse", False)])
def test_ranges_by_a_method_that_was_asked_for_are_left_alone(
    ranges: Any, tried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = model()
    data = open_data({"x": X}, open_session(one).inputs)
    starts: list[Candidate] = []

    def spy(best: Candidate, *rest: Any) -> Candidate:
        starts.append(best)
        wider = {n: replace(q, scale=q.scale * 1.5) for n, q in best.decisions.chosen.items()}
        return replace(best, decisions=replace(best.decisions, chosen=wider))

    monkeypatch.setattr(quantize_search, "with_wider_ranges", spy)
    details = Quantize(ranges=ranges, islands=False, finer_inputs=False, rescale=False).run(one, Context(data=data))

    assert bool(starts) is tried
    assert ("wider ranges" in details["steps_db"]) is tried
    if tried:
        scale = next(float(n.inputs[1].values) for n in one.graph.nodes if n.op == "QuantizeLinear")
        assert scale == pytest.approx(starts[0].decisions.chosen["x"].scale * 1.5)
