from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from onnxcomp import child
from onnxcomp.errors import ModelError, OnnxcompError, ResourceError

FUNCTIONS = """
    import os, signal, time
    from onnxcomp.errors import ModelError

    def double(job, emit):
        emit({"seen": job["number"]})
        return {"number": 2 * job["number"]}

    def chatter(job, emit):
        os.write(1, b"native code says hello\\n")
        print("so does python")
        return {"done": True}

    def reject(job, emit):
        raise ModelError("bad model at node n")

    def defect(job, emit):
        return {}["missing"]

    def starve(job, emit):
        raise MemoryError

    def allocate(job, emit):
        return {"length": len(bytearray(job["bytes"]))}

    def spin(job, emit):
        while True:
            pass

    def die(job, emit):
        os.write(2, b"last words\\n")
        os.kill(os.getpid(), getattr(signal, job["signal"]))

    def leave(job, emit):
        os._exit(3)

    def wait(job, emit):
        emit({"pid": os.getpid()})
        time.sleep(60)
"""


@pytest.fixture(autouse=True)
def functions(tmp_path, monkeypatch):
    (tmp_path / "child_functions.py").write_text(textwrap.dedent(FUNCTIONS))
    monkeypatch.syspath_prepend(str(tmp_path))


def test_the_result_and_the_events_come_back():
    events = []

    assert child.run("child_functions:double", {"number": 21}, events.append) == {"number": 42}
    assert events == [{"seen": 21}]


def test_what_the_child_prints_does_not_disturb_the_answer():
    assert child.run("child_functions:chatter", {}) == {"done": True}


def test_an_error_raised_on_purpose_keeps_its_class_and_message():
    with pytest.raises(ModelError, match=r"^bad model at node n$"):
        child.run("child_functions:reject", {})


def test_a_defect_in_the_child_is_an_internal_error_with_its_traceback():
    with pytest.raises(OnnxcompError, match="KeyError in child_functions:defect") as caught:
        child.run("child_functions:defect", {})

    assert caught.value.exit_code == 1
    assert 'return {}["missing"]' in caught.value.__notes__[0]


def test_running_out_of_memory_in_the_child_is_a_resource_error():
    with pytest.raises(ResourceError):
        child.run("child_functions:starve", {})


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="RLIMIT_AS needs /proc")
def test_memory_beyond_the_limit_is_a_resource_error():
    with pytest.raises(ResourceError, match="268,435,456 bytes were allowed"):
        child.run("child_functions:allocate", {"bytes": 1 << 30}, memory_bytes=1 << 28)

    assert child.run("child_functions:allocate", {"bytes": 1 << 27}, memory_bytes=1 << 28) == {"length": 1 << 27}


@pytest.mark.parametrize("function", ["spin", "wait"])
def test_a_call_that_does_not_end_is_stopped(function):
    begin = time.monotonic()

    with pytest.raises(TimeoutError, match=r"longer than 0\.7 s"):
        child.run(f"child_functions:{function}", {}, seconds=0.7)
    assert time.monotonic() - begin < 10


@pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_CPU of POSIX")
def test_processor_time_is_limited_and_waiting_is_none():
    with pytest.raises(TimeoutError, match=r"more than 0\.1 s of processor time"):
        child.run("child_functions:spin", {}, seconds=60, cpu_seconds=0.1)
    with pytest.raises(TimeoutError, match=r"longer than 1\.5 s"):
        child.run("child_functions:wait", {}, seconds=1.5, cpu_seconds=0.1)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("name", "killed"), [("SIGSEGV", False), ("SIGKILL", True)])
def test_a_crash_names_the_signal_and_the_last_words(name, killed):
    with pytest.raises(child.ChildCrashError, match="last words") as caught:
        child.run("child_functions:die", {"signal": name})

    assert str(caught.value).startswith(f"signal {name}")
    assert caught.value.killed is killed


def test_an_exit_without_an_answer_is_a_crash():
    with pytest.raises(child.ChildCrashError, match="exit status 3"):
        child.run("child_functions:leave", {})


def test_an_interrupt_in_the_caller_ends_the_child():
    seen = []

    def interrupt(event):
        seen.append(event["pid"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        child.run("child_functions:wait", {}, interrupt)
    assert not psutil.pid_exists(seen[0])


def test_a_script_needs_no_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from onnxcomp import child\n"
        "print(child.run('child_functions:double', {'number': 4}))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, check=True)

    assert done.stdout == "{'number': 8}\n"
