"""Names of execution providers, and what to install where one is missing or does not load.

Pure text: what this build of ONNX Runtime has is for `onnxcomp.runtime` to say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from onnxcomp.errors import ProviderError, UsageError

__all__ = ["CPU", "CUDA", "TENSORRT", "full_name", "load_failure", "short_name"]

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_SUFFIX = "ExecutionProvider"
_PACKAGES = {  # package whose onnxruntime has the provider; one of them at a time can be installed
    "cuda": "onnxruntime-gpu",
    "tensorrt": "onnxruntime-gpu",
    "nvtensorrtrtx": "onnxruntime-trt-rtx",
    "openvino": "onnxruntime-openvino",
    "dml": "onnxruntime-directml",
    "qnn": "onnxruntime-qnn",
    "rocm": "onnxruntime-rocm",
    "migraphx": "onnxruntime-migraphx",
    "cann": "onnxruntime-cann",
    "webgpu": "onnxruntime-webgpu",
}
# glibc's, macOS's and ONNX Runtime's own words (the last on Windows) for a library that is not there.
_MISSING = (
    re.compile(r"(\S+?): cannot open shared object file"),
    re.compile(r"Library not loaded: (?:\S*/)?(\S+)"),
    re.compile(r"depends on \"([^\"]+)\" which is missing"),
)
_DEVICE = re.compile(r"no CUDA-capable device|driver version is insufficient|CUDA failure \d+")
_ADVICE = (  # the start of a library's name, what it belongs to, how to get it
    (("cudnn",), "cuDNN", '`pip install "onnxruntime-gpu[cuda,cudnn]"` brings it'),
    (("nvinfer", "nvonnxparser"), "TensorRT", "install TensorRT and put its libraries on the library search path"),
    (("cuda.so", "nvcuda"), "the NVIDIA driver", "install the driver; it needs an NVIDIA GPU"),
    (
        ("cublas", "cudart", "cufft", "curand", "cusparse", "cusolver", "nvrtc", "nvjitlink"),
        "CUDA",
        '`pip install "onnxruntime-gpu[cuda,cudnn]"` brings it',
    ),
    (("openvino",), "OpenVINO", "`pip install openvino` brings it"),
)


def short_name(provider: str) -> str:
    """ "CUDAExecutionProvider" is "cuda"; any other word comes back in lower case."""
    return provider.removesuffix(_SUFFIX).lower()


def full_name(word: str, available: Sequence[str], known: Sequence[str], version: str) -> str:
    """ONNX Runtime's name of the provider `word`, in short ("cuda", "openvino") or in full, in any case.

    `available` are the providers of this build, `known` all that ONNX Runtime has a name for, `version` is that of
    the build. Raises UsageError for an unknown word and ProviderError, with the package that brings it, for a
    provider that the build lacks.
    """
    short = short_name(word)
    for name in available:
        if short_name(name) == short:
            return name
    names = [name for name in known if short_name(name) == short]
    if not names and not word.endswith(_SUFFIX):
        have = ", ".join(short_name(name) for name in available)
        raise UsageError(f"unknown execution provider {word!r}; this build of onnxruntime has {have}")
    package = _PACKAGES.get(short)
    hint = f"; `pip install {package}`, in place of the installed package, brings it" if package else ""
    have = ", ".join(available)
    raise ProviderError(f"{names[0] if names else word} is not in the installed onnxruntime {version} ({have}){hint}")


def load_failure(provider: str, reason: str | None) -> str:
    """One sentence on a provider of the build that did not load. `reason` is what the loader or the driver said."""
    what = f"{provider} is in this build of onnxruntime but did not load"
    if reason is None:
        return f"{what}, for a reason that it does not tell; the model would run on the CPU instead"
    library = next((found.group(1) for pattern in _MISSING if (found := pattern.search(reason))), None)
    if library is None:
        if _DEVICE.search(reason):
            return f"{what}: no usable GPU ({_brief(reason)}); `nvidia-smi` has to list one, with a recent driver"
        return f"{what}: {_brief(reason)}"
    file = library.replace("\\", "/").rpartition("/")[2]
    stem = file.removeprefix("lib").lower()
    for starts, product, advice in _ADVICE:
        if stem.startswith(starts):
            return f"{what}: {file} is missing, a library of {product}; {advice}"
    return f"{what}: {file} is missing; install it, or put its folder on the library search path"


def _brief(text: str) -> str:
    return " ".join(text.split())[:200]
