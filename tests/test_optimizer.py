"""The whole job through the Python interface: what is kept, what is taken back, what is written."""

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

import onnxcomp
from onnxcomp import io
from onnxcomp.errors import DataError, ModelError, ProviderError, UsageError, VerificationError
from onnxcomp.graph import Model
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.options import Options

MODELS = Path(__file__).parent.parent / "models"
RESNET = MODELS / "digits_resnet.onnx"
DATA = MODELS / "data"
FAST: dict[str, Any] = {"bench_seconds": 0.0}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> onnxcomp.Report:
    out = tmp_path_factory.mktemp("out") / "small.onnx"
    return onnxcomp.optimize(
        RESNET,
        out,
        calib=DATA / "digits_resnet.calib.npz",
        eval=DATA / "digits_resnet.eval.npz",
        bench_seconds=1.0,
    )


def test_the_residual_cnn_becomes_small_and_keeps_its_accuracy(report: onnxcomp.Report) -> None:
    assert report.optimized["file_bytes"] <= 0.30 * report.original["file_bytes"]
    assert report.verification is not None
    assert report.verification.verdict == "within budget"
    assert report.verification.quality is not None
    assert report.verification.quality.drop <= 0.005


def test_only_the_first_convolution_may_be_left_among_the_float_kernels_that_ran(report: onnxcomp.Report) -> None:
    assert report.benchmark is not None
    kernels = {k.op: k.count for k in report.benchmark.models[1].kernels}
    assert kernels["QLinearConv"] in (14, 15)
    assert kernels.get("Conv", 0) + kernels.get("FusedConv", 0) == 15 - kernels["QLinearConv"]


def test_the_report_describes_the_file_that_was_written(report: onnxcomp.Report) -> None:
    assert report.path.stat().st_size == report.optimized["file_bytes"]
    assert io.sha256(report.path) == report.optimized["sha256"]
    assert "quantize" in [p["name"] for p in json.loads(json.dumps(report.to_json()))["passes"]]


def test_metadata_and_interface_of_the_original_survive(report: onnxcomp.Report) -> None:
    before, after = onnx.load(RESNET), onnx.load(report.path)

    assert [i.SerializeToString() for i in before.graph.input] == [i.SerializeToString() for i in after.graph.input]
    assert [o.SerializeToString() for o in before.graph.output] == [o.SerializeToString() for o in after.graph.output]
    assert before.producer_name == after.producer_name


def test_without_data_only_lossless_passes_run_and_the_missing_flag_is_named(tmp_path: Path) -> None:
    report = onnxcomp.optimize(RESNET, tmp_path / "o.onnx", **FAST)

    assert {p.effect for p in report.passes} == {"exact", "float"}
    assert report.verification is not None
    assert report.verification.verdict == "unverified on real data"
    assert any("--calib" in note for note in report.notes)


def test_a_model_in_memory_needs_an_output_path(tmp_path: Path) -> None:
    proto = onnx.load(MODELS / "cancer_mlp.onnx")

    with pytest.raises(UsageError, match="output path"):
        onnxcomp.optimize(proto, **FAST)
    report = onnxcomp.optimize(proto, tmp_path / "o.onnx", **FAST)
    assert report.path.exists()


def test_a_tiny_model_never_becomes_larger(tmp_path: Path) -> None:
    report = onnxcomp.optimize(
        MODELS / "cancer_mlp.onnx", tmp_path / "o.onnx", calib=DATA / "cancer_mlp.calib.npz", bench_seconds=0.5
    )

    assert report.optimized["file_bytes"] <= report.original["file_bytes"]


def test_an_unreachable_size_target_is_reported_and_the_model_is_written(tmp_path: Path) -> None:
    report = onnxcomp.optimize(MODELS / "cancer_mlp.onnx", tmp_path / "o.onnx", size="50x", **FAST)

    assert report.exit_code == 5
    assert report.path.exists()
    assert "50x was asked for" in report.unmet[0]


def test_a_budget_of_zero_keeps_the_float_model_with_a_reason(tmp_path: Path) -> None:
    report = onnxcomp.optimize(
        MODELS / "digits_denoiser.onnx",
        tmp_path / "o.onnx",
        calib=DATA / "digits_denoiser.calib.npz",
        max_drop=0.0,
        **FAST,
    )

    quantize = [p for p in report.passes if p.name == "quantize"]
    assert all(p.reverted or not p.rewrites for p in quantize)
    assert report.verification is not None
    assert report.verification.verdict == "equivalent"


