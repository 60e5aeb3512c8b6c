"""What this machine and this installation offer: versions, cores, memory, int8 instructions, working
providers.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import onnxcomp
from onnxcomp import child
from onnxcomp.cpu import (
    cpu_model,
    has_int8_dot_product,
    int8_instructions,
    int8_meaning,
    load_hints,
    memory_bytes,
    usable_cores,
)
from onnxcomp.errors import OnnxcompError, ProviderError

__all__ = ["Doctor", "PackageStatus", "ProviderStatus", "doctor", "environment", "has_int8_dot_product"]

_RUNTIMES = (
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn",
)  # fmt: skip
_OPTIONAL = {  # package: what it is good for
    "onnxruntime-gpu": "CUDA and TensorRT (in place of onnxruntime, not beside it)",
    "torch": "onnxcomp distill",
    "dask": "calibration on several machines",
}
_PROVIDERS = (
    "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider",
    "NvTensorRTRTXExecutionProvider", "OpenVINOExecutionProvider", "DmlExecutionProvider",
    "CoreMLExecutionProvider",
    "QNNExecutionProvider",
    "DnnlExecutionProvider", "XnnpackExecutionProvider", "MIGraphXExecutionProvider", "ROCMExecutionProvider",
    "WebGpuExecutionProvider", "AzureExecutionProvider",
)  # fmt: skip
_TARGETS = frozenset(_PROVIDERS[:3])  # reported even where the build lacks them
_CONV = """
<ir_version: 10, opset_import: ["" : 17]>
one_node (float[1, 3, 8, 8] x, float[4, 3, 3, 3] w) => (float[1, 4, 6, 6] y) { y = Conv (x, w) }
"""


@dataclass(frozen=True)
class ProviderStatus:
    """One execution provider: in this build of ONNX Runtime or not, and whether a Conv really ran on it."""

    name: str
    in_build: bool
    works: bool
    detail: str


@dataclass(frozen=True)
class PackageStatus:
    """An optional package: its version, or None and the command that brings it."""

    name: str
    version: str | None
    purpose: str
    install: str


@dataclass(frozen=True)
class Doctor:
    """Result of `doctor`. `hints` are sentences on what would disturb a benchmark here, none if nothing
    would.
    """

    environment: dict[str, Any]
    providers: tuple[ProviderStatus, ...]
    int8: str
    packages: tuple[PackageStatus, ...]
    hints: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def environment() -> dict[str, Any]:
    """Versions and hardware, as JSON values; None for what cannot be found out. Starts no process."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "onnxcomp": _version("onnxcomp") or onnxcomp.__version__,  # a checkout need not be installed
        "onnx": _version("onnx"),
        "onnxruntime": next((v for v in map(_version, _RUNTIMES) if v), None),
        "numpy": _version("numpy"),
        "onnx-graphsurgeon": _version("onnx-graphsurgeon"),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "instructions": int8_instructions(),
    }


def doctor() -> Doctor:
    """Try every execution provider, each in a child process that a broken library may crash, and look
    around.
    """
    pip = f"{os.path.basename(sys.executable)} -m pip install"
    return Doctor(
        environment=environment(),
        providers=_providers(),
        int8=int8_meaning(int8_instructions()),
        packages=tuple(
            PackageStatus(name, _version(name), purpose, f"{pip} {name}")
            for name, purpose in _OPTIONAL.items()
        ),
        hints=load_hints(),
    )


def providers_in_build(job: Mapping[str, Any], emit: child.Event) -> dict[str, Any]:
    """In a child: which of the known execution providers this build of ONNX Runtime has."""
    from onnxcomp.runtime import provider_name

    found = []
    for name in _PROVIDERS:
        try:
            found.append(provider_name(name))
        except ProviderError:
            continue
    return {"names": found}


def try_provider(job: Mapping[str, Any], emit: child.Event) -> dict[str, Any]:
    """In a child: run a one-node model on `job["provider"]` and see on which providers its kernels ran."""
    import numpy as np

    from onnxcomp.profiling import executed_kernels

    feeds = {"x": np.ones((1, 3, 8, 8), np.float32), "w": np.ones((4, 3, 3, 3), np.float32)}
    kernels = executed_kernels(job["model"], feeds, provider=job["provider"], runs=1)
    return {"ran": sorted({k.provider for k in kernels})}


def _providers() -> tuple[ProviderStatus, ...]:
    import onnx

    try:
        built = child.run("onnxcomp.environment:providers_in_build", {})["names"]
    except (OnnxcompError, child.ChildCrashError) as error:
        return (ProviderStatus(_PROVIDERS[0], False, False, f"onnxruntime cannot be imported: {error}"),)
    found = []
    with tempfile.TemporaryDirectory(prefix="onnxcomp-doctor-") as folder:
        path = os.path.join(folder, "conv.onnx")
        Path(path).write_bytes(onnx.parser.parse_model(_CONV).SerializeToString())
        for name in _PROVIDERS:
            if name in built:
                found.append(_try(name, path))
            elif name in _TARGETS:
                found.append(ProviderStatus(name, False, False, "not in this build of onnxruntime"))
    return tuple(found)


def _try(name: str, model: str) -> ProviderStatus:
    try:
        ran = child.run("onnxcomp.environment:try_provider", {"provider": name, "model": model})["ran"]
    except OnnxcompError as error:
        return ProviderStatus(name, True, False, str(error))
    except child.ChildCrashError as error:
        return ProviderStatus(name, True, False, f"crashes the process ({error})")
    if name in ran:
        return ProviderStatus(name, True, True, "a Conv ran on it")
    return ProviderStatus(name, True, False, f"loads, but the Conv ran on {', '.join(ran) or 'nothing'}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
