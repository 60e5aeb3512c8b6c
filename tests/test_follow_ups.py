"""What is tried after the pipeline, and taken back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxcomp
from onnxcomp.bench_results import Benchmark
from onnxcomp.speed_gate import SpeedGate
from onnxcomp.timing import SAME, SLOWER


@pytest.fixture
def normalized(tmp_path: Path) -> Path:
    """A Conv and a batch normalization, which `fuse` makes one, and an Identity, which `cleanup` removes."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 3, 8, 8] x) => (float[1, 4, 6, 6] y) {
          c = Conv (x, w) i = Identity (c) y = BatchNormalization (i, s, b, m, v)
        }"""
    )
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((4, 3, 3, 3)), **{k: 1 + rng.random(4) for k in "sbmv"}}
    for name, value in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), name))
    onnx.save(proto, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def slow_where(monkeypatch: pytest.MonkeyPatch, slow: Callable[[set[str]], bool]) -> None:
    """Let the benchmark find models slow by their operators."""
    real = SpeedGate.time

    def time(self: SpeedGate, models: list[Any]) -> Benchmark:
        found = real(self, models)
        lame = slow({node.op for node in models[-1].graph.nodes})
        last = replace(found.models[-1], speedup=0.5 if lame else 1.0, verdict=SLOWER if lame else SAME)
        return replace(found, models=(*found.models[:-1], last))

    monkeypatch.setattr(SpeedGate, "time", time)


def optimized(model: Path) -> tuple[list[str], onnxcomp.Report]:
    report = onnxcomp.optimize(model, model.with_suffix(".opt.onnx"), bench_seconds=0.1)
    return [n.op_type for n in onnx.load(report.path).graph.node], report


def test_what_made_the_model_slower_is_taken_back_and_what_is_exact_stays(
    normalized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_where(monkeypatch, lambda ops: "BatchNormalization" not in ops)

    ops, report = optimized(normalized)

    assert ops == ["Conv", "BatchNormalization"]
    assert [p.reverted for p in report.passes if p.name == "fuse"] == [
        "the result ran at 0.50x the speed of the original on this machine"
    ]
    assert not any(p.reverted for p in report.passes if p.name == "cleanup")
    assert report.verification is not None
    assert report.verification.passed
    assert report.benchmark is not None
    assert report.benchmark.models[1].verdict == SAME


def test_what_is_slow_in_either_form_stays_as_it_is(normalized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_where(monkeypatch, lambda ops: True)

    ops, report = optimized(normalized)

    assert ops == ["Conv"]
    assert not any(p.reverted for p in report.passes)
