from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

import onnxcomp
from onnxcomp import bench_grid
from onnxcomp.bench_grid import Setting, compare, settings
from onnxcomp.errors import ProviderError, UsageError

CPU = "CPUExecutionProvider"
SCHEMA = Path(bench_grid.__file__).with_name("bench.schema.json")


@pytest.fixture(scope="module")
def validator():
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_settings_are_every_combination_in_the_order_given():
    found = settings("cpu", "2,1", [1, 4], "1,8")

    assert found[0] == Setting(CPU, 2, 1, 1)
    assert [(s.threads, s.streams, s.batch) for s in found] == [
        (t, s, b) for t in (2, 1) for s in (1, 4) for b in (1, 8)
    ]


def test_without_a_batch_there_is_one_setting_that_leaves_it_to_the_model():
    assert settings("cpu", 1, 1, None) == [Setting(CPU, 1, 1, None)]


@pytest.mark.parametrize(
    "given",
    [("cpu,cpu", 1, 1, None), ("cpu", "1,1", 1, None), ("cpu", -1, 1, None), ("cpu", 1, 0, None), ("cpu", 1, 1, 0.5)],
)
def test_a_setting_twice_or_without_sense_is_a_usage_error(given):
    with pytest.raises(UsageError):
        settings(*given)


def test_a_provider_among_several_that_is_not_installed_is_known_at_once():
    with pytest.raises(ProviderError, match="MIGraphX"):
        settings("cpu,migraphx", 1, 1, None)


def test_providers_that_may_fail_go_first_and_results_keep_the_order(monkeypatch):
    ran, progress = [], []

    def pretend(models, *, provider, progress, **options):
        ran.append(provider)
        progress(0.5, "timing")
        return provider

    monkeypatch.setattr(bench_grid, "benchmark", pretend)
    grid = [Setting(CPU, 1, 1, None), Setting("CUDAExecutionProvider", 1, 1, None)]
    found = compare(
        ["m.onnx"], grid, {None: []}, seconds=1.0, precision=0.01, seed=0, allow_fallback=False,
        progress=lambda *step: progress.append(step),
    )  # fmt: skip

    assert ran == ["CUDAExecutionProvider", CPU]
    assert list(found.results) == [CPU, "CUDAExecutionProvider"]
    assert progress == [(0.25, "setting 1 of 2: timing"), (0.75, "setting 2 of 2: timing")]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    import onnx

    folder = tmp_path_factory.mktemp("grid")
    text = '<ir_version: 10, opset_import: ["" : 17]> g (float[N, 64] x) => (float[N, 64] y) { y = Softmax (x) }'
    for name in ("a.onnx", "b.onnx"):
        onnx.save(onnx.parser.parse_model(text), folder / name)
    return onnxcomp.benchmark(
        folder / "a.onnx", folder / "b.onnx", batch="1,16", threads=1, streams=2, seconds=0.2, precision="20%"
    )


def test_the_json_of_a_grid_follows_the_published_schema(validator, compared):
    found = json.loads(json.dumps(compared.to_json(), allow_nan=False))

    validator.validate(found)
    assert len(found["models"]) == 2 * len(found["settings"]) == 4
    assert [(m["streams"], m["batch"]) for m in found["models"][::2]] == [(2, 1), (2, 16)]
    assert found["settings"][1]["shapes"] == {"x": [16, 64]}
    assert [m["verdict"] for m in found["models"][::2]] == ["baseline"] * 2


@pytest.mark.parametrize("key", ["schema_version", "models", "settings", "environment"])
def test_json_without_a_promised_key_is_invalid(validator, compared, key):
    broken = compared.to_json()
    del broken[key]

    assert not validator.is_valid(broken)


@pytest.mark.parametrize("key", ["provider", "threads", "streams", "batch", "ms", "speedup", "verdict", "execution"])
def test_a_row_without_a_promised_key_is_invalid(validator, compared, key):
    broken = compared.to_json()
    del broken["models"][0][key]

    assert not validator.is_valid(broken)
