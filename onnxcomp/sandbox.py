"""Runs a function in a process of its own, with limits, so that native code may fail without taking us along.

A crash, an endless loop or exhausted memory in the child becomes an error in the parent. It is no barrier
against code that takes over the child: the child runs as the same user, and its answer is unpickled.

The child is a fresh interpreter that does not know the caller's script, so that script needs no
`if __name__ == "__main__":` (the spawn of multiprocessing would run it again). The job comes as a pickle on
its standard input, the outcome goes into a file, and what native code prints goes nowhere.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from onnxcomp.errors import ModelError, OnnxcompError, ResourceError

__all__ = ["run_in_child", "serve"]

T = TypeVar("T")

# -I keeps the caller's folder and environment out of the module path, which then comes from the parent.
_COMMAND = (
    "-I",
    "-c",
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer)\n"
    "from onnxcomp.sandbox import serve; serve(sys.stdin.buffer.read())",
)


def run_in_child(
    function: Callable[..., T],
    *args: Any,
    memory_bytes: int | None = None,
    seconds: float | None = None,
    what: str = "working on the model",
) -> T:
    """Call a module-level function in a child process; arguments and result are pickled.

    `memory_bytes` limits the address space that the call may take: files that it maps count, the module of
    the function does not. Systems without /proc and RLIMIT_AS ignore it. `seconds` limits the wall time,
    start included. `what` completes the messages: "native code crashed (SIGSEGV) while ...".

    An exception of the function is raised here again. Raises ModelError if the child crashes or takes too
    long, ResourceError if it runs out of memory.
    """
    with tempfile.TemporaryDirectory(prefix="onnxcomp-child-") as folder:
        outcome = Path(folder, "outcome")
        job = pickle.dumps((function, args))
        request = pickle.dumps([os.path.abspath(entry) for entry in sys.path])
        request += pickle.dumps((job, str(outcome), memory_bytes, seconds))
        status = _run(request, seconds, what)
        if not outcome.exists():
            raise _crash(status, memory_bytes, seconds, what)
        value, error = pickle.loads(outcome.read_bytes())
    if isinstance(error, MemoryError):
        raise ResourceError(f"out of memory while {what}{_allowance(memory_bytes)}") from error
    if error is not None:
        raise error
    result: T = value
    return result


def serve(request: bytes) -> None:
    """The child's side: call the function, leave the result or the exception in the file."""
    job, outcome, memory_bytes, seconds = pickle.loads(request)
    try:
        function, args = pickle.loads(job)
        _limit(memory_bytes, seconds)
        answer = pickle.dumps((function(*args), None))
    except Exception as error:
        _limit(None, None)  # what is left to do must not fail for want of memory
        if not isinstance(error, OnnxcompError):
            error.add_note("In the child process:\n" + traceback.format_exc())
        answer = _failure(error)
    partial = Path(outcome + ".partial")
    partial.write_bytes(answer)
    os.replace(partial, outcome)


def _run(request: bytes, seconds: float | None, what: str) -> int:
    with subprocess.Popen(
        [sys.executable, *_COMMAND],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            process.communicate(request, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise _timeout(seconds, what) from None
        finally:
            process.kill()  # also on Ctrl-C; does nothing once the child has ended
    return process.returncode


def _limit(memory_bytes: int | None, seconds: float | None) -> None:
    """Set soft limits; None lifts the one on memory. That on CPU time ends a child that lost its parent."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        most = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (most if memory_bytes is None else used + memory_bytes, most))
    if seconds is not None:
        most = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds) * (os.cpu_count() or 1) + 1, most))


def _failure(error: Exception) -> bytes:
    """The exception as a pickle, or its text where it cannot be pickled and read back."""
    try:
        answer = pickle.dumps((None, error))
        pickle.loads(answer)
    except Exception:
        return pickle.dumps((None, OnnxcompError(f"{type(error).__name__}: {error}")))
    return answer


def _crash(status: int, memory_bytes: int | None, seconds: float | None, what: str) -> OnnxcompError:
    name = f"exit status {status}"
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    if name == "SIGKILL":
        return ResourceError(f"the process was killed, most likely for want of memory, while {what}")
    if name == "SIGXCPU":
        return _timeout(seconds, what)
    hint = f", or ran out of memory{_allowance(memory_bytes)}" if memory_bytes is not None else ""
    return ModelError(f"native code crashed ({name}) while {what}{hint}")


def _timeout(seconds: float | None, what: str) -> ModelError:
    return ModelError(f"it took longer than {seconds:g} s to finish {what}; the model may never end")


def _allowance(memory_bytes: int | None) -> str:
    return "" if memory_bytes is None else f" ({memory_bytes} bytes were allowed)"
