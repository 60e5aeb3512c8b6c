"""Layer by layer: the layer that makes an error is told from those that it passes through."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxcomp import io
from onnxcomp.calibration.data import Dataset, open_data
from onnxcomp.cli import main
from onnxcomp.extract import extract
from onnxcomp.graph import Model
from onnxcomp.layerwise import Layer, compare_layers
from onnxcomp.manager import Context, Pipeline
from onnxcomp.runtime import open_session

MODELS = Path(__file__).parent.parent / "models"
QUICK = "quantize:ranges=minmax:rounding=nearest:bias-correction=false:islands=false"


def loaded(name: str) -> tuple[Model, Dataset]:
    model = io.load(MODELS / f"{name}.onnx")
    return model, open_data(str(MODELS / "data" / f"{name}.calib.npz"), open_session(model).inputs)


def optimized(name: str, passes: str) -> tuple[Model, Model, Dataset]:
    model, data = loaded(name)
    candidate = model.copy()
    Pipeline.parse(passes).run(candidate, Context(data=data, max_drop=0.05))
    return model, candidate, data


def by_node(layers: tuple[Layer, ...]) -> dict[str, Layer]:
    return {layer.node: layer for layer in layers}


def test_the_layer_that_is_wrong_comes_first_and_what_follows_has_no_local_error() -> None:
    model, data = loaded("digits_denoiser")
    wrong = model.copy()
    node = next(n for n in wrong.graph.nodes if n.label == "/bottom/Conv")
    node.inputs[1].values = node.inputs[1].values * np.float32(1.2)

    layers = compare_layers(model, wrong, data, samples=8)

    assert layers[0].node == "/bottom/Conv"
    assert layers[0].local.noise_ratio == pytest.approx(layers[0].total.noise_ratio)
    later = by_node(layers)["/up/ConvTranspose"]
    assert later.local.noise_ratio == 0
    assert later.total.noise_ratio > 1e-4
    assert later.amplification is None


def test_memory_only_changes_how_often_the_models_run() -> None:
    model, candidate, data = optimized("digits_denoiser", f"fuse,{QUICK}")

    whole = compare_layers(model, candidate, data, samples=4)
    pieces = compare_layers(model, candidate, data, samples=4, memory=1 << 16)

    assert [layer.to_json() for layer in whole] == [layer.to_json() for layer in pieces]


def test_quantized_layers_are_matched_with_float_ones() -> None:
    model, candidate, data = optimized("digits_denoiser", f"fuse,{QUICK}")

    layers = by_node(compare_layers(model, candidate, data, samples=8))

    rounded = [layer for layer in layers.values() if layer.relation == "quantized"]
    assert sum(20 < layer.local.sqnr_db < 70 for layer in rounded) >= 7
    assert all(layer.local.sqnr_db > 20 for layer in rounded)
    assert layers["/leave/Conv"].total.noise_ratio >= layers["/leave/Conv"].local.noise_ratio / 2


def test_equalized_channels_are_compared_in_their_scale() -> None:
    model, candidate, data = optimized("digits_resnet", "cleanup,fuse,equalize")

    layers = compare_layers(model, candidate, data, samples=4)

    assert sum(layer.relation == "scaled" for layer in layers) >= 10
    assert all(layer.total.sqnr_db > 100 for layer in layers)


def test_pruned_layers_are_compared_with_the_channels_that_stay() -> None:
    options = "prune-channels:ratio=0.25:repair=false:sensitivity=false:importance=l2"
    model, candidate, data = optimized("digits_denoiser", options)

    layers = compare_layers(model, candidate, data, samples=4)

    sliced = [layer for layer in layers if layer.relation == "sliced"]
    assert len(sliced) >= 6
    first = by_node(layers)["/down/Conv"]
    assert first.relation == "sliced"
    assert first.local.noise_ratio == first.total.noise_ratio < 1e-10  # nothing in front of it was removed
    assert math.isfinite(by_node(layers)["/leave/Conv"].total.noise_ratio)


def test_the_command_line_prints_the_table_and_writes_it_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, candidate, _ = optimized("cancer_mlp", QUICK)
    io.save(candidate, tmp_path / "small.onnx")
    data = MODELS / "data" / "cancer_mlp.eval.npz"
    words: list[Any] = [
        "verify", MODELS / "cancer_mlp.onnx", tmp_path / "small.onnx", "--data", data, "--layers", "-q",
        "--max-drop", "5%", "--json", tmp_path / "found.json",
    ]  # fmt: skip

    assert main([str(w) for w in words]) == 0

    printed = capsys.readouterr().out
    assert "local SQNR dB" in printed
    layers = json.loads((tmp_path / "found.json").read_text())["layers"]
    assert {layer["op"] for layer in layers} >= {"Gemm"}
    noise = [layer["local_noise"] for layer in layers]
    assert noise == sorted(noise, reverse=True)


def test_without_data_made_up_inputs_are_used(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(MODELS / "cancer_mlp.onnx")

    assert main(["verify", path, path, "--layers", "-q"]) == 0
    assert "Gemm" in capsys.readouterr().out


def test_a_part_of_a_model_computes_what_the_whole_does() -> None:
    model, data = loaded("digits_denoiser")
    x = next(iter(data.batches(2))).feeds["noisy"]
    names = ["/Concat_output_0", "/up/ConvTranspose_output_0"]
    whole = model.copy()
    whole.graph.outputs = [t for n in whole.graph.nodes for t in n.outputs if t.name in names]
    entering, expected = open_session(whole).run({"noisy": x})

    part, outputs = extract(model, {names[0]: (entering.dtype, entering.shape)}, names[1:])

    assert [t.name for t in part.graph.inputs] == names[:1]
    assert len(part.graph.nodes) == 3
    found = open_session(part).run({names[0]: entering}, outputs)[0]
    assert np.allclose(found, expected, atol=1e-5)
