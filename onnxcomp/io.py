"""Model files: lazy loading, atomic saving.

Loading reads the structure only; weights stay in the file. Nothing reaches native code before the wire-level scan
(wire.py, safety.py) has seen it. Saving puts a finished file in the place of the old one, so that at every moment the
old or the new one is there, whole; external data go into a new file that carries the hash of its contents in its name,
so that a model file never points at data of another version.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from onnxcomp import atomic
from onnxcomp.atomic import check_output
from onnxcomp.blocks import Digest
from onnxcomp.errors import ModelError, OnnxcompError, ResourceError
from onnxcomp.external import Storage, unsafe_location
from onnxcomp.files import OpenFile
from onnxcomp.graph import Model
from onnxcomp.protos import slot
from onnxcomp.safety import check
from onnxcomp.serde import export_model, from_proto, import_model
from onnxcomp.splice import Spliced, splice
from onnxcomp.tensors import tensors
from onnxcomp.weights import Buffer, Weight
from onnxcomp.wire import read_skeleton

__all__ = ["Saved", "check_output", "load", "model_bytes", "model_files", "save", "save_text", "sha256"]

_INLINE_LIMIT = 1_500_000_000  # above this the payloads go into a data file: one message holds 2 GB at most
_MESSAGE_LIMIT = (1 << 31) - 1
_ALIGNMENT = 64


@dataclass(frozen=True)
class Saved:
    """What was written: the model file and its data file, if any, and their bytes together."""

    path: Path
    data: Path | None
    bytes: int


def load(source: str | os.PathLike[str] | onnx.ModelProto | Model, *, allow_symlinks: bool = False) -> Model:
    """Load a model for editing. Weights are read when asked for, from the files as they are now: what is saved over
    them later does not change them.

    `source` is a path, a ModelProto (copied), or a Model (given back as it is). `allow_symlinks` lets external data lie
    behind symbolic links, as in the caches of model hubs.

    Raises ModelError if the file is missing, no ONNX model, malformed or unsafe.
    """
    if isinstance(source, Model):
        return source
    if isinstance(source, onnx.ModelProto):
        _refuse_external(source)
        return from_proto(source)
    file = OpenFile(Path(source), "model")
    proto = read_skeleton(file).proto
    storage = Storage(file, allow_symlinks=allow_symlinks)
    check(proto, storage)
    _inline_rest(proto, storage)

    def payload(tensor: TensorProto) -> Weight:
        if tensor.data_location != TensorProto.EXTERNAL:
            return Weight.from_proto(tensor)
        reference = storage.locate(tensor)
        reference.verify_checksum()
        return Weight.from_proto(tensor, reference)

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
    `external_data` asks for it. Memory does not grow with the size of the weights. Data files of earlier versions are
    removed once no model in the folder refers to them. `before_commit` is called with the path of the finished
    model file before it takes the place of the old one; what it raises leaves the old one there.

    Raises UsageError if `path` exists and `overwrite` is false, RejectedError if it cannot be written, ResourceError if
    the disk is full.
    """
    target = Path(path)
    check_output(target, overwrite=overwrite)
    proto, payloads = export_model(model)
    total = proto.ByteSize() + sum(p.nbytes for p in payloads)
    external = external_data or total > _INLINE_LIMIT
    with atomic.explained(target), contextlib.ExitStack() as stack:
        atomic.remove_leftovers(target)
        atomic.require_space(target.parent, total)
        stack.callback(_remove_unused_data, target)
        data, size = None, 0
        if external:
            loose = stack.enter_context(atomic.draft(target))
            digest = stack.enter_context(Digest())
            size = atomic.write(loose, _data_file(payloads), digest.add)
            data = target.with_name(f"{target.stem}.{digest.hexdigest()[:12]}.data")
            _refer(proto, payloads, data.name)
        message = splice(proto, payloads)
        finished = stack.enter_context(atomic.draft(target))
        size += _write_message(finished, message)
        if data is not None:
            with atomic.locked(target.parent):
                os.replace(loose, data)
            atomic.sync_folder(target.parent)
        if before_commit is not None:
            before_commit(finished)
        os.replace(finished, target)
        atomic.sync_folder(target.parent)
    return Saved(target, data, size)


