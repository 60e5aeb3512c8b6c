"""The published JSON Schema fits what `optimize` gives, and would notice if it did not."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest

import onnxcomp

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads((ROOT / "onnxcomp" / "report.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A real report with everything in it, as it comes out of a JSON file."""
    folder = tmp_path_factory.mktemp("report")
    onnxcomp.optimize(
        MODELS / "digits_mlp.onnx",
        folder / "out.onnx",
        calib=MODELS / "data" / "digits_mlp.calib.npz",
        eval=MODELS / "data" / "digits_mlp.eval.npz",
        json=folder / "report.json",
        bench_seconds=0.2,
        goal="size",
    )
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_a_full_report_is_valid(validator, report):
    validator.validate(report)
    assert report["benchmark"]["speedup"] > 0
    assert report["verification"]["metrics"]


def test_a_report_without_data_verification_and_benchmark_is_valid(validator, workshop):
    made = onnxcomp.optimize("model.onnx", "out.onnx", verify=False, bench_seconds=0)

    validator.validate(json.loads(json.dumps(made.to_json())))


def test_a_report_of_a_model_in_memory_is_valid(validator, workshop):
    made = onnxcomp.optimize(onnx.load("model.onnx"), "out.onnx", bench_seconds=0)

    validator.validate(json.loads(json.dumps(made.to_json())))
    assert made.to_json()["original"]["path"] is None


def test_numbers_that_json_lacks_become_null(validator, workshop):
    made = onnxcomp.optimize("model.onnx", "out.onnx", bench_seconds=0)
    first = replace(made.passes[0], drop=math.inf, details={"sqnr": np.float32(np.nan), "nodes": np.int64(3)})

    odd = replace(made, passes=(first,))

    odd.save_json("odd.json")
    found = json.loads((workshop / "odd.json").read_text())
    validator.validate(found)
    assert found["passes"][0]["drop"] is None
    assert found["passes"][0]["details"] == {"sqnr": None, "nodes": 3}


@pytest.mark.parametrize(
    "path",
    [
        ("schema_version",),
        ("original", "sha256"),
        ("optimized", "file_bytes"),
        ("optimized", "nonzero_parameters"),
        ("passes", 0, "refused"),
        ("passes", 0, "drop"),
        ("verification", "verdict"),
        ("verification", "ci"),
        ("benchmark", "speedup"),
        ("benchmark", "int8_kernels"),
        ("environment",),
    ],
)
def test_a_report_that_lacks_a_promised_key_is_invalid(validator, report, path):
    broken = copy.deepcopy(report)
    *parents, key = path
    place = broken
    for parent in parents:
        place = place[parent]
    del place[key]

    assert not validator.is_valid(broken)


def test_an_unknown_verdict_is_invalid_and_a_new_key_is_not(validator, report):
    newer, wrong = copy.deepcopy(report), copy.deepcopy(report)
    newer["verification"]["seconds"] = 1.0
    wrong["verification"]["verdict"] = "fine"

    assert validator.is_valid(newer)
    assert not validator.is_valid(wrong)
