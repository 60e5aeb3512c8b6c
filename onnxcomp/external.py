"""External data: which bytes of which file a tensor's values are, and the rules for such a reference.

A reference from a model file is untrusted input. It may name only a regular file inside the model's folder,
reached without symbolic links, and a range inside that file of exactly the size that the tensor's type and
shape ask for. Rules and keys: onnx/docs/ExternalData.md.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from onnx import TensorProto

from onnxcomp.errors import ModelError
from onnxcomp.sniff import open_regular
from onnxcomp.tensors import element_bytes
from onnxcomp.wire import SELF

__all__ = [
    "MappedFiles",
    "Reference",
    "element_bytes",
    "map_bytes",
    "resolve",
    "unsafe_location",
    "verify_checksum",
]

_KEYS = frozenset(("location", "offset", "length", "checksum", "basepath"))
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Reference:
    """`length` bytes at `offset` of `path` (absolute, links resolved).

    `checksum` is the SHA-1 of the range in hexadecimal, None where the model gives none.
    `remark` says what the user should know about the file, such as that it lies behind a symbolic link.
    """

    path: Path
    offset: int
    length: int
    checksum: str | None = None
    remark: str | None = None


def resolve(
    tensor: TensorProto, folder: Path, model_file: Path, *, allow_symlinks: bool = False
) -> Reference:
    """Find the bytes of a tensor with external data.

    `folder` is where locations start, `model_file` is the file that holds the model. With `allow_symlinks`
    (caches of model hubs) a link may lead to a regular file anywhere; the reference then carries a remark.
    The checksum is not verified here. Raises ModelError for whatever breaks a rule of this module.
    """
    entries = _entries(tensor)
    location = entries.get("location", "")
    try:
        size = element_bytes(tensor.data_type, tensor.dims)
        offset = _number(entries, "offset", 0)
        length = _number(entries, "length", size)
        checksum = entries.get("checksum")
        if checksum is not None and not re.fullmatch("[0-9a-fA-F]{40}", checksum):
            raise ModelError(f"the checksum {checksum[:60]!r} is not a SHA-1 in hexadecimal")
        if length != size:
            raise ModelError(
                f"its type and shape {list(tensor.dims)} need {size} bytes, but its length is {length}"
            )
        if location == SELF:
            path, remark = Path(os.path.realpath(model_file)), None
        else:
            path, remark = _find(location, folder.resolve(), model_file, allow_symlinks)
        available = os.stat(path).st_size
        if offset + length > available:
            raise ModelError(
                f"bytes {offset} to {offset + length} lie outside of the file of {available} bytes"
            )
    except (ModelError, OSError) as error:
        raise ModelError(f"external data of tensor {tensor.name!r} at {location[:200]!r}: {error}") from error
    return Reference(path, offset, length, checksum, remark)


def unsafe_location(location: str) -> str | None:
    """Why a location from a model file must not be followed on any system, None if it may be."""
    windows = PureWindowsPath(location)
    if not location.strip():
        return "it is empty"
    if "\0" in location or "\\" in location:
        return "it holds a NUL or a backslash"
    if location.startswith("/") or windows.drive or windows.root:
        return "it is an absolute path"
    if ".." in PurePosixPath(location).parts:
        return "it leads out of the model's folder with '..'"
    return None


def verify_checksum(reference: Reference) -> None:
    """Compare a range with its SHA-1, if it has one; reads all of it. Raises ModelError if they differ."""
    if reference.checksum is None:
        return
    digest = hashlib.sha1(usedforsecurity=False)
    view = map_bytes(reference)
    for start in range(0, len(view), _BLOCK):
        digest.update(view[start : start + _BLOCK])
    if digest.hexdigest() != reference.checksum.lower():
        raise ModelError(
            f"{reference.path} has changed: {reference.length} bytes from {reference.offset} on have SHA-1 "
            f"{digest.hexdigest()}, the model says {reference.checksum.lower()}; fetch the file again"
        )


class MappedFiles:
    """The files of a model mapped into memory, read-only, each once.

    A mapping takes a file descriptor, so thousands of tensors must share one per file. Memory is taken only
    by the pages that are read, and the system can drop them again. A mapping lives as long as this object or
    a view of it.
    """

    def __init__(self) -> None:
        self._views: dict[Path, memoryview] = {}

    def view(self, reference: Reference) -> memoryview:
        """The bytes of a reference, read-only. Raises ModelError if the file has changed since."""
        if reference.path not in self._views:
            self._views[reference.path] = _map(reference.path)
        view = self._views[reference.path][reference.offset : reference.offset + reference.length]
        if len(view) != reference.length:
            raise ModelError(
                f"{reference.path} became shorter while it was in use; run again with a stable file"
            )
        return view


def map_bytes(reference: Reference) -> memoryview:
    """The bytes of one reference, mapped read-only; for many tensors share a `MappedFiles`."""
    return MappedFiles().view(reference)


def _map(path: Path) -> memoryview:
    with open_regular(path, "external data", follow=False) as file:
        if os.fstat(file.fileno()).st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _entries(tensor: TensorProto) -> dict[str, str]:
    """The external_data entries as a mapping; unknown, repeated and undecodable ones are refused."""
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key not in _KEYS or entry.key in entries or not isinstance(entry.value, str):
            state = "repeated" if entry.key in entries else "not allowed"
            raise ModelError(
                f"external data of tensor {tensor.name!r}: the key {entry.key[:60]!r} is {state}; ONNX knows "
                f"{', '.join(sorted(_KEYS))}, each once and in UTF-8"
            )
        entries[entry.key] = entry.value
    return entries


def _number(entries: dict[str, str], key: str, default: int) -> int:
    text = entries.get(key)
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,19}", text, re.ASCII):
        raise ModelError(f"the {key} {text[:60]!r} is not a number of bytes")
    return int(text)


def _find(location: str, folder: Path, model_file: Path, allow_symlinks: bool) -> tuple[Path, str | None]:
    """The file that a location names, with links resolved, and a remark about it."""
    reason = unsafe_location(location)
    if reason is not None:
        raise ModelError(f"{reason}; a location is a relative path to a file in the model's folder")
    step, linked = folder, False
    for part in PurePosixPath(location).parts:
        step = step / part
        linked = linked or step.is_symlink()
    if linked and not allow_symlinks:
        raise ModelError("it goes through a symbolic link; put the file itself into the model's folder")
    path = step.resolve()
    if not allow_symlinks and not path.is_relative_to(folder):
        raise ModelError(f"it leads out of the model's folder to {path}")
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise ModelError(
            f"there is no such file in {folder}; it belongs to the model, fetch it too"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelError("it is a folder, pipe, socket or device; a regular file is needed")
    if model_file.exists() and os.path.samestat(status, model_file.stat()):
        raise ModelError("it is the model file itself")
    if linked:
        return path, f"external data {location!r} are read through a symbolic link from {path}"
    if status.st_nlink > 1:
        return path, f"external data {location!r} have {status.st_nlink} hard links"
    return path, None
