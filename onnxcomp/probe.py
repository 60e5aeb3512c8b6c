"""Where an untrusted model first meets native code: a child process with limits.

The scan of safety.py refuses what is known to be hostile. What is not known may still crash ONNX's shape inference or
ONNX Runtime, or keep them busy for ever. So they get a file in a child process first; if that ends well, this process
may use them too.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxcomp import child, io
from onnxcomp.errors import ModelError, ResourceError
from onnxcomp.files import OpenFile
from onnxcomp.runtime import open_session
from onnxcomp.shapes import infer
from onnxcomp.storage import decoded_bytes

__all__ = ["inspect_contained", "probe"]

_SECONDS = 10.0  # of processor time
_SCANS = 20  # times what the scan took: that grows with the graph and with how slow the processor is
_BYTES_PER_SECOND = 10e6
_PATIENCE = 6  # times that by the clock: what only waits ends too, and a busy machine may be slow
_MEMORY_BYTES = 1 << 30
_MEMORY_RATIO = 6  # of the files: the weights as they are read, prepacked, and folded


def probe(path: str | os.PathLike[str], *, allow_symlinks: bool = False) -> None:
    """Scan a model file, then let shape inference and ONNX Runtime try it in a child process.

    Costs about half a second, once for each state of a file in a process.

    Raises ModelError for a file that the scan refuses, that ONNX Runtime does not load, or with which native code
    crashes or does not end, ResourceError if memory runs out.
    """
    state = OpenFile(Path(path), "model").identity
    _probe(os.fspath(path), allow_symlinks, state)


def inspect_contained(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON form of `onnxcomp.inspection.inspect`, made in a child process. Errors are those of `probe`."""
    return _contained("onnxcomp.probe:inspect_model", os.fspath(path), allow_symlinks=False)


def try_model(job: Mapping[str, Any], emit: child.Event) -> dict[str, Any]:
    """In the child: infer shapes and open a session."""
    infer(io.load(job["path"], allow_symlinks=job["allow_symlinks"]))
    open_session(job["path"])
    return {}


def inspect_model(job: Mapping[str, Any], emit: child.Event) -> dict[str, Any]:
    """In the child: inspect a model."""
    from onnxcomp.inspection import inspect

    return inspect(job["path"]).to_json()


@functools.lru_cache(maxsize=64)
def _probe(path: str, allow_symlinks: bool, state: tuple[int, ...]) -> None:
    """Cached, so that a file that is still as it was is tried once; failures are not."""
    _contained("onnxcomp.probe:try_model", path, allow_symlinks=allow_symlinks)


def _contained(target: str, path: str, *, allow_symlinks: bool) -> dict[str, Any]:
    """Scan a model file, then call a function on it in a child process with limits that go with its size."""
    begin = time.process_time()
    model = io.load(path, allow_symlinks=allow_symlinks)
    scan = time.process_time() - begin
    size = io.model_bytes(Path(path)) + decoded_bytes(model)
    seconds = _SECONDS + _SCANS * scan + size / _BYTES_PER_SECOND
    memory = _MEMORY_BYTES + _MEMORY_RATIO * size
    job = {"path": path, "allow_symlinks": allow_symlinks}
    try:
        return child.run(target, job, memory_bytes=memory, seconds=_PATIENCE * seconds, cpu_seconds=seconds)
    except TimeoutError as error:
        raise ModelError(f"native code was not done with {path}: {error}; it may never end") from error
    except child.ChildCrashError as crash:
        if crash.killed:
            raise ResourceError(f"the process that tried {path} was killed, most likely for want of memory") from crash
        raise ModelError(
            f"native code crashed on {path} ({crash}), or ran out of memory ({memory:,} bytes were allowed)"
        ) from crash
