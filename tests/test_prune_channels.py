"""The pass prune-channels: budgets, plans, repair, and exactness on whole architectures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from onnxcomp import io
from onnxcomp.calibration.data import Dataset, open_data
from onnxcomp.calibration.split import limited
from onnxcomp.cli import main
from onnxcomp.errors import UsageError
from onnxcomp.graph import Constant, Model
from onnxcomp.macs import count_macs
from onnxcomp.manager import Context, Pass, PassRecord, Pipeline
from onnxcomp.passes.dim_plan import levels
from onnxcomp.passes.dim_probe import plain_form
from onnxcomp.passes.dim_proof import provable, removal_error
from onnxcomp.passes.dims import Group, couple
from onnxcomp.passes.prune_channels import PruneChannels
from onnxcomp.passes.surgery import remove
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto
from tests.architectures import NAMES, TORCH, build

LOSSLESS = "cleanup,fold-constants,cleanup,fuse,cleanup"
MODELS = Path(__file__).resolve().parents[1] / "models"
Array = npt.NDArray[Any]


# --- architectures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture_can_be_pruned_everywhere_and_exactly(name: str) -> None:
    if name in TORCH and importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    model = from_proto(build(name))
    Pipeline.parse(LOSSLESS).run(model, Context())
    found = couple(plain_form(model))
    assert found.reachable() == 1.0
    assert not found.unknown
    units = [u for g in found.groups for u in g.units[: int(0.3 * g.width)]]
    cut = remove(found, units)
    assert found.probe.larger is not None
    assert provable(found, units)
    assert removal_error(found, units, cut.model, [found.probe.feeds, found.probe.larger]) < 1e-5


# --- the pass -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet(root: Path) -> tuple[Model, Dataset, dict[str, Array]]:
    """A trained network of the project, after the lossless passes; calibration data; evaluation data with labels."""
    model = io.load(root / "models" / "digits_resnet.onnx")
    Pipeline.parse(LOSSLESS).run(model, Context())
    data = open_data(root / "models" / "data" / "digits_resnet.calib.npz", open_session(model).inputs)
    data = limited(data, 40)
    with np.load(root / "models" / "data" / "digits_resnet.eval.npz") as file:
        return model, data, dict(file)


@pytest.fixture(scope="module")
def gru(root: Path) -> tuple[Model, Dataset]:
    model = io.load(root / "models" / "digits_gru.onnx")
    Pipeline.parse(LOSSLESS).run(model, Context())
    data = open_data(root / "models" / "data" / "digits_gru.calib.npz", open_session(model).inputs)
    return model, limited(data, 64)


def accuracy(model: Model, evaluation: dict[str, Array]) -> float:
    session = open_session(model)
    name = session.inputs[0].name
    scores = session.run({name: evaluation[name][:400]})[0]
    return float(np.mean(scores.argmax(axis=1) == evaluation["labels"][:400]))


def run(model: Model, one: str | Pass, data: Dataset | None = None, **given: Any) -> tuple[Model, PassRecord]:
    copy = model.copy()
    (record,) = Pipeline.parse([one]).run(copy, Context(data=data, **given))
    return copy, record


@pytest.fixture(scope="module")
def narrowed(resnet: tuple[Model, Dataset, dict[str, Array]]) -> tuple[Model, PassRecord]:
    model, data, _ = resnet
    return run(model, "prune-channels:macs=0.6", data)


def test_a_share_of_multiplications_is_kept_with_little_loss(
    resnet: tuple[Model, Dataset, dict[str, Array]], narrowed: tuple[Model, PassRecord]
) -> None:
    model, _, evaluation = resnet
    pruned, record = narrowed
    assert count_macs(pruned).total <= 0.6 * count_macs(model).total
    assert record.details["macs"] == pytest.approx(count_macs(pruned).total / count_macs(model).total, abs=0.01)
    assert record.details["zero_slice_error"] < 1e-5
    assert accuracy(pruned, evaluation) > accuracy(model, evaluation) - 0.03


def test_the_file_holds_only_the_narrower_weights(
    resnet: tuple[Model, Dataset, dict[str, Array]], narrowed: tuple[Model, PassRecord]
) -> None:
    pruned, record = narrowed
    assert record.details["params"] < 0.95
    assert len(pruned.to_bytes()) < (record.details["params"] + 0.02) * len(resnet[0].to_bytes())


def test_repair_brings_the_outputs_back(narrowed: tuple[Model, PassRecord]) -> None:
    _, record = narrowed
    before, after = record.details["before_repair"], record.details["after_repair"]
    assert after["sqnr_db"] > before["sqnr_db"] + 6


def test_the_same_run_gives_the_same_weights(gru: tuple[Model, Dataset]) -> None:
    model, data = gru
    spec = "prune-channels:macs=0.7"
    assert run(model, spec, data)[0].to_bytes() == run(model, spec, data)[0].to_bytes()


def test_widths_lie_on_the_grid(resnet: tuple[Model, Dataset, dict[str, Array]]) -> None:
    model, _, _ = resnet
    _, record = run(model, "prune-channels:macs=0.6")
    assert any(entry["kept"] < entry["width"] for entry in record.details["plan"])
    assert all(entry["kept"] == entry["width"] or entry["kept"] % 8 == 0 for entry in record.details["plan"])


def test_a_dry_run_gives_the_plan_and_changes_nothing(resnet: tuple[Model, Dataset, dict[str, Array]]) -> None:
    model, _, _ = resnet
    untouched, record = run(model, "prune-channels:macs=0.6:dry-run=true")
    assert untouched.to_bytes() == model.to_bytes()
    assert record.rewrites == 0
    assert sum(entry["macs_saved"] for entry in record.details["plan"]) > 0
    assert {r.reason for r in record.refused} >= {"a model input", "a model output"}


def test_without_data_a_ratio_prunes_by_weights(resnet: tuple[Model, Dataset, dict[str, Array]]) -> None:
    model, _, _ = resnet
    pruned, record = run(model, "prune-channels:ratio=0.5")
    assert record.details["params"] < 0.5
    assert {entry["importance"] for entry in record.details["plan"]} == {"l2"}
    onnx.checker.check_model(pruned.to_bytes())


def test_the_budget_for_parameters_counts_parameters(resnet: tuple[Model, Dataset, dict[str, Array]]) -> None:
    model, _, _ = resnet
    _, record = run(model, "prune-channels:params=0.5")
    assert 0.3 < record.details["params"] <= 0.5


def test_the_drop_bounds_what_goes(gru: tuple[Model, Dataset]) -> None:
    model, data = gru
    strict, loose = (run(model, f"prune-channels:drop={drop}", data)[1] for drop in (0.0, 0.5))
    assert strict.rewrites == 0 or strict.details["after_repair"]["drop"] == 0.0
    assert loose.details["macs"] < strict.details["macs"]


def test_a_latency_is_planned_in_measured_time(gru: tuple[Model, Dataset]) -> None:
    model, data = gru
    _, record = run(model, "prune-channels:latency=0.8:dry-run=true", data)
    assert record.details["predicted_time"] <= 0.8


@pytest.mark.parametrize("method", ["l1", "l2", "energy", "obs"])
def test_every_importance_makes_a_plan(resnet: tuple[Model, Dataset, dict[str, Array]], method: str) -> None:
    model, data, _ = resnet
    spec = f"prune-channels:macs=0.7:dry-run=true:sensitivity=false:importance={method}"
    _, record = run(model, spec, limited(data, 8))
    assert record.details["macs"] <= 0.7
    assert {entry["importance"] for entry in record.details["plan"]} == {method}


def test_the_prune_map_says_what_was_kept(resnet: tuple[Model, Dataset, dict[str, Array]]) -> None:
    model, _, _ = resnet
    pruned, record = run(model, "prune-channels:macs=0.7")
    old = {t.name: t.values for t in model.graph.initializers}
    new = {t.name: t.values for t in pruned.graph.initializers}
    kept: dict[str, dict[int, list[int]]] = {}
    for entry in record.details["prune_map"]:
        kept.setdefault(entry["tensor"], {})[entry["axis"]] = entry["kept"]
    assert kept
    for name, axes in kept.items():
        expected = old[name]
        for axis, indices in axes.items():
            expected = np.take(expected, indices, axis=axis)
        np.testing.assert_array_equal(new[name], expected)


def test_without_data_and_budget_it_says_what_to_give(resnet: tuple[Model, Dataset, dict[str, Array]]) -> None:
    with pytest.raises(UsageError, match="macs"):
        run(resnet[0], "prune-channels")


def test_two_budgets_are_refused() -> None:
    with pytest.raises(UsageError, match="ratio and macs"):
        PruneChannels(ratio=0.5, macs=0.5)


def test_normalized_groups_are_left_alone_unless_asked_for() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> net (float[batch, 4] x) => (float[batch, 2] y) {
        a = MatMul (x, w1)
        b = LayerNormalization (a, scale)
        y = MatMul (b, w2)
    }"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (4, 32)), ("scale", (32,)), ("w2", (32, 2))):
        proto.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    model = from_proto(proto)
    _, left = run(model, "prune-channels:ratio=0.5")
    assert left.rewrites == 0
    assert any("normalized=true" in r.reason for r in left.refused)
    _, taken = run(model, "prune-channels:ratio=0.5:normalized=true")
    assert taken.details["params"] == pytest.approx(0.5)


def test_levels_are_multiples_of_the_grid() -> None:
    convolved = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        net (float[batch, 3, 8, 8] x) => (float[batch, 2, 6, 6] y)
        { a = Conv (x, w1) y = Conv (a, w2) }""")
    for name, shape in (("w1", (16, 3, 1, 1)), ("w2", (2, 16, 3, 3))):
        convolved.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    (group,) = couple(plain_form(from_proto(convolved))).groups
    assert [16 - n for n in levels(group, 8, 8)] == [16, 8]
    assert [16 - n for n in levels(group, 4, 8)] == [16, 12, 8]


def test_matrix_products_take_any_width() -> None:
    group = Group("w", tuple(range(20)), {(Constant("w", np.zeros((20, 3))), 0): 1}, False)
    assert [20 - n for n in levels(group, 8, 8)] == list(range(20, 7, -1))


# --- the plan on the command line ---------------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_and_writes_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = MODELS / "digits_gru.onnx", MODELS / "data" / "digits_gru.calib.npz"
    passes = "cleanup,fuse,prune-channels:macs=0.8:sensitivity=false,quantize"
    options = ["--calib", str(data), "--samples", "32", "--passes", passes, "-o", str(tmp_path / "o.onnx")]

    code = main(["optimize", str(model), *options, "--dry-run", "--json", str(tmp_path / "plan.json"), "-q"])

    printed = capsys.readouterr().out
    assert code == 0
    assert not (tmp_path / "o.onnx").exists()
    assert all(word in printed for word in ("group", "kept", "predicted error", "left alone", "a model input"))
    assert "quantize has no plan to show and did not run" in printed
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["optimized"]["path"] is None
    assert sum(row["width"] - row["kept"] for row in found["passes"][-1]["details"]["plan"]) > 0
