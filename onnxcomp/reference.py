"""The original's side of comparisons: what it gives for an input is computed once, however many candidates come."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcomp import io
from onnxcomp.errors import ModelError, ResourceError
from onnxcomp.graph import Model
from onnxcomp.metrics import Tolerance
from onnxcomp.noise import Noise, measure_noise, tolerances
from onnxcomp.runtime import Session, open_session
from onnxcomp.serde import export_model
from onnxcomp.storage import DOMAIN, plain

if TYPE_CHECKING:
    import onnx

__all__ = ["Reference", "fixed", "read_proto"]

Array = npt.NDArray[Any]


class Reference:
    """An original (path, bytes, ModelProto or Model) that candidates are compared with.

    Outputs are remembered up to `keep` bytes: 0 for a single comparison, where no input comes twice. `threads` and
    `provider` are those of all its sessions.
    """

    def __init__(self, model: Any, *, threads: int = 1, provider: str = "cpu", keep: int = 0) -> None:
        self.model = fixed(model)
        self.threads = threads
        self.provider = provider
        self._keep = keep
        self._sessions: dict[bool, Session] = {}
        self._noise: dict[tuple[bool, bytes], Noise] = {}

    @functools.cached_property
    def proto(self) -> onnx.ModelProto:
        """The structure; ModelError if it cannot be read."""
        return read_proto(self.model, "original")

    @functools.cached_property
    def floor(self) -> Tolerance:
        return tolerances(self.proto, self.provider)

    def session(self, *, optimize: bool) -> Session:
        """The original with or without ONNX Runtime's optimizations; ModelError if it does not open."""
        if optimize not in self._sessions:
            opened = open_session(self.model, provider=self.provider, threads=self.threads, optimize=optimize)
            self._sessions[optimize] = _Remembering(opened, self._keep) if self._keep else opened
        return self._sessions[optimize]

    def variants(self, *, optimize: bool) -> list[Callable[[], Session]]:
        """The original computed in other ways: optimizations the other way round, another number of threads."""
        threads = 2 if self.threads == 1 else 1
        return [
            lambda: open_session(
                self.model, provider=self.provider, threads=self.threads, optimize=not optimize
            ),
            lambda: open_session(self.model, provider=self.provider, threads=threads, optimize=optimize),
        ]

    def noise(self, feeds: Sequence[Mapping[str, Array]], *, optimize: bool, vary: bool) -> Noise:
        """How much the original differs from itself on `feeds`; between two equal runs only, without `vary`."""
        key = vary, b"".join(map(_fingerprint, feeds)) + bytes([optimize])
        if key not in self._noise:
            variants = self.variants(optimize=optimize) if vary else []
            self._noise[key] = measure_noise(self.session(optimize=optimize), variants, feeds, self.floor)
        return self._noise[key]


class _Remembering(Session):
    """A session that gives the outputs of the first time when it is asked for the same again."""

    def __init__(self, session: Session, keep: int) -> None:
        super().__init__(session.native, session.provider, session.threads)
        self.session = session  # it may hold memory that the native session uses
        self._left = keep
        self._outputs: dict[bytes, list[Any]] = {}

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Any]:
        if outputs is not None:
            return self.session.run(feeds, outputs)
        key = _fingerprint(feeds)
        if key not in self._outputs:
            found = self.session.run(feeds)
            self._left -= sum(np.asarray(value).nbytes for value in found)
            if self._left < 0:
                return found
            self._outputs[key] = found
        return self._outputs[key]

    def run_again(self, feeds: Mapping[str, Array]) -> list[Any]:
        return self.session.run(feeds)


def _fingerprint(feeds: Mapping[str, Array]) -> bytes:
    digest = hashlib.sha256()
    for name, value in sorted(feeds.items()):
        array = np.asarray(value)
        data = repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(data)
    return digest.digest()


def fixed(model: Any) -> Any:
    """The model in a form that is not made anew for every session; ModelError if there is no such file."""
    if isinstance(model, (str, os.PathLike)) and not os.path.isfile(model):
        raise ModelError(f"there is no model file {os.fspath(model)}")
    try:
        return model.to_bytes() if isinstance(model, Model) else model
    except ResourceError:  # above the 2 GB of one message every session is handed the weights anew
        return model


def read_proto(model: Any, what: str) -> onnx.ModelProto:
    """The structure of a model in any form; ModelError says that the one called `what` cannot be read."""
    import onnx

    if isinstance(model, onnx.ModelProto):
        return model
    if isinstance(model, Model):
        return export_model(model)[0]
    try:
        if isinstance(model, bytes):
            return _unpacked(onnx.load_model_from_string(model), None)
        return _unpacked(onnx.load_model(os.fspath(model), load_external_data=False), model)
    except Exception as error:
        raise ModelError(f"the {what} is not a readable ONNX file: {error}") from error


def _unpacked(proto: onnx.ModelProto, path: Any) -> onnx.ModelProto:
    """The structure with packed weights as plain ones: inputs are made up from the constants that they meet."""
    if all(f.domain != DOMAIN for f in proto.functions):
        return proto
    return export_model(plain(io.load(proto if path is None else path)))[0]
