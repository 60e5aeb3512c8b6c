"""ONNX Runtime behind one door: sessions on a named execution provider.

No other module imports onnxruntime. A session here never falls back in silence: a provider that is not in the build,
does not load, or is dropped by ONNX Runtime is a ProviderError.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import ModelError, OnnxcompError, ProviderError, ResourceError
from onnxcomp.providers import CPU, CUDA, TENSORRT, full_name, load_failure, short_name

if TYPE_CHECKING:

    from onnxcomp.graph import Model
    from onnxcomp.weights import Weight

__all__ = ["Session", "TensorSpec", "device_value", "open_session", "provider_name", "runtime_version"]

Array = npt.NDArray[Any]

_PROVIDER_TROUBLE = ("ProviderBridge", "EP Error", "CUDA failure", "CUDA-capable", "driver version", "install TensorRT")
_MESSAGE_LIMIT = (1 << 31) - 1  # bytes of one protobuf message

_NUMPY_TYPES: dict[str, Any] = {
    "float": np.float32, "double": np.float64, "float16": np.float16, "int8": np.int8, "int16": np.int16,
    "int32": np.int32, "int64": np.int64, "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32,
    "uint64": np.uint64, "bool": np.bool_, "string": np.object_,
}  # fmt: skip


@runtime_checkable
class _HasBytes(Protocol):
    def to_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of a model input or output.

    `dtype` is None for what numpy has no type for (bfloat16, float8, 4-bit types, sequences, maps, optionals);
    `kind` is ONNX Runtime's own spelling, such as "tensor(float)". A dimension is an int when fixed, a str when
    symbolic and None when unknown; `shape` is None when the rank is unknown.
    """

    name: str
    kind: str
    shape: tuple[int | str | None, ...] | None

    @property
    def dtype(self) -> np.dtype[Any] | None:
        inner = self.kind.removeprefix("tensor(").removesuffix(")")
        return np.dtype(_NUMPY_TYPES[inner]) if self.kind.startswith("tensor(") and inner in _NUMPY_TYPES else None


class Session:
    """An ONNX Runtime session on one execution provider.

    `inputs` are the required inputs: initializers that are also graph inputs (overridable) are not among them.
    """

    def __init__(self, native: Any, provider: str, threads: int, kept: Sequence[Any] = ()) -> None:
        self.native = native
        self.provider = provider
        self.threads = threads
        self._kept = kept  # memory that the session uses but does not own
        self.inputs = tuple(_spec(i) for i in native.get_inputs())
        self.outputs = tuple(_spec(o) for o in native.get_outputs())

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Any]:
        """Run once. Returns the outputs asked for (all by default), in order."""
        arrays = {name: np.asarray(value) for name, value in feeds.items()}  # numpy scalars are no arrays to it
        return list(self.native.run(None if outputs is None else list(outputs), arrays))

    def run_again(self, feeds: Mapping[str, Array]) -> list[Any]:
        """All outputs computed anew, also by sessions that remember those of earlier runs."""
        return self.run(feeds)


def open_session(
    model: Any,
    *,
    provider: str = "cpu",
    threads: int = 1,
    optimize: bool = True,
    profile: str | None = None,
    config: Mapping[str, str] | None = None,
    memory_pattern: bool = True,
    provider_options: Mapping[str, str] | None = None,
    optimized: str | None = None,
) -> Session:
    """Open a session on `provider` ("cpu", "cuda", "openvino" and so on, or ONNX Runtime's own provider name).

    `model` is a path, serialized bytes, a ModelProto, an onnxcomp Model, or the pair that `export_model` makes of one
    (its message is used up); the last two may be above 2 GB. `threads` is the number of intra-operator threads, 0 for
    all cores. `optimize=False` switches off every graph optimization of ONNX Runtime, so the model
    runs as it is written. `profile` is a file name prefix: profiling is on and `native.end_profiling()` gives the
    file. `config` holds further session options (keys as in onnxruntime_session_options_config_keys.h).
    `optimized` is where the model is written as ONNX Runtime optimized it.
    `memory_pattern=False` takes memory piece by piece: less of it where many outputs are fetched, and a few runs only.
    `provider_options` are the provider's own.

    Raises ModelError if ONNX Runtime does not take the model, ProviderError if the provider is not there or did not
    load, ResourceError if memory ran out.
    """
    import onnxruntime as ort

    name = provider_name(provider)
    options = _options(threads, memory_pattern, config)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = optimized
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    chosen: list[Any] = [(name, dict(provider_options))] if provider_options else [name]
    if name == TENSORRT and CUDA in ort.get_available_providers():
        chosen.append(CUDA)  # what TensorRT does not take stays on the GPU
    try:
        with warnings.catch_warnings(), _quietly(name):
            warnings.simplefilter("error")  # an unknown provider is only a warning in ONNX Runtime
            source, kept = _source(model, options)
            native = ort.InferenceSession(source, options, providers=chosen, enable_fallback=0)
        native.disable_fallback()
    except OnnxcompError:
        raise
    except MemoryError as error:
        raise ResourceError(f"out of memory while loading {_label(model)}") from error
    except Exception as error:
        raise _explain(error, model, name) from error
    if name not in native.get_providers():
        raise ProviderError(load_failure(name, _library_error(name)))
    return Session(native, name, threads, kept)


