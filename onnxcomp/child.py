"""Run one function of this package in a fresh Python process, with limits where they are asked for.

Native code may crash, keep memory, never end, or lay out its data well or badly by chance; a process of its own
holds all of these. The interpreter is started anew with `-m onnxcomp.child`, so a calling script needs no
`if __name__ == "__main__"`, and only the module that holds the function is imported. It is no barrier against code
that takes over the child, which runs as the same user; but its answers are only data.

The protocol is JSON: the job on stdin, then one object a line on stdout: {"event": ...} any number of times,
at the end {"result": ...} or {"error": name of an OnnxcompError, "message": ..., "trace": ...}.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onnxcomp import errors

__all__ = ["ChildCrashError", "run"]

Event = Callable[[dict[str, Any]], None]


class ChildCrashError(Exception):
    """The child ended without an answer. `killed` tells a SIGKILL, which on Linux is mostly the
    out-of-memory killer.
    """

    def __init__(self, cause: str, killed: bool) -> None:
        super().__init__(cause)
        self.killed = killed


def run(
    target: str,
    job: Mapping[str, Any],
    on_event: Event | None = None,
    *,
    memory_bytes: int | None = None,
    seconds: float | None = None,
    cpu_seconds: float | None = None,
) -> dict[str, Any]:
    """Call `target` ("package.module:function") as function(job, emit) in a fresh process and return its
    dict.

    `job` and the result are JSON objects; large arrays go through files that the job names. What the function
    passes to `emit` arrives at `on_event`. The child ends with this call, whatever ends it: Ctrl-C included.
    `memory_bytes` limits the address space that the function may take: files that it maps count, the module
    that holds it does not. Systems without /proc and RLIMIT_AS ignore it. `seconds` limits the wall time,
    start included; `cpu_seconds` the processor time of the function, in all threads, to the next whole second:
    other programs do not use it up. Systems without RLIMIT_CPU ignore it, so give `seconds` beside it.

    Raises what the function raised if that is an OnnxcompError, ResourceError for a MemoryError, OnnxcompError
    itself for any other exception, ChildCrashError if the process died, and TimeoutError if the time is over.
    """
    command = [sys.executable, "-P", "-m", "onnxcomp.child", target]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(),
            text=True,
            encoding="utf-8",
        )
        with process, _Deadline(process, seconds) as deadline:
            try:
                message = json.dumps({"job": dict(job), "limits": [memory_bytes, seconds, cpu_seconds]})
                answer = _converse(process, message, on_event)
                process.wait()
            finally:
                process.kill()
        if "result" in answer:
            return dict(answer["result"])
        if "error" in answer:
            raise _error(answer)
        if deadline.passed:
            raise TimeoutError(f"it took longer than {seconds:g} s")
        if process.returncode == -getattr(signal, "SIGXCPU", 0):
            raise TimeoutError(f"it took more than {cpu_seconds or seconds:g} s of processor time")
        log.seek(0)
        raise _crash(process.returncode, log.read().decode("utf-8", "replace"))


class _Deadline:
    """Kills a process when its time is over."""

    def __init__(self, process: subprocess.Popen[str], seconds: float | None) -> None:
        self.passed = False
        self._process = process
        self._timer = None if seconds is None else threading.Timer(seconds, self._expire)

    def _expire(self) -> None:
        self.passed = True
        self._process.kill()

    def __enter__(self) -> _Deadline:
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _converse(process: subprocess.Popen[str], message: str, on_event: Event | None) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(message)
        process.stdin.close()
    except BrokenPipeError:
        return {}  # it died before it read the job: the exit status says of what
    for line in process.stdout:
        try:
            answer = json.loads(line)
        except ValueError:
            return {}  # it died in the middle of the line
        if "event" not in answer:
            return dict(answer)
        if on_event is not None:
            on_event(answer["event"])
    return {}


def _environment() -> dict[str, str]:
    """This process's environment, with the module search path as it is here (a script may have changed
    it).
    """
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}


def _error(answer: Mapping[str, str]) -> errors.OnnxcompError:
    error: errors.OnnxcompError = getattr(errors, answer["error"])(answer["message"])
    if answer.get("trace"):
        error.add_note(answer["trace"])
    return error


def _crash(returncode: int, log: str) -> ChildCrashError:
    cause = f"exit status {returncode}"
    if returncode < 0:
        known = -returncode in set(signal.Signals)
        cause = f"signal {signal.Signals(-returncode).name if known else -returncode}"
    last = log.strip().splitlines()[-1:]
    return ChildCrashError(": ".join([cause, *last]), killed=returncode == -9)


# --- the child's side ------------------------------------------------------------------------------------------


def main() -> None:
    """Read the job, call the function, answer."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what native code prints must not get between the answers

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    module, _, function = sys.argv[1].partition(":")
    request = json.load(sys.stdin)
    memory_bytes = request["limits"][0]
    try:
        call = getattr(importlib.import_module(module), function)
        _limit(*request["limits"])
        answer = {"result": call(request["job"], lambda e: send({"event": e}))}
    except errors.OnnxcompError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    except MemoryError:
        allowed = f"; {memory_bytes:,} bytes were allowed" if memory_bytes is not None else ""
        answer = {"error": "ResourceError", "message": f"out of memory{allowed}"}
    except Exception as error:
        text = f"{type(error).__name__} in {sys.argv[1]}: {error}"
        answer = {"error": "OnnxcompError", "message": text, "trace": traceback.format_exc()}
    send(answer)
    os._exit(0)  # no tear-down of native libraries: it takes time and some crash in it


def _limit(memory_bytes: int | None, seconds: float | None, cpu_seconds: float | None) -> None:
    """Set soft limits. That on CPU time, from `seconds` if it is not limited itself, ends a child that lost its parent.
    """
    if memory_bytes is None and seconds is None and cpu_seconds is None:
        return
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if memory_bytes is not None and statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        most = used + memory_bytes if hard == resource.RLIM_INFINITY else min(used + memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    if cpu_seconds is None and seconds is not None:
        cpu_seconds = seconds * (os.cpu_count() or 1) + 1
    if cpu_seconds is not None:
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        most = math.ceil(time.process_time() + cpu_seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main()
