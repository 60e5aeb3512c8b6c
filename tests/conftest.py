"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcomp.cli import main

ROOT = Path(__file__).resolve().parent.parent

CLASSIFIER = """
<ir_version: 8, opset_import: ["" : 17]>
classifier (float[batch, 1, 8, 8] image) => (float[batch, 3] scores)
<float[3, 4] weight = {1.0, -1.0, 0.5, 0.2, -1.0, 1.0, 0.2, 0.5, 0.5, 0.5, -1.0, -1.0},
 float[3] bias = {0.7, -0.4, 0.9}>
{
    filtered = Conv (image, edges)
    positive = Relu (filtered)
    pooled = GlobalAveragePool (positive)
    flat = Flatten (pooled)
    scores = Gemm <transB = 1> (flat, weight, bias)
}
"""


@dataclass(frozen=True)
class Ran:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command line in this process."""

    def run(*words: object) -> Ran:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: `model.onnx`, a small classifier, and `data.npz`, 40 samples for it."""
    monkeypatch.chdir(tmp_path)
    model = onnx.parser.parse_model(CLASSIFIER)
    rng = np.random.default_rng(5)
    edges = rng.normal(size=(4, 1, 3, 3)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(edges, "edges"))
    onnx.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", image=rng.normal(size=(40, 1, 8, 8)).astype(np.float32))
    return tmp_path


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the checkout."""
    return ROOT