def _options(threads: int, memory_pattern: bool, config: Mapping[str, str] | None) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = memory_pattern
    options.log_severity_level = 4  # errors come back as exceptions; what is logged besides is noise for the user
    # Threads that spin after a run would burn the cores of the next session in the same process.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    return options


def provider_name(provider: str) -> str:
    """ONNX Runtime's name of a provider given in short ("cpu", "cuda", "openvino") or by that name itself.

    Raises UsageError for an unknown word and ProviderError for a provider that this build lacks.
    """
    import onnxruntime as ort

    return full_name(provider, ort.get_available_providers(), ort.get_all_providers(), ort.__version__)


def device_value(array: Array, device: str) -> Any:
    """A copy of `array` in the memory of `device` ("cuda", "dml", "cpu"), as ONNX Runtime's value."""
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(array, device, 0)


def runtime_version() -> str:
    """The version of the installed ONNX Runtime."""
    import onnxruntime as ort

    return str(ort.__version__)


@contextlib.contextmanager
def _quietly(provider: str) -> Iterator[None]:
    """Find CUDA's libraries in Python packages, and keep what ONNX Runtime logs about providers off the terminal."""
    import onnxruntime as ort

    if provider == CPU:
        yield
        return
    ort.set_default_logger_severity(4)
    try:
        if provider in (CUDA, TENSORRT) and hasattr(ort, "preload_dlls"):
            with contextlib.redirect_stdout(None):
                ort.preload_dlls()
        yield
    finally:
        ort.set_default_logger_severity(2)  # its default


def _library_error(provider: str) -> str | None:
    """Why the dynamic linker does not load the library of `provider`; None if it does, or there is no such file.

    Only for a provider that ONNX Runtime has failed to load: it has to be the first to load a working one.
    """
    import ctypes

    import onnxruntime as ort

    word = {"nvtensorrtrtx": "nv_tensorrt_rtx"}.get(short_name(provider), short_name(provider))
    for path in Path(ort.__file__).with_name("capi").glob(f"*onnxruntime_providers_{word}.*"):
        try:
            ctypes.CDLL(str(path))
        except OSError as error:
            return str(error)
    return None


def _spec(native: Any) -> TensorSpec:
    shape = None if native.shape is None else tuple(native.shape)
    return TensorSpec(native.name, native.type, shape)


def _source(model: Any, options: Any) -> tuple[str | bytes, list[Any]]:
    """What ONNX Runtime reads, and what has to live as long as the session: weights that are handed over beside it."""
    if isinstance(model, (str, os.PathLike)):
        return os.fspath(model), []
    if isinstance(model, bytes):
        return model, []
    if isinstance(model, _HasBytes):
        from onnxcomp.serde import export_model

        model = export_model(cast("Model", model))
    if not isinstance(model, tuple):
        return bytes(model.SerializeToString()), []
    proto, payloads = model
    return _joined(proto, payloads, options)


def _joined(proto: Any, payloads: list[Weight], options: Any) -> tuple[bytes, list[Any]]:
    """An exported model as one message; above the limit of a message, the weights of the main graph stay beside it."""
    import onnxruntime as ort

    from onnxcomp.protos import inline, slot

    kept: list[Any] = []
    if proto.ByteSize() + sum(p.nbytes for p in payloads) > _MESSAGE_LIMIT:
        names, values = [], []
        for tensor in proto.graph.initializer:
            index = slot(tensor)
            weight = None if index is None else payloads[index]
            if weight is not None and weight.dtype.kind in "biuf" and weight.dtype.isbuiltin:
                array = np.ascontiguousarray(weight.load())
                names.append(tensor.name)
                values.append(ort.OrtValue.ortvalue_from_numpy(array))
                kept.append(array)
                tensor.external_data[0].value = "beside"  # a location: no stub any more, and no file either
        options.add_external_initializers(names, values)
        kept += values
    inline(proto, payloads)
    if proto.ByteSize() > _MESSAGE_LIMIT:
        raise ResourceError(
            f"the model has {proto.ByteSize():,} bytes in subgraphs, attributes and 4-bit or bfloat16 weights, more "
            "than ONNX Runtime reads in one message; save the model and give its path"
        )
    return bytes(proto.SerializeToString(deterministic=True)), kept


def _label(model: Any) -> str:
    return os.fspath(model) if isinstance(model, (str, os.PathLike)) else "the model"


def _explain(error: Exception, model: Any, provider: str) -> Exception:
    text = " ".join(str(error).split())
    if "bad allocation" in text or "Failed to allocate memory" in text:
        return ResourceError(f"out of memory while loading {_label(model)}: {text[:200]}")
    if provider != CPU:
        reason = _library_error(provider)
        if reason is not None or any(word in text for word in _PROVIDER_TROUBLE):
            return ProviderError(load_failure(provider, reason or text))
    if "Could not find an implementation" in text:
        text += "; the operator set of the model may be older (below 7) or newer than this ONNX Runtime supports"
    return ModelError(f"ONNX Runtime does not load {_label(model)}: {text[:500]}")
