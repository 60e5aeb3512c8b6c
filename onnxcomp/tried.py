"""The models that were timed against the original on the way to the result, for the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from onnxcomp.bench import ModelTiming

__all__ = ["Tried"]


@dataclass
class Tried:
    """Timings by what the report calls a model; one that is timed again counts as it was timed last."""

    _timings: dict[str, ModelTiming] = field(default_factory=dict)
    _drops: dict[str, float] = field(default_factory=dict)
    _result: ModelTiming | None = None

    def add(self, label: str, timed: ModelTiming, drop: float | None = None) -> None:
        """`drop` is the quality lost against the original, None where it was not measured now."""
        self._timings[label] = timed
        if drop is not None:
            self._drops[label] = drop

    def finish(self, label: str, result: ModelTiming, drop: float | None) -> None:
        """Say which one is the result; `label` is its name if it was not among them."""
        known = next((name for name, timed in self._timings.items() if timed is result), label)
        self.add(known, result, drop)
        self._result = result

    def to_json(self) -> tuple[dict[str, Any], ...]:
        """The `candidates` of the report."""
        return tuple(
            {
                "label": label,
                "file_bytes": timed.file_bytes,
                "latency_ms": timed.ms["p50"],
                "speedup": timed.speedup,
                "ci": None if timed.ci is None else list(timed.ci),
                "drop": self._drops.get(label),
                "kept": timed is self._result,
            }
            for label, timed in self._timings.items()
        )
