"""Providers that do not do what was asked, pretended at the one place that knows ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from onnxcomp import profiling, runtime
from onnxcomp.errors import ModelError, ProviderError
from onnxcomp.profiling import execution
from onnxcomp.runtime import open_session, provider_name

MODEL = onnx.parser.parse_model(
    '<ir_version: 10, opset_import: ["" : 17]> g (float[4, 4] x) => (float[4, 4] y) { y = MatMul (x, x) }'
)
CUBLAS = "libcublasLt.so.13: cannot open shared object file: No such file or directory"


class Native:
    """A session that ONNX Runtime made on the CPU though another provider was asked for."""

    def __init__(self, source, options, providers, enable_fallback):
        self.asked = providers

    def disable_fallback(self):
        pass

    def get_providers(self):
        return ["CPUExecutionProvider"]


@pytest.fixture
def gpu_build(monkeypatch):
    """An onnxruntime-gpu whose providers do not load."""
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Native)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("found no CUDA"), raising=False)
    monkeypatch.setattr(runtime, "_library_error", lambda provider: CUBLAS)


def test_a_provider_that_was_dropped_in_silence_is_an_error_that_names_the_library(gpu_build, capfd):
    with pytest.raises(ProviderError, match=r"did not load: libcublasLt\.so\.13 is missing, a library of CUDA"):
        open_session(MODEL, provider="cuda")

    assert capfd.readouterr() == ("", "")


def test_a_dropped_provider_whose_library_loads_is_an_error_all_the_same(gpu_build, monkeypatch):
    monkeypatch.setattr(runtime, "_library_error", lambda provider: None)

    with pytest.raises(ProviderError, match="for a reason that it does not tell"):
        open_session(MODEL, provider="CUDAExecutionProvider")


@pytest.mark.parametrize(
    ("said", "reason", "error", "expected"),
    [
        ("RegisterTensorRTPlugins: Please install TensorRT libraries", "libnvinfer.so.10: cannot open shared object "
         "file", ProviderError, r"libnvinfer\.so\.10 is missing, a library of TensorRT"),
        ("CUDA failure 35: CUDA driver version is insufficient", None, ProviderError, "no usable GPU"),
        ("This is an invalid model", None, ModelError, "invalid model"),
    ],
)  # fmt: skip
def test_an_error_of_the_provider_is_told_from_one_of_the_model(gpu_build, monkeypatch, said, reason, error, expected):
    def fail(*words, **options):
        raise RuntimeError(said)

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    monkeypatch.setattr(runtime, "_library_error", lambda provider: reason)

    with pytest.raises(error, match=expected):
        open_session(MODEL, provider="tensorrt")


def test_tensorrt_leaves_to_cuda_what_it_does_not_take_and_gets_its_options(gpu_build, monkeypatch):
    asked = []

    class Loaded(Native):
        def __init__(self, source, options, providers, enable_fallback):
            asked.extend(providers)
            assert enable_fallback == 0

        def get_providers(self):
            return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]

        def get_inputs(self):
            return []

        get_outputs = get_inputs

    monkeypatch.setattr(onnxruntime, "InferenceSession", Loaded)
    session = open_session(MODEL, provider="tensorrt", provider_options={"trt_engine_cache_enable": "1"})

    assert session.provider == "TensorrtExecutionProvider"
    assert asked == [("TensorrtExecutionProvider", {"trt_engine_cache_enable": "1"}), "CUDAExecutionProvider"]


def test_a_library_that_does_not_load_is_explained_by_the_linker(tmp_path, monkeypatch):
    folder = tmp_path / "capi"
    folder.mkdir()
    (folder / "libonnxruntime_providers_cuda.so").write_bytes(b"no library")
    monkeypatch.setattr(onnxruntime, "__file__", str(tmp_path / "__init__.py"))

    assert "libonnxruntime_providers_cuda.so" in (runtime._library_error("CUDAExecutionProvider") or "")
    assert runtime._library_error("OpenVINOExecutionProvider") is None


def test_what_ran_is_proven_by_assignment_and_profile():
    found = execution(MODEL, {"x": np.ones((4, 4), np.float32)}, runs=2)

    assert found.assigned == (("CPUExecutionProvider", "", "MatMul"),)
    assert [(k.provider, k.op, k.count) for k in found.kernels] == [("CPUExecutionProvider", "MatMul", 1.0)]


def test_a_runtime_that_is_too_old_to_tell_the_assignment_is_read_by_its_profile():
    assert profiling._assigned(Native(b"", None, [], 0)) is None


@pytest.mark.parametrize("word", ["cpu", "CPU", "CPUExecutionProvider"])
def test_the_cpu_has_its_names(word):
    assert provider_name(word) == "CPUExecutionProvider"
