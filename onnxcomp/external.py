"""External data: which bytes of which file a tensor's values are, and the rules for such a reference.

A reference from a model file is untrusted input. It may name only a regular file inside the model's folder,
reached without symbolic links, and a range inside that file of exactly the size that the tensor's type and
shape ask for. Rules and keys: onnx/docs/ExternalData.md.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath

from onnx import TensorProto

from onnxcomp.errors import ModelError
from onnxcomp.files import Bytes, OpenFile
from onnxcomp.tensors import element_bytes
from onnxcomp.wire import SELF

__all__ = ["Reference", "Storage", "element_bytes", "unsafe_location"]

_KEYS = frozenset(("location", "offset", "length", "checksum", "basepath"))
_KEPT_OPEN = 64  # files per model; some exporters write one for each tensor, and descriptors are few
_MAPPED_BYTES = 1 << 22  # from here on a payload is mapped; below, reading it costs less than a millisecond


@dataclass(frozen=True)
class Reference:
    """`length` bytes at `offset` of an open file.

    `checksum` is the SHA-1 of the range in hexadecimal, None where the model gives none.
    `remark` says what the user should know about the file, such as that it lies behind a symbolic link.
    """

    file: OpenFile
    offset: int
    length: int
    checksum: str | None = None
    remark: str | None = None

    def bytes(self) -> Bytes:
        """The range (length,), mapped read-only if it is large. Raises ModelError if the file has changed."""
        if self.length >= _MAPPED_BYTES:
            try:
                return self.file.map(self.offset, self.length)
            except OSError:  # no descriptor left for another mapping, or a file system without
                pass
        return self.file.read(self.offset, self.length)

    def chunks(self) -> Iterator[memoryview]:
        """The range in pieces, read one after the other, so that it is never in memory as a whole."""
        return self.file.chunks(self.offset, self.length)

    def verify_checksum(self) -> None:
        """Compare the range with its SHA-1, if it has one; reads all of it. Raises ModelError if they differ."""
        if self.checksum is None:
            return
        digest = hashlib.sha1(usedforsecurity=False)
        for chunk in self.chunks():
            digest.update(chunk)
        if digest.hexdigest() != self.checksum.lower():
            raise ModelError(
                f"{self.file.path} has changed: {self.length} bytes from {self.offset} on have SHA-1 "
                f"{digest.hexdigest()}, the model says {self.checksum.lower()}; fetch the file again"
            )


class Storage:
    """The files that hold the payloads of one model, each opened once: its own, and those that its tensors name.

    Locations start in the folder of the model file. With `allow_symlinks` (caches of model hubs) a link may lead
    to a regular file anywhere; a reference then carries a remark.
    """

    def __init__(self, model: OpenFile, *, allow_symlinks: bool = False) -> None:
        self.model = model
        self.folder = model.path.parent.resolve()
        self._allow_symlinks = allow_symlinks
        self._found: dict[str, tuple[OpenFile, str | None]] = {SELF: (model, None)}

    @property
    def size(self) -> int:
        """Bytes of all files that references were found in so far, the model file included."""
        return sum({id(file): file.size for file, _ in self._found.values()}.values())

    def locate(self, tensor: TensorProto) -> Reference:
        """Find the bytes of a tensor with external data. The checksum is not verified here.

        Raises ModelError for whatever breaks a rule of this module.
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
            if location not in self._found:
                self._found[location] = self._find(location)
            file, remark = self._found[location]
            if offset + length > file.size:
                raise ModelError(
                    f"bytes {offset} to {offset + length} lie outside of the file of {file.size} bytes"
                )
        except (ModelError, OSError) as error:
            raise ModelError(
                f"external data of tensor {tensor.name!r} at {location[:200]!r}: {error}"
            ) from error
        return Reference(file, offset, length, checksum, remark)

    def _find(self, location: str) -> tuple[OpenFile, str | None]:
        """The file that a location names, with links resolved, and a remark about it."""
        reason = unsafe_location(location)
        if reason is not None:
            raise ModelError(f"{reason}; a location is a relative path to a file in the model's folder")
        step, linked = self.folder, False
        for part in PurePosixPath(location).parts:
            step = step / part
            linked = linked or step.is_symlink()
        if linked and not self._allow_symlinks:
            raise ModelError("it goes through a symbolic link; put the file itself into the model's folder")
        path = step.resolve()
        if not self._allow_symlinks and not path.is_relative_to(self.folder):
            raise ModelError(f"it leads out of the model's folder to {path}")
        if not path.exists():
            raise ModelError(f"there is no such file in {self.folder}; it belongs to the model, fetch it too")
        file = OpenFile(path, "external data", follow=False)
        status = os.stat(path)
        if self.model.same_as(status):
            raise ModelError("it is the model file itself")
        if len(self._found) > _KEPT_OPEN:
            file.give_back()
        if linked:
            return file, f"external data {location!r} are read through a symbolic link from {path}"
        if status.st_nlink > 1:
            return file, f"external data {location!r} have {status.st_nlink} hard links"
        return file, None


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
