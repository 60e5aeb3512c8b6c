"""islands: what serves an output that few samples show stays in float, where that costs little."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp.calibration.data import open_data
from onnxcomp.errors import UsageError
from onnxcomp.graph import Model
from onnxcomp.macs import count_macs
from onnxcomp.manager import Context
from onnxcomp.passes import quantize_search
from onnxcomp.passes.candidate import Candidate, Decisions, first_decisions
from onnxcomp.passes.islands import rescue
from onnxcomp.passes.judge import Judge
from onnxcomp.passes.layout import CPU
from onnxcomp.passes.quantize import Quantize
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto
from onnxcomp.shapes import infer

RNG = np.random.default_rng(0)


def w(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) * 0.2).astype(np.float32)


def detector(width: int) -> Model:
    """A trunk, a branch that always says something, and one of `width` channels that speaks up for large inputs."""
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] box, float[N, 1, 8, 8] found) {
          t = Conv <pads = [1, 1, 1, 1]> (x, w1)  tr = Relu (t)
          u = Conv <pads = [1, 1, 1, 1]> (tr, w2)  ur = Relu (u)
          box = Conv (ur, w3)
          h = Conv (ur, w4)  hr = Relu (h)  z = Conv (hr, w5)
          found = Sigmoid (z)
        }""")
    weights = {"w1": w(16, 3, 3, 3), "w2": w(16, 16, 3, 3), "w3": w(4, 16, 1, 1)}
    weights |= {"w4": np.abs(w(width, 16, 1, 1)), "w5": np.abs(w(1, width, 1, 1))}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    return from_proto(proto)


def samples(loud: int) -> dict[str, np.ndarray]:
    """40 pictures, of which `loud` are twenty times as bright."""
    x = RNG.standard_normal((40, 3, 8, 8)).astype(np.float32) * 0.1
    x[:loud] *= 20
    return {"x": x}


def context(model: Model, feeds: dict[str, np.ndarray]) -> Context:
    return Context(data=open_data(feeds, open_session(model).inputs), max_drop=0.5)


def run(model: Model, ctx: Context, **options: Any) -> Any:
    return Quantize(rescale=False, rounding="nearest", bias_correction=False, **options).run(model, ctx)


@pytest.mark.parametrize(("loud", "rare"), [(0, []), (1, ["box"]), (20, [])])
def test_an_output_is_rare_if_few_samples_hold_its_power(loud: int, rare: list[str]) -> None:
    model = detector(1)
    data = context(model, samples(loud)).data
    assert data is not None

    found = Judge(model, data).rare_outputs()

    assert [n for n in found if n == "box"] == rare


def test_the_branch_of_a_rare_output_stays_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "rare_outputs", lambda self: ["found"])
    model = detector(1)

    details = run(model, context(model, samples(0)))

    assert details["float_islands"] == ["Conv(h)", "Conv(z)"]
    assert details["quantized"] == 3


def test_a_branch_that_holds_much_of_the_work_is_not_kept_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "rare_outputs", lambda self: ["found"])
    model = detector(64)

    details = run(model, context(model, samples(0)))

    assert details["float_islands"] == []


