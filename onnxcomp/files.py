"""Regular files, opened once and read by ranges."""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import ModelError

__all__ = ["CHUNK_BYTES", "Bytes", "OpenFile", "open_regular"]

Bytes = npt.NDArray[np.uint8]

CHUNK_BYTES = 1 << 20  # stays in the cache of the processor until it is hashed and written


class OpenFile:
    """A regular file that stays what it is: saving puts another file at its path, and this one is still read.

    `size` is in bytes; `identity` tells one state of one file from every other. Several threads may read at once.
    Raises ModelError where `open_regular` does, and in every method if the file has become another one or shorter.
    """

    def __init__(self, path: Path, what: str, *, follow: bool = True) -> None:
        self._file: io.FileIO | None = None
        self.path = path
        self._open_again = (path, what, follow)
        self._lock = threading.Lock()
        self._file = open_regular(path, what, follow=follow)
        status = os.fstat(self._file.fileno())
        self.size = status.st_size
        self.identity = _identity(status)

    def same_as(self, status: os.stat_result) -> bool:
        """Whether a status is of this very file."""
        return self.identity[:2] == _identity(status)[:2]

    def give_back(self) -> None:
        """Give the descriptor back to the system: whoever reads opens the file again, if it is still the same."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self, offset: int, length: int) -> Bytes:
        """`length` bytes from `offset` on, in memory."""
        buffer = np.empty(length, np.uint8)
        view, done = buffer.data, 0
        with self._lock, self._opened() as file:
            file.seek(offset)
            while done < length:
                count = file.readinto(view[done:])
                if not count:
                    raise self._changed()
                done += count
        return buffer

    def chunks(self, offset: int, length: int) -> Iterator[memoryview]:
        """The same in pieces of at most `CHUNK_BYTES`."""
        for start in range(offset, offset + length, CHUNK_BYTES):
            yield self.read(start, min(CHUNK_BYTES, offset + length - start)).data

    def map(self, offset: int, length: int) -> Bytes:
        """The same range mapped, read-only: memory is taken by the pages that are looked at, and can be dropped.

        Each mapping takes a descriptor as long as the array lives, so this is for large ranges.
        """
        lead = offset % mmap.ALLOCATIONGRANULARITY
        with self._opened() as file:
            if os.fstat(file.fileno()).st_size < offset + length:
                raise self._changed()
            view = mmap.mmap(file.fileno(), lead + length, access=mmap.ACCESS_READ, offset=offset - lead)
        return np.frombuffer(view, np.uint8, length, lead)

    def map_all(self) -> mmap.mmap:
        """The whole file, which must not be empty, mapped read-only."""
        with self._opened() as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _changed(self) -> ModelError:
        return ModelError(f"{self.path} was changed while it was in use; run again with a stable file")

    @contextlib.contextmanager
    def _opened(self) -> Iterator[io.FileIO]:
        """The file; one whose descriptor was given back is opened for the moment."""
        if self._file is not None:
            yield self._file
            return
        path, what, follow = self._open_again
        with open_regular(path, what, follow=follow) as file:
            if _identity(os.fstat(file.fileno())) != self.identity:
                raise self._changed()
            yield file

    def __del__(self) -> None:
        self.give_back()


def open_regular(path: Path, what: str, *, follow: bool = True) -> io.FileIO:
    """Open a regular file for unbuffered reading; never blocks on a pipe and never touches a device.

    `follow=False` refuses a symbolic link in the last component (where the system can). `what` names the role
    of the file in the message. Raises ModelError for anything but a readable regular file.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    flags |= 0 if follow else getattr(os, "O_NOFOLLOW", 0)
    try:
        mode = os.stat(path).st_mode  # before the open: opening a device may already act on it
        if stat.S_ISREG(mode):
            descriptor = os.open(path, flags)
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return io.FileIO(descriptor, "rb")
            os.close(descriptor)
    except FileNotFoundError as error:
        raise ModelError(f"the {what} file {path} does not exist") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelError(f"the {what} file {path} cannot be opened: {reason}") from error
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
    raise ModelError(f"the {what} file {path} is {kind}; a regular file is needed")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