def test_the_input_is_never_the_output() -> None:
    with pytest.raises(UsageError, match="never modified"):
        onnxcomp.optimize(RESNET, RESNET, force=True, **FAST)


def test_an_existing_output_is_kept_without_force(tmp_path: Path) -> None:
    out = tmp_path / "o.onnx"
    out.write_bytes(b"precious")

    with pytest.raises(UsageError, match="--force"):
        onnxcomp.optimize(RESNET, out, **FAST)
    assert out.read_bytes() == b"precious"


class _Breaks(Pass):
    """A pass that claims to be lossless and doubles a bias."""

    name: ClassVar[str] = "breaks"
    effect: ClassVar[Effect] = "float"

    def run(self, model: Model, ctx: Context) -> None:
        bias = model.graph.initializers[-1]
        if ctx.allow("bias"):
            bias.values = bias.values * 2 + 1


class _Ruins(Pass):
    """A lossy pass after which every sample is of one class."""

    name: ClassVar[str] = "ruins"
    effect: ClassVar[Effect] = "lossy"

    def run(self, model: Model, ctx: Context) -> None:
        bias = model.graph.nodes[-1].inputs[2]
        if ctx.allow("bias"):
            bias.values = np.array([1000, 0], np.float32)


@pytest.mark.parametrize("bad", [_Breaks(), _Ruins()])
def test_a_pass_that_changes_results_is_taken_back_alone(bad: Pass, tmp_path: Path) -> None:
    report = onnxcomp.optimize(
        MODELS / "cancer_mlp.onnx", tmp_path / "o.onnx", passes=["cleanup", bad, "fuse"],
        calib=DATA / "cancer_mlp.calib.npz", **FAST,
    )  # fmt: skip

    reverted = {p.name: p.reverted for p in report.passes if p.reverted}
    assert list(reverted) == [bad.name]
    assert report.verification is not None
    assert report.verification.passed


def test_a_result_that_cannot_be_verified_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcomp.job.Job._checked", lambda self, step, done: (done, None))
    monkeypatch.setattr("onnxcomp.job.Job._lossless_is_fine", lambda self: True)

    with pytest.raises(VerificationError, match="no model was written"):
        onnxcomp.optimize(MODELS / "cancer_mlp.onnx", tmp_path / "o.onnx", passes=[_Breaks()], **FAST)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"passes": "quantize"}, UsageError, "--calib"),
        ({"passes": "quantise"}, UsageError, "did you mean 'quantize'"),
        ({"target": "tpu"}, UsageError, "it can be cpu, cuda, tensorrt"),
        ({"target": "cuda"}, ProviderError, "onnxruntime-gpu"),
        ({"max_drop": "lots"}, UsageError, "a share such as 1%"),
        ({"calib": "nowhere.npz"}, DataError, "nowhere.npz"),
        ({"sample": 3}, UsageError, "did you mean 'samples'"),
    ],
)
def test_bad_options_are_named_before_any_work(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        onnxcomp.optimize(RESNET, tmp_path / "o.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing\.onnx"):
        onnxcomp.optimize(tmp_path / "nothing.onnx", tmp_path / "o.onnx", **FAST)


def test_a_recipe_gives_the_options_and_arguments_win(tmp_path: Path) -> None:
    (tmp_path / "samples.npz").write_bytes((DATA / "cancer_mlp.calib.npz").read_bytes())
    recipe = tmp_path / "recipe.toml"
    passes = 'passes = ["cleanup", {name = "fold-constants"}]'
    recipe.write_text(f'calib = "samples.npz"\nmax-drop = "5%"\nseed = 7\n{passes}\n')

    options = Options.make(recipe, seed=8)

    assert options.calib == str(tmp_path / "samples.npz")
    assert (options.max_drop, options.seed) == (0.05, 8)
    report = onnxcomp.optimize(MODELS / "cancer_mlp.onnx", tmp_path / "o.onnx", recipe=recipe, **FAST)
    assert [p.name for p in report.passes] == ["cleanup", "fold-constants"]