def save_text(text: str, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a text file, whole or not at all. Errors are those of `save`."""
    target = Path(path)
    check_output(target, overwrite=overwrite)
    with atomic.explained(target), atomic.draft(target) as finished:
        atomic.remove_leftovers(target)
        atomic.write(finished, [text.encode("utf-8")])
        os.replace(finished, target)
        atomic.sync_folder(target.parent)


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_files(path: Path) -> list[Path]:
    """A model file and the data files that it refers to, these by name."""
    proto = read_skeleton(path).proto
    names = {e.value for _, t in tensors(proto) for e in t.external_data if e.key == "location"}
    files = [path, *(path.parent / n for n in sorted(names) if unsafe_location(n) is None)]
    return [f for f in files if f.is_file()]


def model_bytes(path: Path) -> int:
    """Size of a model file together with the data files that it refers to."""
    return sum(f.stat().st_size for f in model_files(path))


# --- loading ---------------------------------------------------------------------------------------------------


def _refuse_external(proto: onnx.ModelProto) -> None:
    for where, tensor in tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL:
            raise ModelError(
                f"{where} has external data, but a ModelProto has no folder to find them in; give the path of the "
                "model file, or load the data into the ModelProto first"
            )


def _inline_rest(proto: onnx.ModelProto, storage: Storage) -> None:
    """Put payloads in place that are not kept apart: those of sparse tensors, training_info, defaults of functions."""
    # Alive, so that protobuf gives the same objects again below.
    kept = [tensor for _, tensor in tensors(proto, apart=True)]
    apart, size = {id(tensor) for tensor in kept}, 0
    for where, tensor in tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL and id(tensor) not in apart:
            reference = storage.locate(tensor)
            size += reference.length
            if size > _INLINE_LIMIT:
                raise ModelError(f"{where} is too large: there, ONNX has to hold the values in the model itself")
            reference.verify_checksum()
            tensor.raw_data = reference.bytes().tobytes()
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")


# --- saving ----------------------------------------------------------------------------------------------------


def _data_file(payloads: list[Weight]) -> Iterator[Buffer]:
    """The bytes of a data file; `_refer` knows the places."""
    for weight, offset, end in _places(payloads):
        yield bytes(offset - end)
        yield from weight.chunks()


def _places(payloads: list[Weight]) -> Iterator[tuple[Weight, int, int]]:
    """Each payload with its aligned offset and the end of the one before it."""
    end = 0
    for weight in payloads:
        offset = end + -end % _ALIGNMENT
        yield weight, offset, end
        end = offset + weight.nbytes


def _refer(proto: onnx.ModelProto, payloads: list[Weight], location: str) -> None:
    """Let the stubs point at the payloads in a data file."""
    places = [(str(offset), str(weight.nbytes)) for weight, offset, _ in _places(payloads)]
    for _, tensor in tensors(proto, apart=True):
        index = slot(tensor)
        if index is not None:
            tensor.ClearField("external_data")
            for key, value in zip(("location", "offset", "length"), (location, *places[index]), strict=True):
                tensor.external_data.add(key=key, value=value)


def _write_message(path: Path, message: Spliced) -> int:
    if message.size > _MESSAGE_LIMIT:
        raise ResourceError(
            f"the model has {message.size:,} bytes without what can be stored outside, more than the 2 GB of one "
            "protobuf message"
        )
    written = atomic.write(path, message.chunks())
    if written != message.size:
        raise OnnxcompError(f"{written} bytes were written where {message.size} were announced")
    return written


def _remove_unused_data(target: Path) -> None:
    """Remove the data files of a target, from this save or earlier ones, that no model in the folder refers to."""
    ours = re.compile(re.escape(target.stem) + r"\.[0-9a-f]{12}\.data")
    with contextlib.suppress(OSError), atomic.locked(target.parent):
        found = list(target.parent.iterdir())
        data = [p for p in found if ours.fullmatch(p.name)]
        others = [p for p in found if p not in data and _may_be_model(p, target)] if data else []
        for path in data:
            if not any(_mentions(other, path.name) for other in sorted(others, key=lambda p: p != target)):
                path.unlink(missing_ok=True)


def _may_be_model(path: Path, target: Path) -> bool:
    """Models have any name; ours begins as the target's, and what is being written begins with a dot."""
    return path.suffix == ".onnx" or path.name.startswith((target.stem, f".{target.stem}"))


def _mentions(path: Path, name: str) -> bool:
    """Whether a file that can be a model holds a name; one that cannot be read might."""
    try:
        if not path.is_file() or not 0 < path.stat().st_size <= _MESSAGE_LIMIT:
            return False
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return data.find(name.encode()) >= 0
    except OSError:
        return True
