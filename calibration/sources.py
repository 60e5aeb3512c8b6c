"""Where arrays come from, whatever the model: .npy and .npz files, ONNX TensorProto files, functions.

Arrays on disk are described by their header alone and then read from front to back, a block of rows at a
time, so that memory does not grow with the size of a file. Nothing here unpickles: an array of Python objects
is rejected.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import DataError, OnnxcompError, ResourceError, UsageError

__all__ = [
    "Array", "Column", "array_column", "as_array", "load_function", "npy_column", "npz_columns", "pb_arrays",
    "reading", "suggest",
]  # fmt: skip

Array = npt.NDArray[Any]

_READ_BYTES = 1 << 20  # at a time, so that a batch is not held twice


@dataclass(frozen=True)
class Column:
    """One named array, read from front to back.

    `where` names the file for error messages. `rows(step)` starts a new read and gives consecutive blocks of
    `step` rows (entries of the first axis), the last one possibly shorter. There is at least one block: an
    array without rows or of rank 0 comes as a whole. A block may be a read-only view.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    where: str
    rows: Callable[[int], Iterator[Array]]

    def as_row(self) -> Column:
        """The whole array as the single row of an array of one rank more."""
        step = self.shape[0] if self.shape else 1
        return replace(
            self, shape=(1, *self.shape), rows=lambda _: (whole[None] for whole in self.rows(max(step, 1)))
        )


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn whatever a parser of foreign files or foreign code raises into a DataError that names `where`."""
    try:
        yield
    except OnnxcompError:
        raise
    except MemoryError as error:
        raise ResourceError(f"out of memory while reading {where}") from error
    except (
        Exception
    ) as error:  # zipfile, zlib, numpy, PIL and protobuf share no base class for a damaged file
        text = " ".join(str(error).split())[:200]
        raise DataError(
            f"{where} cannot be read: {type(error).__name__}{': ' if text else ''}{text}"
        ) from error


def suggest(word: str, known: Iterable[str]) -> str:
    """The text " (did you mean 'x'?)" for the closest of the known words, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def array_column(name: str, values: Any, where: str) -> Column:
    """A column over what `as_array` takes."""
    array = as_array(name, values, where)
    return Column(name, array.shape, array.dtype, where, lambda step: _slices(array, step))


def as_array(name: str, values: Any, where: str) -> Array:
    """What numpy makes an array of, not copied if it is one. Raises DataError, such as for ragged lists."""
    with reading(f"{where}: array {name!r}"):
        return np.asarray(values)


def npy_column(path: Path, name: str) -> Column:
    """A column over a .npy file. Raises DataError if the file is damaged or holds Python objects."""

    @contextmanager
    def stream() -> Iterator[IO[bytes]]:
        with path.open("rb") as file:
            yield file

    with reading(str(path)):
        return _file_column(name, str(path), stream, path.stat().st_size)


def npz_columns(path: Path) -> dict[str, Column]:
    """The arrays of a .npz file by name. Raises DataError if one is damaged or holds Python objects."""
    with reading(str(path)), zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if not info.is_dir()]
    columns = {}
    for info in members:
        name = info.filename.removesuffix(".npy")
        with reading(f"{path}: array {name!r}"):
            columns[name] = _file_column(name, str(path), _member(path, info.filename), info.file_size)
    return columns


def pb_arrays(folder: Path, names: list[str]) -> dict[str, Array]:
    """The arrays of `input_K.pb` in a test_data_set folder, by input name.

    A file belongs to the input that its tensor is named after, else to the K-th of `names`. Raises DataError.
    """
    import onnx
    from onnx import numpy_helper

    arrays: dict[str, Array] = {}
    for path in sorted(folder.glob("input_*.pb")):
        number = re.fullmatch(r"input_(\d+)\.pb", path.name)
        if number is None:
            continue
        tensor = onnx.TensorProto()
        with reading(str(path)):
            tensor.ParseFromString(path.read_bytes())
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                raise DataError(
                    f"{path} keeps its values in another file; save the tensor with its data inside"
                )
            index = int(number[1])
            if tensor.name not in names and index >= len(names):
                raise DataError(f"{path}: the model has only {len(names)} input(s): {', '.join(names)}")
            name = tensor.name if tensor.name in names else names[index]
            if name in arrays:
                raise DataError(f"{path}: input {name!r} is given twice in this folder")
            arrays[name] = numpy_helper.to_array(tensor)
    return arrays


