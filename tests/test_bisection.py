"""`bisect`: what it says where nothing is guilty, which rewrites it names, and a reproducer that reproduces."""

from __future__ import annotations

import json
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

import onnxcomp
from onnxcomp.cli import main
from onnxcomp.errors import UsageError
from onnxcomp.graph import Model
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.registry import BUILTIN
from tests.faults import MODELS, Faulty, Rebuild, base, samples

DENOISER = MODELS / "digits_denoiser.onnx"
EVAL = MODELS / "data" / "digits_denoiser.eval.npz"


def test_a_pipeline_without_faults_is_cleared_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["bisect", str(DENOISER), "--passes", "cleanup,fuse", "--eval", str(EVAL), "--samples", "4", "-q"])

    assert code == 0
    assert capsys.readouterr().out.startswith("no rewrite is guilty: all 2 passes keep what they promise on ")


@pytest.fixture
def loses_bias(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(BUILTIN, "loses-bias", "tests.faults:LosesBias")
    return "cleanup,loses-bias:at=/middle/Conv"


def test_a_guilty_rewrite_ends_the_command_with_4_and_is_in_the_json(
    loses_bias: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--passes", loses_bias, "--eval", str(EVAL), "--samples", "4", "-q"]

    code = main(["bisect", str(DENOISER), *options, "--json", str(tmp_path / "found.json")])

    found = json.loads((tmp_path / "found.json").read_text())
    printed = capsys.readouterr()
    assert code == 4
    assert (found["guilty"], found["position"], found["pass"]) == (True, 2, "loses-bias:at=/middle/Conv")
    assert [c["rewrite"] for c in found["culprits"]] == ["rebuild /middle/Conv"]
    assert found["culprits"][0]["error_after"] > found["culprits"][0]["error_before"] == 0
    assert "rebuild" in printed.out
    assert "guilty is rewrite 5 (rebuild /middle/Conv) of 7" in printed.err


@dataclass(frozen=True)
class Shaken(Pass):
    """Copies the weights, those numbered in `broken` with an error."""

    name: ClassVar[str] = "shaken"
    effect: ClassVar[Effect] = "float"

    broken: tuple[int, ...] = ()
    always: bool = False

    def run(self, model: Model, ctx: Context) -> None:
        for number, constant in enumerate(model.graph.initializers):
            if ctx.allow(f"copy {number}") and number in self.broken:
                constant.values = np.array(constant.values) * 1.5
        if self.always:
            model.graph.nodes[0].inputs[1].values = model.graph.nodes[0].inputs[1].values * 2


def searched(one: Pass, **options: Any) -> onnxcomp.bisection.Bisection:
    given = {"eval": samples("digits_denoiser"), "samples": 4} | options
    return onnxcomp.bisect(base("digits_denoiser"), passes=["cleanup", one], **given)


def test_all_guilty_rewrites_are_named_where_there_are_several() -> None:
    found = searched(Shaken((2, 9)))

    assert [c.text for c in found.culprits] == ["copy 2", "copy 9"]
    assert [c.number for c in found.culprits] == [3, 10]
    assert all(c.before < c.after for c in found.culprits)
    assert found.exact


def test_a_pass_that_changes_results_outside_its_rewrites_is_named() -> None:
    found = searched(Shaken(always=True))

    assert found.culprits[0].number == 0
    assert "outside of its" in found.sentence


def test_without_time_the_pass_is_still_found() -> None:
    found = searched(Shaken((2,)), seconds=1e-6)

    assert (found.position, found.exact) == (2, False)
    assert "no time" in found.sentence


def test_without_data_inputs_are_made_up() -> None:
    found = onnxcomp.bisect(base("digits_denoiser"), passes=[Shaken((4,))])

    assert [c.text for c in found.culprits] == ["copy 4"]
    assert "made from the graph" in found.data


@pytest.mark.parametrize("options", [{"seconds": 0}, {"samples": 0}, {"tolerance": -1.0}, {"passes": "fusion"}])
def test_options_that_make_no_sense_are_usage_errors(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        onnxcomp.bisect(DENOISER, **options)


def test_an_existing_folder_is_not_written_to_without_force(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--force"):
        onnxcomp.bisect(DENOISER, tmp_path)


def test_the_reproducer_is_a_small_part_with_random_weights_that_its_script_reproduces(
    loses_bias: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "repro"

    found = onnxcomp.bisect(DENOISER, folder, passes=loses_bias, eval=EVAL, samples=4)

    made = found.reproducer
    assert made is not None
    assert made.weights == "random, seed 0"
    assert made.nodes <= 3 < made.of_nodes
    assert (folder / "model.onnx").stat().st_size < DENOISER.stat().st_size / 2
    facts = json.loads((folder / "reproducer.json").read_text())
    assert (facts["pass"], facts["rewrites"]) == ("loses-bias:at=/middle/Conv", ["rebuild /middle/Conv"])
    assert facts["environment"]
    runpy.run_path(str(folder / "run.py"))
    assert "pass 1/1 loses-bias:at=/middle/Conv: guilty is rewrite 1" in capsys.readouterr().out


def test_the_reproducer_keeps_the_inputs_of_the_part(tmp_path: Path) -> None:
    folder = tmp_path / "repro"
    conv = "/middle/Conv"

    def spoil(model: Model) -> None:
        node = next(n for n in model.graph.nodes if n.label == conv)
        node.inputs = node.inputs[:2]

    found = searched(Faulty(Rebuild(), f"rebuild {conv}", spoil), output=folder)

    assert found.reproducer is not None
    assert found.reproducer.nodes < found.reproducer.of_nodes
    part = onnx.load(folder / "model.onnx")
    with np.load(folder / "inputs.npz") as data:
        assert sorted(data.files) == sorted(v.name for v in part.graph.input)
    assert conv in {n.name for n in part.graph.node}
