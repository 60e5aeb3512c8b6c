"""onnxcomp makes ONNX models smaller and faster, and proves that they still do the same job.

    report = onnxcomp.optimize("model.onnx", "small.onnx", calib="samples.npz")

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxcomp.api import benchmark, verify, write_report
    from onnxcomp.bisection import bisect
    from onnxcomp.errors import OnnxcompError
    from onnxcomp.inspection import inspect
    from onnxcomp.io import load, save
    from onnxcomp.manager import Pipeline
    from onnxcomp.optimizer import optimize
    from onnxcomp.report import Report

__version__ = "0.1.0"
__all__ = [
    "OnnxcompError",
    "Pipeline",
    "Report",
    "benchmark",
    "bisect",
    "inspect",
    "load",
    "optimize",
    "save",
    "verify",
    "write_report",
]

_HOME = {
    "OnnxcompError": "onnxcomp.errors",
    "Pipeline": "onnxcomp.manager",
    "Report": "onnxcomp.report",
    "benchmark": "onnxcomp.api",
    "bisect": "onnxcomp.bisection",
    "inspect": "onnxcomp.inspection",
    "load": "onnxcomp.io",
    "optimize": "onnxcomp.optimizer",
    "save": "onnxcomp.io",
    "verify": "onnxcomp.api",
    "write_report": "onnxcomp.api",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'onnxcomp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