def pictures(first: np.ndarray, size: str = "8, 8") -> Model:
    """A first layer of little work, and layers of more."""
    proto = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 4, {size}] x) => (float[N, 32, {size}] y) {{
          a = Conv (x, w1)  ar = Relu (a)
          b = Conv <pads = [1, 1, 1, 1]> (ar, w2)  br = Relu (b)
          y = Conv <pads = [1, 1, 1, 1]> (br, w3)
        }}""")
    weights = {"w1": first, "w2": w(32, 32, 3, 3), "w3": w(32, 32, 3, 3)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in weights.items())
    return from_proto(proto)


def hardly_reads_the_first_channel() -> np.ndarray:
    first = w(32, 4, 1, 1)
    first[:, 0] *= 0.01
    return first


def wide_channel() -> dict[str, np.ndarray]:
    x = RNG.standard_normal((40, 4, 8, 8)).astype(np.float32)
    x[:, 0] *= 50
    return {"x": x}


@pytest.mark.parametrize("size", ["8, 8", "H, W"])
def test_the_first_layer_stays_in_float_if_rounding_its_input_costs_much(size: str) -> None:
    model = pictures(hardly_reads_the_first_channel(), size)

    details = run(model, context(model, wide_channel()))

    assert details["float_islands"] == ["Conv(a)"]


def test_the_first_layer_is_quantized_where_that_costs_nothing() -> None:
    model = pictures(np.where(w(32, 4, 1, 1) > 0, np.float32(0.25), np.float32(-0.25)))  # codes without an error
    integers = wide_channel()["x"].round().clip(-127, 128)
    integers[:, 0, 0, :2] = [-127, 128]  # a scale of 1

    details = run(model, context(model, {"x": integers}))

    assert details["float_islands"] == []


@pytest.mark.parametrize(("slower", "worth"), [(1.02, True), (1.08, False)])
def test_an_island_may_take_a_few_percent_of_the_time(
    monkeypatch: pytest.MonkeyPatch, slower: float, worth: bool
) -> None:
    monkeypatch.setattr(quantize_search, "speed_ratio", lambda *args, **options: 1 / slower)
    monkeypatch.setattr(quantize_search, "drop_slow_groups", lambda best, *args, **options: best)
    model = pictures(hardly_reads_the_first_channel())

    details = run(model, context(model, wide_channel()), latency=True)

    assert ("Conv(a)" in details["float_islands"]) is worth


def test_an_island_that_saves_time_need_not_be_closer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_search, "speed_ratio", lambda *args, **options: 1.2)
    monkeypatch.setattr(quantize_search, "drop_slow_groups", lambda best, *args, **options: best)
    model = pictures(np.where(w(32, 4, 1, 1) > 0, np.float32(0.25), np.float32(-0.25)))
    integers = wide_channel()["x"].round().clip(-127, 128)
    integers[:, 0, 0, :2] = [-127, 128]

    details = run(model, context(model, {"x": integers}), latency=True)

    assert "Conv(a)" in details["float_islands"]


@pytest.mark.parametrize(("count", "solved"), [(39, False), (40, True)])
def test_weights_are_re_solved_only_if_samples_held_out_can_tell(count: int, solved: bool) -> None:
    model = detector(1)
    feeds = {"x": samples(0)["x"][:count]}

    details = Quantize(rescale=False, bias_correction=False).run(model, context(model, feeds))

    assert ("weights for rounded inputs" in details["steps_db"]) is solved


@pytest.mark.parametrize("cost", [-0.1, 1.5, float("nan")])
def test_a_cost_of_islands_that_is_no_share_is_refused(cost: float) -> None:
    with pytest.raises(UsageError, match="island_cost"):
        Quantize(island_cost=cost)


def three_layers() -> tuple[Model, Candidate]:
    """The model and a candidate with all of a, b and c in 8 bits; b and c hold nearly all the work."""
    model = pictures(w(32, 4, 1, 1))
    plan = CPU.place(model, model.graph, infer(model), Context(), keep_float=frozenset())
    return model, Candidate(first_decisions(plan, frozenset(), {}), model, tuple(plan.units), score=0.0, drop=1.0)


def multiplications(model: Model) -> dict[str, int]:
    return {node.outputs[0].name: macs for node, macs in count_macs(model).nodes.items()}


def rescued(good: set[frozenset[str]], noise: dict[str, float]) -> tuple[frozenset[str], list[frozenset[str]]]:
    """What is in float where only `good` is good enough, and what was finished. One unit in float leaves `noise`."""
    model, best = three_layers()
    finished: list[frozenset[str]] = []

    def build(decisions: Decisions) -> Candidate:
        left = min((noise[k] for k in decisions.skip), default=1.0)
        return replace(best, decisions=decisions, score=-10 * np.log10(left), drop=1.0, sqnr=0.0)

    def finish(candidate: Candidate) -> Candidate:
        finished.append(candidate.decisions.skip)
        return replace(candidate, sqnr=1.0)

    def enough(candidate: Candidate) -> bool:
        assert candidate.sqnr == 1.0, "a candidate that was not finished was judged"
        return candidate.decisions.skip in good

    found = rescue(best, build, finish, multiplications(model), enough, lambda share, what: None)
    return found.decisions.skip, finished


def test_a_rescue_judges_finished_candidates_and_takes_the_layer_that_brings_most() -> None:
    found, finished = rescued({frozenset("b")}, {"a": 1.0, "b": 0.1, "y": 0.9})

    assert found == {"b"}
    assert finished == [frozenset(), {"b"}]


def test_a_rescue_quantizes_again_what_turns_out_to_be_too_much() -> None:
    found, _ = rescued({frozenset("by"), frozenset("y")}, {"a": 1.0, "b": 0.1, "y": 0.9})

    assert found == {"y"}


@pytest.mark.parametrize("passing", [None, 0, 1])
def test_a_rescue_asks_other_candidates_in_8_bits_before_layers_go_to_float(passing: int | None) -> None:
    model, best = three_layers()
    others = [replace(best, sqnr=40.0), replace(best, sqnr=41.0)]
    asked: list[float] = []

    def enough(candidate: Candidate) -> bool:
        asked.append(candidate.sqnr)
        return bool(candidate.decisions.skip) or (passing is not None and candidate.sqnr == others[passing].sqnr)

    def build(decisions: Decisions) -> Candidate:
        return replace(best, decisions=decisions)

    found = rescue(best, build, lambda c: c, multiplications(model), enough, lambda share, what: None, others)

    if passing is None:
        assert found.decisions.skip
        assert asked[:3] == [best.sqnr, 40.0, 41.0]
    else:
        assert found is others[passing]
        assert len(asked) == passing + 2


def test_a_rescue_tries_each_layer_in_8_bits_before_all_stay_in_float() -> None:
    found, _ = rescued({frozenset("ay")}, {"a": 0.1, "b": 0.2, "y": 0.9})

    assert found == {"a", "y"}, "a and b, which bring most, are not enough"


def test_a_rescue_that_finds_nothing_leaves_all_in_float() -> None:
    found, _ = rescued(set(), {"a": 1.0, "b": 0.1, "y": 0.9})

    assert found == {"a", "b", "y"}
