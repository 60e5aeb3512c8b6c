from __future__ import annotations

import json

import pytest

from onnxcomp import child
from onnxcomp import environment as module
from onnxcomp.environment import doctor, environment
from onnxcomp.errors import ProviderError


def test_the_environment_names_versions_and_hardware_as_json():
    found = environment()

    assert json.loads(json.dumps(found)) == found
    assert found["onnx"]
    assert found["onnxruntime"]
    assert found["numpy"]
    assert found["cores"] > 0
    assert found["memory_bytes"] > 0


def test_the_cpu_provider_is_proven_by_a_kernel_that_ran():
    report = doctor()
    cpu = report.providers[0]

    assert (cpu.name, cpu.in_build, cpu.works) == ("CPUExecutionProvider", True, True)
    assert {"CUDAExecutionProvider", "TensorrtExecutionProvider"} <= {p.name for p in report.providers}
    assert json.loads(json.dumps(report.to_json()))["providers"][0]["works"] is True
    assert all(p.install.endswith(p.name) for p in report.packages)


def pretend(monkeypatch, answer):
    def run(target, job, on_event=None):
        if target.endswith("providers_in_build"):
            return {"names": ["CUDAExecutionProvider"]}
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(child, "run", run)
    return next(p for p in module.doctor().providers if p.name == "CUDAExecutionProvider")


@pytest.mark.parametrize(
    ("answer", "works", "detail"),
    [
        ({"ran": ["CUDAExecutionProvider", "CPUExecutionProvider"]}, True, "a Conv ran on it"),
        ({"ran": ["CPUExecutionProvider"]}, False, "ran on CPUExecutionProvider"),
        ({"ran": []}, False, "ran on nothing"),
        (ProviderError("libcudnn.so.9 is missing"), False, "libcudnn.so.9 is missing"),
        (
            child.ChildCrashError("signal SIGSEGV", killed=False),
            False,
            "crashes the process (signal SIGSEGV)",
        ),
    ],
)
def test_a_provider_works_only_if_a_kernel_ran_on_it(monkeypatch, answer, works, detail):
    status = pretend(monkeypatch, answer)

    assert status.in_build
    assert status.works is works
    assert detail in status.detail


def test_an_onnxruntime_that_cannot_be_imported_is_a_finding(monkeypatch):
    def run(target, job, on_event=None):
        raise child.ChildCrashError("signal SIGILL", killed=False)

    monkeypatch.setattr(child, "run", run)

    (status,) = doctor().providers
    assert not status.works
    assert "SIGILL" in status.detail
