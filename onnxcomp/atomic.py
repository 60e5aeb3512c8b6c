"""Files that are written whole or not at all.

A draft is a file beside its target, with a name that tells whose it is: `.NAME.tmp-PID-xxxxxxxx`. It is synced to the
disk and then takes the target's place in one step. Whatever ends the writing before that, the draft is removed and
the target is as it was; what a killed process left behind is removed by the next one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from onnxcomp.blocks import BLOCK_BYTES, Block, blocks
from onnxcomp.errors import RejectedError, ResourceError, UsageError
from onnxcomp.weights import Buffer

__all__ = ["check_output", "draft", "explained", "locked", "remove_leftovers", "require_space", "sync_folder", "write"]

_DRAFT = re.compile(r"\.(?P<name>.+)\.tmp-(?P<pid>[0-9]+)-[0-9a-f]{8}")


def check_output(target: Path, *, overwrite: bool) -> None:
    """Raise now what would make writing fail later: a path that exists, a folder that is missing or read-only.

    Raises UsageError or RejectedError.
    """
    if "\0" in str(target):
        raise UsageError(f"the output path {str(target)!r} holds a NUL; give a file name")
    with explained(target):
        if target.is_dir():
            raise UsageError(f"the output path {target} is a folder; give a file name")
        if target.exists() and not target.is_file():
            raise UsageError(f"the output path {target} is a pipe, socket or device; give the name of a file")
        if target.exists() and not overwrite:
            raise UsageError(f"the output file {target} exists; use --force to overwrite it")
        if not target.parent.is_dir():
            raise RejectedError(f"the folder {target.parent} for the output does not exist; create it first")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise RejectedError(f"the folder {target.parent} for the output is read-only; choose another with -o")


def require_space(folder: Path, size: int) -> None:
    """Raise ResourceError if the disk has less than `size` bytes left for us; systems that do not know pass."""
    with contextlib.suppress(OSError):
        usage = shutil.disk_usage(folder)
        if usage.total and usage.free < size:
            raise ResourceError(
                f"the output needs {size:,} bytes, but {folder} has {usage.free:,} left; nothing was written, free "
                "some space or choose another disk with -o"
            )


@contextlib.contextmanager
def draft(target: Path) -> Iterator[Path]:
    """The path of a draft for a target; the file is removed at the end unless it was moved."""
    path = target.with_name(f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def write(path: Path, chunks: Iterable[Buffer], seen: Callable[[Block], None] = lambda block: None) -> int:
    """Write a new file with the mode that the umask gives and sync it. Returns its size in bytes.

    Blocks of zeros are not written: file systems keep them as holes. `seen` is called with every block.
    """
    size = 0
    with open(path, "xb") as file:
        for block in blocks(chunks):
            seen(block)
            if block.zero:
                file.seek(block.size, os.SEEK_CUR)
            else:
                file.writelines(block.parts)
                _begin_sync(file, size, block.size)
            size += block.size
        file.truncate(size)
        os.fsync(file.fileno())
    return size


def _begin_sync(file: BinaryIO, offset: int, size: int) -> None:
    """Let the system begin to put a range on the disk, so that less is left for the sync at the end.

    Where the range is not on the disk yet, as here, Linux starts to write what it is told not to keep, and keeps it.
    """
    if size == BLOCK_BYTES and hasattr(os, "posix_fadvise"):
        file.flush()
        os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_DONTNEED)


def remove_leftovers(target: Path) -> None:
    """Remove the drafts of a target whose writers are no more."""
    with contextlib.suppress(OSError):
        found = [(p, m) for p in target.parent.iterdir() if (m := _DRAFT.fullmatch(p.name)) is not None]
        for path, match in found:
            if match["name"] == target.name and not _runs(int(match["pid"])):
                path.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(pid))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that do the same out, where the system can lock a folder. Ends with the process."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; systems that cannot open a folder do that on their own."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn the errors of the file system into ResourceError (disk full) and RejectedError (anything else)."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(
                f"the disk is full, or the file too large for it: {target} was not written, what was there before "
                "still is"
            ) from error
        raise RejectedError(f"cannot write {target}: {error.strerror or error}; choose another path with -o") from error
