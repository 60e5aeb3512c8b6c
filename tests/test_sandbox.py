"""A child process contains what native code may do, and hands back results and errors."""

import faulthandler
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onnxcomp.errors import ModelError, ResourceError
from onnxcomp.sandbox import run_in_child
from onnxcomp.wire import read_skeleton

posix = pytest.mark.skipif(os.name != "posix", reason="signals")
linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="RLIMIT_AS needs /proc")


def test_the_result_comes_back() -> None:
    assert run_in_child(math.hypot, 3.0, 4.0) == 5.0


def test_a_large_result_comes_back() -> None:
    assert run_in_child(bytes, 20_000_000) == bytes(20_000_000)


def test_an_error_of_onnxcomp_passes_through(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        run_in_child(read_skeleton, tmp_path / "missing.onnx")


def test_another_exception_keeps_its_type_and_carries_the_trace_of_the_child() -> None:
    with pytest.raises(ValueError, match=r"domain|nonnegative") as caught:
        run_in_child(math.sqrt, -1.0)
    assert "In the child process" in caught.value.__notes__[0]


@posix
def test_a_crash_is_a_model_error_that_names_the_signal() -> None:
    with pytest.raises(ModelError, match=r"native code crashed \(SIGSEGV\) while checking m\.onnx"):
        run_in_child(faulthandler._sigsegv, what="checking m.onnx")  # type: ignore[attr-defined]


@posix
def test_a_killed_child_is_reported_as_out_of_memory() -> None:
    with pytest.raises(ResourceError, match="killed"):
        run_in_child(os.system, "kill -9 $PPID")


def test_a_call_that_does_not_end_is_stopped() -> None:
    begin = time.monotonic()
    with pytest.raises(ModelError, match=r"longer than 0\.5 s to finish running m\.onnx"):
        run_in_child(time.sleep, 60, seconds=0.5, what="running m.onnx")
    assert time.monotonic() - begin < 5


@linux
def test_memory_beyond_the_limit_is_a_resource_error() -> None:
    with pytest.raises(ResourceError, match="out of memory"):
        run_in_child(bytearray, 1 << 30, memory_bytes=1 << 28)
    assert len(run_in_child(bytearray, 1 << 20, memory_bytes=1 << 28)) == 1 << 20


@posix
def test_what_the_child_prints_is_not_seen(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_in_child(os.write, 1, b"noise") == 5
    assert run_in_child(os.write, 2, b"noise") == 5
    assert capfd.readouterr() == ("", "")


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import math\nfrom onnxcomp.sandbox import run_in_child\nprint(run_in_child(math.hypot, 3.0, 4.0))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("5.0\n", "")