def load_function(text: str) -> Callable[[], Any]:
    """The function named by "package.module:function" or "path/file.py:function".

    Modules are looked for beside the installed packages and in the current folder. Raises UsageError if there
    is no such module or function, DataError if importing the module fails.
    """
    place, _, name = text.rpartition(":")
    path = Path(place)
    module = _import_file(path) if path.suffix == ".py" else _import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        what = "is not a function" if function is not None else "does not exist"
        names = [n for n in dir(module) if callable(getattr(module, n))]
        raise UsageError(f"{name!r} {what} in {place}{suggest(name, names)}")
    return cast("Callable[[], Any]", function)


def _import_module(name: str) -> Any:
    try:
        with _extra_path(Path.cwd()), reading(f"the module {name}"):
            return importlib.import_module(name)
    except DataError as error:
        cause = error.__cause__
        if (
            isinstance(cause, ModuleNotFoundError)
            and cause.name
            and (name + ".").startswith(cause.name + ".")
        ):
            raise UsageError(
                f"there is no module {name!r} among the installed ones or in {Path.cwd()}"
            ) from cause
        raise


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"there is no file {path}; expected package.module:function or file.py:function")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} cannot be imported as a Python module")
    module = importlib.util.module_from_spec(spec)
    with _extra_path(path.resolve().parent), reading(f"the module {path}"):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _extra_path(folder: Path) -> Iterator[None]:
    # A console script, unlike `python -m`, does not search the current folder. Last, to shadow nothing.
    entry = str(folder)
    if entry in sys.path:
        yield
        return
    sys.path.append(entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _member(path: Path, member: str) -> Callable[[], AbstractContextManager[IO[bytes]]]:
    @contextmanager
    def stream() -> Iterator[IO[bytes]]:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            yield file

    return stream


def _file_column(
    name: str, where: str, stream: Callable[[], AbstractContextManager[IO[bytes]]], size: int
) -> Column:
    """A column over a stream in .npy format of `size` bytes; only its header is read now."""
    with stream() as file:
        shape, fortran, dtype = _header(file, f"{where}: array {name!r}")
        offset = file.tell()
    if size - offset != math.prod(shape) * dtype.itemsize:
        raise DataError(
            f"{where}: array {name!r} holds {size - offset} bytes where its header promises "
            f"{math.prod(shape) * dtype.itemsize} (shape {shape}, {dtype}); the file is damaged or cut short"
        )

    def rows(step: int) -> Iterator[Array]:
        with reading(f"{where}: array {name!r}"), stream() as file:
            file.read(offset)
            if fortran and size > offset:
                yield from _fortran_rows(file, shape, dtype, step)
            elif shape:
                for first in range(0, max(shape[0], 1), step):
                    yield _read(file, (min(step, shape[0] - first), *shape[1:]), dtype)
            else:
                yield _read(file, (), dtype)

    return Column(name, shape, dtype, where, rows)


def _header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise DataError(
            f"{where} is in .npy format {version}, which holds records; save a plain numeric array"
        )
    if dtype.hasobject:
        raise DataError(
            f"{where} holds Python objects, which are never unpickled; save a plain numeric array"
        )
    if min(shape, default=0) < 0:
        raise DataError(f"{where} has the impossible shape {shape} in its header")
    return shape, fortran, dtype


def _read(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    block = np.empty(shape, dtype)
    flat = block.reshape(-1).view(np.uint8)
    done = 0
    while done < flat.size:
        part = file.read(min(flat.size - done, _READ_BYTES))
        if not part:
            raise EOFError("the data end early")
        flat[done : done + len(part)] = np.frombuffer(part, np.uint8)
        done += len(part)
    return block


def _fortran_rows(
    file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any], step: int
) -> Iterator[Array]:
    # The rows of an array in Fortran order lie scattered over the file: it is mapped from a copy on disk.
    with tempfile.TemporaryFile(prefix="onnxcomp-") as copy:
        shutil.copyfileobj(file, copy)
        copy.flush()
        yield from _slices(np.memmap(copy, dtype, "r", shape=shape, order="F"), step)


def _slices(array: Array, step: int) -> Iterator[Array]:
    if array.ndim == 0:
        yield array
        return
    for first in range(0, max(len(array), 1), step):
        yield array[first : first + step]
