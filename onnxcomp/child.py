"""Run one function of this package in a fresh Python process.

Native code may crash, keep memory, or lay out its data well or badly by chance; a process of its own holds
all three. The interpreter is started anew with `-m onnxcomp.child`, so a calling script needs no `if __name__
== "__main__"`, and only the module that holds the function is imported.

The protocol is JSON: the job on stdin, then one object a line on stdout: {"event": ...} any number of times,
at the end {"result": ...} or {"error": name of an OnnxcompError, "message": ..., "trace": ...}.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
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


def run(target: str, job: Mapping[str, Any], on_event: Event | None = None) -> dict[str, Any]:
    """Call `target` ("package.module:function") as function(job, emit) in a fresh process and return its
    dict.

    `job` and the result are JSON objects; large arrays go through files that the job names. What the function
    passes to `emit` arrives at `on_event`. The child ends with this call, whatever ends it: Ctrl-C included.

    Raises what the function raised if that is an OnnxcompError, OnnxcompError itself for any other exception,
    and ChildCrashError if the process died.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "onnxcomp.child", target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(),
            text=True,
            encoding="utf-8",
        )
        with process:
            try:
                answer = _converse(process, json.dumps(dict(job)), on_event)
                process.wait()
            finally:
                process.kill()
        if "result" in answer:
            return dict(answer["result"])
        if "error" in answer:
            raise _error(answer)
        log.seek(0)
        raise _crash(process.returncode, log.read().decode("utf-8", "replace"))


def _converse(process: subprocess.Popen[str], job: str, on_event: Event | None) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(job)
        process.stdin.close()
    except BrokenPipeError:
        return {}  # it died before it read the job: the exit status says of what
    for line in process.stdout:
        message = json.loads(line)
        if "event" not in message:
            return dict(message)
        if on_event is not None:
            on_event(message["event"])
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
    if returncode < 0:
        cause = f"signal {signal.Signals(-returncode).name}"
    else:
        cause = f"exit status {returncode}"
    last = log.strip().splitlines()[-1:]
    return ChildCrashError(": ".join([cause, *last]), killed=returncode == -9)


def main() -> None:
    """The child's side: read the job, call the function, answer."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what native code prints must not get between the answers

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    module, _, function = sys.argv[1].partition(":")
    try:
        job = json.load(sys.stdin)
        answer = {
            "result": getattr(importlib.import_module(module), function)(job, lambda e: send({"event": e}))
        }
    except errors.OnnxcompError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    except MemoryError:
        answer = {"error": "ResourceError", "message": "out of memory"}
    except Exception as error:
        text = f"{type(error).__name__} in {sys.argv[1]}: {error}"
        answer = {"error": "OnnxcompError", "message": text, "trace": traceback.format_exc()}
    send(answer)
    os._exit(0)  # no tear-down of native libraries: it takes time and some crash in it


if __name__ == "__main__":
    main()
