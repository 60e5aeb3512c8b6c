"""Model files: lazy loading, atomic saving.

Loading reads the structure only; weights stay in the file. Nothing reaches native code before the wire-level scan
(wire.py, safety.py) has seen it. Saving writes next to the target and renames, so that at every moment the old file or
the new one is there, whole; external data go into a new file that carries the hash of its contents in its name, so that
a model file never points at data of another version.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import onnx
from onnx import TensorProto

from onnxcomp.errors import OnnxcompError, RejectedError, ResourceError, UsageError
from onnxcomp.external import resolve
from onnxcomp.graph import Model
from onnxcomp.safety import check
from onnxcomp.serde import export_model, from_proto, import_model, inline, tensors
from onnxcomp.weights import Weight
from onnxcomp.wire import read_skeleton

__all__ = ["Saved", "check_output", "load", "model_bytes", "save", "save_text", "sha256"]

_INLINE_LIMIT = 1_500_000_000  # above this the payloads go into a data file: one message holds 2 GB at most
_ALIGNMENT = 64
_OWN_DATA = re.compile(r"\.[0-9a-f]{12}\.data$")


@dataclass(frozen=True)
class Saved:
    """What was written: the model file, its data file if there is one, their bytes together, SHA-256 of the model file."""

    path: Path
    data: Path | None
    bytes: int
    sha256: str


def load(source: str | os.PathLike[str] | onnx.ModelProto | Model, *, allow_symlinks: bool = False) -> Model:
    """Load a model for editing. Weights are read when asked for, from where they are.

    `source` is a path, a ModelProto (copied), or a Model (given back as it is). `allow_symlinks` lets external data lie
    behind symbolic links, as in the caches of model hubs.

    Raises ModelError if the file is missing, no ONNX model, malformed or unsafe.
    """
    if isinstance(source, Model):
        return source
    if isinstance(source, onnx.ModelProto):
        return from_proto(source)
    path = Path(source)
    proto = read_skeleton(path).proto
    check(proto, path.parent, path, allow_symlinks=allow_symlinks)

    def payload(tensor: TensorProto) -> Weight:
        if tensor.data_location != TensorProto.EXTERNAL:
            return Weight.from_proto(tensor)
        return Weight.from_proto(tensor, resolve(tensor, path.parent, path, allow_symlinks=allow_symlinks))

    return import_model(proto, payload)


def save(
    model: Model,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    external_data: bool = False,
    before_commit: Callable[[Path], None] | None = None,
) -> Saved:
    """Write a model so that `path` holds the old file or the whole new one at every moment.

    Payloads go into one data file beside it, aligned to 64 bytes, if they are larger than 1.5 GB together or if
    `external_data` asks for it. `before_commit` is called with the path of the finished temporary model file.

    Raises UsageError if `path` exists and `overwrite` is false, RejectedError if it cannot be written, ResourceError if
    the disk is full.
    """
    target = Path(path)
    check_output(target, overwrite=overwrite)
    proto, payloads = export_model(model)
    total = sum(p.nbytes for p in payloads)
    with _explained(target), contextlib.ExitStack() as cleanup:
        data = None
        if external_data or proto.ByteSize() + total > _INLINE_LIMIT:
            data = _write_data(target, payloads, proto, cleanup)
        else:
            inline(proto, payloads)
        temporary = _temporary(target, cleanup)
        message = proto.SerializeToString(deterministic=True)
        with _create(temporary) as file:
            file.write(message)
        if before_commit is not None:
            before_commit(temporary)
        stale = _own_data_files(target) if target.exists() else set()
        os.replace(temporary, target)
        cleanup.pop_all()
        _sync_folder(target.parent)
        for old in stale - {data}:
            old.unlink(missing_ok=True)
    size = len(message) + (data.stat().st_size if data else 0)
    return Saved(target, data, size, hashlib.sha256(message).hexdigest())


def save_text(text: str, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a text file, whole or not at all. Errors are those of `save`."""
    target = Path(path)
    check_output(target, overwrite=overwrite)
    with _explained(target), contextlib.ExitStack() as cleanup:
        temporary = _temporary(target, cleanup)
        with _create(temporary) as file:
            file.write(text.encode("utf-8"))
        os.replace(temporary, target)
        cleanup.pop_all()


def check_output(target: Path, *, overwrite: bool) -> None:
    """Raise now what would make a save fail later: a path that exists, a folder that is missing or read-only."""
    if target.is_dir():
        raise UsageError(f"the output path {target} is a folder; give a file name")
    if target.exists() and not overwrite:
        raise UsageError(f"the output file {target} exists; use --force to overwrite it")
    if not target.parent.is_dir():
        raise RejectedError(f"the folder {target.parent} for the output does not exist; create it first")
    if not os.access(target.parent, os.W_OK):
        raise RejectedError(f"the folder {target.parent} for the output is read-only; choose another with -o")


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_bytes(path: Path) -> int:
    """Size of a model file together with the data files that it refers to."""
    return path.stat().st_size + sum(p.stat().st_size for p in _data_files(path))


def _data_files(path: Path) -> set[Path]:
    proto = read_skeleton(path).proto
    names = {e.value for t in tensors(proto) for e in t.external_data if e.key == "location"}
    return {path.parent / n for n in names if not n.startswith("\x00") and (path.parent / n).is_file()}


def _own_data_files(path: Path) -> set[Path]:
    """Data files that `path` refers to and that this module named: they go when the model is overwritten."""
    try:
        found = _data_files(path)
    except OnnxcompError:
        return set()
    return {p for p in found if p.name.startswith(path.stem + ".") and _OWN_DATA.search(p.name)}


def _write_data(
    target: Path, payloads: list[Weight], proto: onnx.ModelProto, cleanup: contextlib.ExitStack
) -> Path:
    """Stream the payloads into a data file named by its contents, and let the stubs point at it."""
    temporary = _temporary(target, cleanup)
    digest, offsets, position = hashlib.sha256(), [], 0
    with _create(temporary) as file:
        for weight in payloads:
            padding = -position % _ALIGNMENT
            for chunk in (b"\0" * padding, *weight.chunks()):
                file.write(chunk)
                digest.update(chunk)
            offsets.append(position + padding)
            position += padding + weight.nbytes
    data = target.with_name(f"{target.stem}.{digest.hexdigest()[:12]}.data")
    if not data.exists():
        cleanup.callback(data.unlink, missing_ok=True)
    os.replace(temporary, data)
    for tensor in tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL:
            index = int(tensor.external_data[1].value)
            tensor.ClearField("external_data")
            for key, value in (
                ("location", data.name),
                ("offset", offsets[index]),
                ("length", payloads[index].nbytes),
            ):
                tensor.external_data.add(key=key, value=str(value))
    return data


def _temporary(target: Path, cleanup: contextlib.ExitStack) -> Path:
    path = target.with_name(f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    cleanup.callback(path.unlink, missing_ok=True)
    return path


@contextlib.contextmanager
def _create(path: Path) -> Iterator[IO[bytes]]:
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; systems that cannot open a folder do that on their own."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[Any]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(f"the disk is full: {target} was not written, what was there before still is") from error
        raise RejectedError(f"cannot write {target}: {error.strerror or error}; choose another path with -o") from error
