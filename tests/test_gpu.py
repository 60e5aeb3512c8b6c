from __future__ import annotations

import subprocess

import pytest

from onnxcomp import gpu

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4242, 310\n17, 2000\n", 310 * MIB),
        ("4242, 310\n4242, 90\n", 400 * MIB),  # on two GPUs
        ("17, 2000\n", None),
        ("4242, [N/A]\n", None),
        ("4242, [Not Supported]\n", None),
        ("", None),
    ],
)
def test_the_memory_of_a_process_is_the_sum_of_its_lines(text, expected):
    assert gpu.parse_processes(text, 4242) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512\n80\n", 512 * MIB), ("", None), ("No devices were found\n", None), ("[N/A]\n", None)],
)
def test_the_memory_of_the_device_is_the_first_line(text, expected):
    assert gpu.parse_device(text) == expected


def test_without_nvidia_smi_nothing_is_told(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)

    assert gpu.process_memory(1) is None
    assert gpu.device_memory() is None


@pytest.mark.parametrize("error", [subprocess.CalledProcessError(9, "nvidia-smi"), OSError("no such file")])
def test_an_nvidia_smi_that_fails_tells_nothing(monkeypatch, error):
    def fail(*words, **options):
        raise error

    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(gpu.subprocess, "run", fail)

    assert gpu.device_memory() is None
