from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from onnxcomp.options import Options
from onnxcomp.speed_gate import LEAST_GAIN, SpeedGate


@dataclass(frozen=True)
class Timed:
    models: tuple[Any, ...]
    noise_floor: float = field(default=0.01)


def timing(speedup: float | None, kernel: str) -> Any:
    return SimpleNamespace(
        speedup=speedup,
        file_bytes=100,
        ms={"p50": 1.0},
        kernels=(SimpleNamespace(provider="cpu", op=kernel, count=1.0),),
        verdict="",
        ci=None,
        int8_kernels=0,
    )


@pytest.mark.parametrize(
    ("speedup", "said"),
    [
        (0.9, "it runs at 0.90x the speed of the model before, on this machine"),
        (1.02, "it runs at 1.02x the speed of the model before, less than the 1.03x that it takes, on this machine"),
        (1.2, None),
    ],
)
def test_what_is_faster_but_not_enough_is_not_called_slow(monkeypatch, speedup, said):
    gate = SpeedGate(None, None, Options(), lambda done, text: None)  # type: ignore[arg-type]
    models = timing(None, "Conv"), timing(1.0, "Conv"), timing(speedup, "QLinearConv")
    monkeypatch.setattr(gate, "time", lambda given: Timed(models))

    reason, _ = gate.no_progress(("before", "after"), None, None, least=LEAST_GAIN)  # type: ignore[arg-type]

    assert reason == said
