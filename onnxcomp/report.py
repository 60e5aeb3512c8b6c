"""The result of `optimize`: numbers for programs, a table for people."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcomp.io import save_text
from onnxcomp.manager import PassRecord

if TYPE_CHECKING:
    from onnxcomp.bench import Benchmark
    from onnxcomp.verdict import Verification

__all__ = ["SCHEMA_VERSION", "Report"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Report:
    """What `optimize` did. `original` and `optimized` describe the two files (path, sha256, file_bytes, parameters,
    nonzero_parameters, macs, nodes); where the verification failed there is no second file, and its path is None.
    `unmet` names targets that were not reached; `notes` are for the user. `layers` compares the two models layer by
    layer, `histograms` some of their tensors, `candidates` the models that were timed on the way (see
    report.schema.json for their keys). `command` is how to do the same again, `created` when it was done (UTC).
    """

    original: dict[str, Any]
    optimized: dict[str, Any]
    passes: tuple[PassRecord, ...]
    verification: Verification | None
    benchmark: Benchmark | None
    environment: dict[str, Any]
    options: dict[str, Any]
    notes: tuple[str, ...] = ()
    unmet: tuple[str, ...] = ()
    seconds: float = 0.0
    layers: tuple[dict[str, Any], ...] = ()
    layers_omitted: int = 0
    histograms: tuple[dict[str, Any], ...] = ()
    candidates: tuple[dict[str, Any], ...] = ()
    command: str = ""
    created: str = ""

    @property
    def path(self) -> Path:
        """The file that was written."""
        return Path(self.optimized["path"])

    @property
    def exit_code(self) -> int:
        """0, 4 if the verification failed, or 5 if a target was not met."""
        if self.verification is not None and self.verification.verdict == "failed":
            return 4
        return 5 if self.unmet else 0

    def save_json(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write `to_json` to a file. Errors are those of `onnxcomp.save`."""
        text = json.dumps(self.to_json(), indent=2, allow_nan=False)
        save_text(text + "\n", path, overwrite=overwrite)

    def to_html(self) -> str:
        """The same as one page that needs nothing else: no network, no JavaScript."""
        from onnxcomp.html_report import render

        return render(self.to_json())

    def save_html(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write `to_html` to a file. Errors are those of `onnxcomp.save`."""
        save_text(self.to_html(), path, overwrite=overwrite)

    def to_json(self) -> dict[str, Any]:
        """The published JSON object (schema_version 1). Numbers that are not finite are None."""
        data = {
            "schema_version": SCHEMA_VERSION,
            "original": self.original,
            "optimized": self.optimized,
            "passes": [p.to_json() for p in self.passes],
            "verification": None if self.verification is None else self.verification.to_json(),
            "benchmark": None if self.benchmark is None else self.benchmark.to_json(),
            "environment": self.environment,
            "options": self.options,
            "notes": list(self.notes),
            "unmet": list(self.unmet),
            "seconds": self.seconds,
            "layers": self.layers,
            "layers_omitted": self.layers_omitted,
            "histograms": self.histograms,
            "candidates": self.candidates,
            "command": self.command,
            "created": self.created,
        }
        return {key: _plain(value) for key, value in data.items()}


def _plain(value: Any) -> Any:
    """Passes report what they like; JSON has neither numpy's numbers nor infinity."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
