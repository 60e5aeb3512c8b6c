"""Where an untrusted model first meets native code: a child process with limits.

The scan of safety.py refuses what is known to be hostile. What is not known may still crash ONNX's shape inference or
ONNX Runtime, or keep them busy for ever. So they get a file in a child process first; if that ends well, this process
may use them too. The limits leave room for ten times what sound models were seen to take.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxcomp import child, io
from onnxcomp.errors import ModelError, ResourceError
from onnxcomp.runtime import open_session
from onnxcomp.shapes import infer

__all__ = ["inspect_contained", "probe"]

_SECONDS = 10.0
_BYTES_PER_SECOND = 10e6
_MEMORY_BYTES = 1 << 30
_MEMORY_RATIO = 6  # of the files: the weights as they are read, prepacked, and folded


def probe(path: str | os.PathLike[str], *, allow_symlinks: bool = False) -> None:
    """Scan a model file, then let shape inference and ONNX Runtime try it in a child process.

    Costs about half a second, once for each state of a file in a process.

    Raises ModelError for a file that the scan refuses, that ONNX Runtime does not load, or with which native code
    crashes or does not end, ResourceError if memory runs out.
    """
    place = Path(path)
    size = _scan(place, allow_symlinks)
    status = place.stat()
    _probe(str(place), allow_symlinks, size, (status.st_dev, status.st_ino, status.st_mtime_ns))


def inspect_contained(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON form of `onnxcomp.inspection.inspect`, made in a child process. Errors are those of `probe`."""
    return _limited("onnxcomp.probe:inspect_model", {"path": os.fspath(path)}, _scan(Path(path), False))


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
def _probe(path: str, allow_symlinks: bool, size: int, state: tuple[int, ...]) -> None:
    """Cached, so that a file that is still as it was is tried once; failures are not."""
    _limited("onnxcomp.probe:try_model", {"path": path, "allow_symlinks": allow_symlinks}, size)


def _scan(path: Path, allow_symlinks: bool) -> int:
    """What the files of a model have together in bytes, once the model has passed the scan."""
    io.load(path, allow_symlinks=allow_symlinks)
    return io.model_bytes(path)


def _limited(target: str, job: Mapping[str, Any], size: int) -> dict[str, Any]:
    seconds, memory = _SECONDS + size / _BYTES_PER_SECOND, _MEMORY_BYTES + _MEMORY_RATIO * size
    try:
        return child.run(target, job, memory_bytes=memory, seconds=seconds)
    except TimeoutError as error:
        raise ModelError(f"native code was not done with {job['path']} after {seconds:.0f} s; it may never end") from error
    except child.ChildCrashError as crash:
        if crash.killed:
            raise ResourceError(
                f"the process that tried {job['path']} was killed, most likely for want of memory"
            ) from crash
        raise ModelError(
            f"native code crashed on {job['path']} ({crash}), or ran out of memory ({memory:,} bytes were allowed)"
        ) from crash
