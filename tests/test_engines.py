from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxcomp.engines import engine

SHAPES = {"x": [(1, 4)]}


def save(path, weight, *, external=False):
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 17]> g (float[N, 4] x) => (float[N, 4] y) { y = Add (x, w) }'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full(4, weight, np.float32), "w"))
    onnx.save(proto, path, save_as_external_data=external, location=f"{path.stem}.data", size_threshold=0)
    return path


def make(path, root, shapes=SHAPES, version="1.31"):
    return engine(path, shapes, version=version, root=root)


def test_the_same_model_finds_its_engine_again_under_any_name(tmp_path):
    first = make(save(tmp_path / "a.onnx", 1.0), tmp_path)
    second = make(save(tmp_path / "b.onnx", 1.0), tmp_path)

    assert first == second
    assert first.folder.is_dir()
    assert first.options["trt_engine_cache_path"] == str(first.folder)
    assert first.options["trt_engine_cache_prefix"] in first.folder.name


@pytest.mark.parametrize("external", [False, True])
def test_other_weights_under_the_same_name_never_run_the_old_engine(tmp_path, external):
    first = make(save(tmp_path / "a.onnx", 1.0, external=external), tmp_path)
    (tmp_path / "a.data").unlink(missing_ok=True)
    second = make(save(tmp_path / "a.onnx", -1.0, external=external), tmp_path)

    assert first.folder != second.folder
    assert first.options["trt_engine_cache_prefix"] != second.options["trt_engine_cache_prefix"]


@pytest.mark.parametrize("other", [{"shapes": {"x": [(8, 4)]}}, {"version": "1.32"}])
def test_other_shapes_and_versions_have_engines_of_their_own(tmp_path, other):
    model = save(tmp_path / "a.onnx", 1.0)

    assert make(model, tmp_path).folder != make(model, tmp_path, **other).folder


def test_what_a_build_took_is_remembered(tmp_path):
    made = make(save(tmp_path / "a.onnx", 1.0), tmp_path)
    before = made.build_ms
    made.record(1234.5)

    assert before is None
    assert make(tmp_path / "a.onnx", tmp_path).build_ms == 1234.5


def test_a_damaged_record_means_that_the_engine_is_built_again(tmp_path):
    made = make(save(tmp_path / "a.onnx", 1.0), tmp_path)
    (made.folder / "build.json").write_text("{")

    assert made.build_ms is None
