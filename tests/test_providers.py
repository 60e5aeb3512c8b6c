from __future__ import annotations

import pytest

from onnxcomp.errors import ProviderError, UsageError
from onnxcomp.providers import full_name, load_failure, short_name

BUILD = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
KNOWN = [*BUILD, "OpenVINOExecutionProvider", "CoreMLExecutionProvider"]


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("cpu", "CPUExecutionProvider"),
        ("CUDA", "CUDAExecutionProvider"),
        ("tensorrt", "TensorrtExecutionProvider"),
        ("TensorrtExecutionProvider", "TensorrtExecutionProvider"),
    ],
)
def test_a_provider_of_the_build_has_a_short_and_a_full_name(word, name):
    assert full_name(word, BUILD, KNOWN, "1.31") == name
    assert short_name(name) == word.removesuffix("ExecutionProvider").lower()


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("openvino", "OpenVINOExecutionProvider is not in the installed onnxruntime 1.31"),
        ("openvino", "pip install onnxruntime-openvino"),
        ("FooExecutionProvider", "FooExecutionProvider is not in"),
    ],
)
def test_a_provider_that_the_build_lacks_names_the_package_that_brings_it(word, expected):
    with pytest.raises(ProviderError, match=expected):
        full_name(word, BUILD, KNOWN, "1.31")


def test_a_word_that_is_no_provider_is_a_usage_error_with_those_there_are():
    with pytest.raises(UsageError, match=r"unknown execution provider 'abacus'.*tensorrt, cuda, cpu"):
        full_name("abacus", BUILD, KNOWN, "1.31")


# What the dynamic linker and ONNX Runtime said: the first three on a machine with onnxruntime-gpu 1.31 and no GPU, the
# others in issues of ONNX Runtime.
MESSAGES = [
    ("libcublasLt.so.13: cannot open shared object file: No such file or directory", "libcublasLt.so.13", "CUDA"),
    ("libnvinfer.so.10: cannot open shared object file: No such file or directory", "libnvinfer.so.10", "TensorRT"),
    ("libcuda.so.1: cannot open shared object file: No such file or directory", "libcuda.so.1", "NVIDIA driver"),
    (
        "Failed to load library libonnxruntime_providers_cuda.so with error: libcudnn_adv.so.9: cannot open shared "
        "object file: No such file or directory",
        "libcudnn_adv.so.9",
        "cuDNN",
    ),
    (
        'Error loading "C:\\ort\\providers_cuda.dll" which depends on "cublasLt64_12.dll" which is missing.',
        "cublasLt64_12.dll",
        "CUDA",
    ),
    ("libfancy.so.3: cannot open shared object file: No such file or directory", "libfancy.so.3", "search path"),
]


@pytest.mark.parametrize(("message", "library", "product"), MESSAGES, ids=[m[1] for m in MESSAGES])
def test_a_missing_library_is_named_with_what_it_belongs_to(message, library, product):
    text = load_failure("CUDAExecutionProvider", message)

    assert text.startswith("CUDAExecutionProvider is in this build of onnxruntime but did not load")
    assert f"{library} is missing" in text
    assert product in text


def test_a_missing_gpu_is_told_from_a_missing_library():
    text = load_failure("CUDAExecutionProvider", "CUDA failure 100: no CUDA-capable device is detected ; GPU=-1")

    assert "no usable GPU" in text
    assert "nvidia-smi" in text


def test_a_failure_without_a_reason_says_so():
    assert "the CPU instead" in load_failure("DmlExecutionProvider", None)
