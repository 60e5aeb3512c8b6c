"""The zoo of trained models with data that the benchmarks measure on: where its files are, and its own metrics."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "feeds", "load_evaluation"]

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "zoo"
_SHARED = {
    "resnet20_cifar10": "cifar_nchw",
    "resnet56_cifar10": "cifar_nchw",
    "mlperf_pretrainedResnet_large_float": "cifar_nhwc",
}


def feeds(folder: Path, name: str, part: str) -> Path:
    """The file with the samples of a model; `part` is calib or eval. `folder` is the zoo's `feeds`, or one like it."""
    return folder / f"{_SHARED.get(name, name)}.{part}.npz"


def load_evaluation(zoo: Path) -> Any:
    """The zoo's own evaluation script as a module."""
    spec = importlib.util.spec_from_file_location("zoo_evaluate", zoo / "evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode = True
    spec.loader.exec_module(module)
    return module
