"""The committed models and their data are what models/manifest.toml says they are."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from PIL import Image

from onnxcomp.runtime import open_session

FOLDER = Path(__file__).resolve().parents[1] / "models"
MANIFEST: list[dict[str, Any]] = tomllib.loads((FOLDER / "manifest.toml").read_text("utf-8"))["model"]
BY_NAME = {entry["name"]: entry for entry in MANIFEST}

# The structures for which each model is here: an exporter that folds or rewrites them would make it useless.
STRUCTURES = {
    "cancer_mlp": {"Gemm", "Relu"},
    "digits_denoiser": {"Concat", "ConvTranspose", "DepthToSpace", "LeakyRelu"},
    "digits_gru": {"GRU"},
    "digits_keras": {"Add", "Clip", "Conv", "Softmax"},
    "digits_mlp": {"ArgMax", "MatMul", "Scaler"},
    "digits_resnet": {"Add", "BatchNormalization", "Conv", "Gemm", "GlobalAveragePool"},
    "digits_transformer": {"LayerNormalization", "MatMul", "Softmax"},
}

each_model = pytest.mark.parametrize("entry", MANIFEST, ids=lambda entry: entry["name"])


def arrays(path: str) -> dict[str, npt.NDArray[Any]]:
    with np.load(FOLDER / path, allow_pickle=False) as data:
        return dict(data)


def feeds_and_labels(entry: dict[str, Any]) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[Any] | None]:
    feeds = arrays(entry["eval"])
    return feeds, feeds.pop("labels", None)


def rows(feeds: dict[str, npt.NDArray[Any]]) -> list[bytes]:
    return [b"".join(part.tobytes() for part in sample) for sample in zip(*feeds.values(), strict=True)]


@pytest.fixture
def common() -> Iterator[ModuleType]:
    pytest.importorskip("sklearn", reason="only the extra `train` has scikit-learn")
    spec = importlib.util.spec_from_file_location("models_common", FOLDER / "common.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_manifest_lists_every_model_file() -> None:
    files = {path.name for path in FOLDER.glob("*.onnx") if not path.name.endswith(".opt.onnx")}
    assert {entry["file"] for entry in MANIFEST} == files
    assert set(STRUCTURES) == set(BY_NAME)


@each_model
def test_file_has_the_checksum_and_size_of_the_manifest(entry: dict[str, Any]) -> None:
    content = (FOLDER / entry["file"]).read_bytes()
    assert len(content) == entry["bytes"]
    assert hashlib.sha256(content).hexdigest() == entry["sha256"]


@each_model
def test_model_is_valid_and_holds_the_structures_it_is_here_for(entry: dict[str, Any]) -> None:
    model = onnx.load(FOLDER / entry["file"])
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == entry["ir_version"] <= 10
    assert {node.op_type for node in model.graph.node} >= STRUCTURES[entry["name"]]
    assert sum(int(np.prod(weight.dims)) for weight in model.graph.initializer) == entry["parameters"]


@each_model
def test_model_takes_any_batch_size(entry: dict[str, Any]) -> None:
    session = open_session(FOLDER / entry["file"])
    feeds, _ = feeds_and_labels(entry)
    one, three = (session.run({k: v[:n] for k, v in feeds.items()}, [entry["scores"]])[0] for n in (1, 3))
    assert (len(one), len(three)) == (1, 3)
    np.testing.assert_allclose(one[0], three[0], rtol=1e-4, atol=1e-4)


@each_model
def test_model_reaches_the_quality_of_the_manifest_on_held_out_data(entry: dict[str, Any]) -> None:
    feeds, labels = feeds_and_labels(entry)
    (scores,) = open_session(FOLDER / entry["file"]).run(feeds, [entry["scores"]])
    assert len(scores) == entry["eval_samples"]
    if labels is not None:
        assert labels.dtype == np.int64
        assert 100.0 * np.mean(scores.argmax(axis=1) == labels) == pytest.approx(entry["accuracy"], abs=0.2)
    else:
        target = arrays(entry["target"])[entry["scores"]].astype(np.float64)
        peak = 255 / 64
        measured = 10 * np.log10(peak**2 / np.mean((scores - target) ** 2))
        assert measured == pytest.approx(entry["psnr"], abs=0.05)


@pytest.mark.parametrize("name", [name for name in BY_NAME if "accuracy" in BY_NAME[name]])
def test_classifier_is_above_95_percent(name: str) -> None:
    assert BY_NAME[name]["accuracy"] > 95.0


def test_denoiser_improves_on_its_input() -> None:
    feeds = arrays(BY_NAME["digits_denoiser"]["eval"])
    target = arrays(BY_NAME["digits_denoiser"]["target"])["clean"]
    noisy_psnr = 10 * np.log10((255 / 64) ** 2 / np.mean((feeds["noisy"].astype(np.float64) - target) ** 2))
    assert BY_NAME["digits_denoiser"]["psnr"] > noisy_psnr + 5.0


@each_model
def test_calibration_and_evaluation_are_disjoint_and_named_like_the_inputs(
    entry: dict[str, Any],
) -> None:
    calib = arrays(entry["calib"])
    evaluation, _ = feeds_and_labels(entry)
    inputs = {tensor.name for tensor in open_session(FOLDER / entry["file"]).inputs}
    assert calib.keys() == evaluation.keys() == inputs
    assert len(rows(calib)) == entry["calib_samples"]
    assert not set(rows(calib)) & set(rows(evaluation))


@each_model
def test_model_carries_no_notes_or_paths_of_the_machine_that_made_it(entry: dict[str, Any]) -> None:
    model = onnx.load(FOLDER / entry["file"])
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")  # random weight bytes can spell anything
    text = str(model)
    assert "doc_string" not in text
    assert "metadata_props" not in text
    assert not re.search(r"/(work|tmp|home|root|usr)/|site-packages|\.py\b", text)


def test_png_folder_and_its_specification_give_rows_of_the_resnet_evaluation_data() -> None:
    spec = tomllib.loads((FOLDER / "data" / "digits_png.toml").read_text(encoding="utf-8"))
    feeds, labels = feeds_and_labels(BY_NAME["digits_resnet"])
    assert labels is not None
    known = dict(zip(rows(feeds), labels.tolist(), strict=True))
    files = sorted((FOLDER / "data" / "digits_png").glob("*/*.png"))
    assert len(files) == 60
    for file in files:
        with Image.open(file) as image:
            assert [image.height, image.width] == spec["size"] == spec["crop"]
            pixels = np.asarray(image.convert("L"), dtype=np.float32)
        x = ((pixels * np.float32(spec["scale"]) - spec["mean"][0]) / spec["std"][0]).astype(np.float32)
        assert known[x.tobytes()] == int(file.parent.name)


@pytest.mark.parametrize(
    ("name", "size"), [("digits_resnet", 32), ("digits_transformer", 16), ("digits_gru", 16)]
)
def test_sample_data_are_the_parts_of_the_digits_that_training_does_not_see(
    common: ModuleType, name: str, size: int
) -> None:
    pixels, labels, split = common.load_digit_images(size)
    entry = BY_NAME[name]
    feeds, eval_labels = feeds_and_labels(entry)
    (evaluation,) = feeds.values()
    (calib,) = arrays(entry["calib"]).values()
    images = common.preprocess(pixels)
    np.testing.assert_array_equal(evaluation.reshape(-1, size, size), images[split.evaluation])
    np.testing.assert_array_equal(calib.reshape(-1, size, size), images[split.calib])
    np.testing.assert_array_equal(eval_labels, labels[split.evaluation])
    parts = np.concatenate([split.train, split.calib, split.evaluation])
    assert sorted(parts.tolist()) == list(range(len(labels)))


def test_everything_under_models_stays_small_enough_for_git() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 6_000_000


def test_readme_states_the_numbers_of_the_manifest() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for entry in MANIFEST:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{entry['file']}`"))
        quality = f"{entry['accuracy']:.2f} %" if "accuracy" in entry else f"{entry['psnr']:.2f} dB"
        assert quality in row
        assert f"{entry['parameters']:,}" in row
        assert f"{entry['bytes']:,}" in row
