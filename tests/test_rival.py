"""Channel removal is compared with quantization alone, and the report says which is better."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from onnxcomp import optimize
from onnxcomp.rival import _sentence

MODELS = Path(__file__).resolve().parents[1] / "models"


@dataclass
class Timed:
    speedup: float


@pytest.mark.parametrize(
    ("mine", "drop", "other", "other_drop", "verdict"),
    [
        (1.3, 0.01, 2.0, 0.001, "quantization alone is better"),
        (2.4, 0.001, 2.0, 0.002, "this model is better"),
        (2.4, 0.01, 2.0, 0.001, "this model is faster and loses more"),
        (1.2, 0.001, 2.0, 0.01, "quantization alone is faster and loses more"),
        (2.0, 0.01, 1.99, 0.001, "quantization alone is better"),
    ],
)
def test_the_sentence_says_which_is_better(
    mine: float, drop: float, other: float, other_drop: float, verdict: str
) -> None:
    a: Any = Timed(mine)
    b: Any = Timed(other)
    assert _sentence(a, drop, b, other_drop).endswith(verdict)


def test_a_narrower_model_is_timed_beside_a_quantized_one(tmp_path: Path) -> None:
    report = optimize(
        MODELS / "digits_resnet.onnx",
        tmp_path / "narrow.onnx",
        calib=MODELS / "data" / "digits_resnet.calib.npz",
        passes="cleanup,fuse,prune-channels:macs=0.8:sensitivity=false:repair=false",
        max_drop=0.5,
        samples=64,
        bench_seconds=1,
    )
    assert [r.name for r in report.passes] == ["cleanup", "fuse", "prune-channels"]
    assert any("quantization alone" in note for note in report.notes)
    (alone,) = [c for c in report.candidates if c["label"] == "quantize alone"]
    assert alone["kept"] is False
    assert alone["drop"] is not None
