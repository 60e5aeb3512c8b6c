"""ONNX Runtime behind one door: sessions on a named execution provider, and proof of what ran.

No other module imports onnxruntime. A session here never falls back in silence: a provider that is not in the build,
does not load, or is dropped by ONNX Runtime is a ProviderError.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import ModelError, OnnxcompError, ProviderError, ResourceError, UsageError

if TYPE_CHECKING:
    from onnxcomp.graph import Model
    from onnxcomp.weights import Weight

__all__ = [
    "FLOAT_KERNELS",
    "INT8_KERNELS",
    "PROVIDERS",
    "Kernel",
    "Session",
    "TensorSpec",
    "executed_kernels",
    "node_times",
    "open_session",
    "provider_name",
]

Array = npt.NDArray[Any]

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}

# Kernels of ONNX Runtime that multiply 8-bit integers, or stay in the 8-bit domain between such kernels.
INT8_KERNELS = frozenset(
    "QLinearConv QLinearMatMul QLinearAdd QLinearMul QLinearGlobalAveragePool QLinearAveragePool QLinearConcat "
    "QLinearSigmoid QLinearLeakyRelu QLinearSoftmax QLinearWhere QLinearReduceMean ConvInteger MatMulInteger "
    "MatMulIntegerToFloat DynamicQuantizeMatMul DynamicQuantizeLSTM QGemm QAttention NhwcMaxPool MatMulNBits".split()
)
# Their float counterparts: the kernels that take the time of a float model.
FLOAT_KERNELS = frozenset(
    "Conv FusedConv MatMul Gemm FusedMatMul FusedGemm ConvTranspose Attention MultiHeadAttention LSTM GRU RNN".split()
)

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


@dataclass(frozen=True)
class Kernel:
    """One kind of kernel that ran: how often per run of the model, and how many microseconds per run in all."""

    provider: str
    op: str
    count: float
    microseconds: float


class Session:
    """An ONNX Runtime session on one execution provider.

    `inputs` are the required inputs: initializers that are also graph inputs (overridable) are not among them.
    """

    def __init__(self, native: Any, provider: str, kept: Sequence[Any] = ()) -> None:
        self.native = native
        self.provider = provider
        self._kept = kept  # memory that the session uses but does not own
        self.inputs = tuple(_spec(i) for i in native.get_inputs())
        self.outputs = tuple(_spec(o) for o in native.get_outputs())

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> list[Any]:
        """Run once. Returns the outputs asked for (all by default), in order."""
        arrays = {name: np.asarray(value) for name, value in feeds.items()}  # numpy scalars are no arrays to it
        return list(self.native.run(None if outputs is None else list(outputs), arrays))


def open_session(
    model: Any,
    *,
    provider: str = "cpu",
    threads: int = 1,
    optimize: bool = True,
    profile: str | None = None,
    config: Mapping[str, str] | None = None,
    memory_pattern: bool = True,
) -> Session:
    """Open a session on `provider` ("cpu", "cuda", "tensorrt", or ONNX Runtime's own provider name).

    `model` is a path, serialized bytes, a ModelProto, an onnxcomp Model, or the pair that `export_model` makes of one
    (its message is used up); the last two may be above 2 GB. `threads` is the number of intra-operator threads, 0 for
    all cores. `optimize=False` switches off every graph optimization of ONNX Runtime, so the model
    runs as it is written. `profile` is a file name prefix: profiling is on and `native.end_profiling()` gives the
    file. `config` holds further session options (keys as in onnxruntime_session_options_config_keys.h).
    `memory_pattern=False` takes memory piece by piece: less of it where many outputs are fetched, and a few runs only.

    Raises ModelError if ONNX Runtime does not take the model, ProviderError if the provider is not there or did not
    load, ResourceError if memory ran out.
    """
    import onnxruntime as ort

    name = provider_name(provider)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = memory_pattern
    options.log_severity_level = 4  # errors come back as exceptions; what is logged besides is noise for the user
    # Threads that spin after a run would burn the cores of the next session in the same process.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # an unknown provider is only a warning in ONNX Runtime
            source, kept = _source(model, options)
            native = ort.InferenceSession(source, options, providers=[name], enable_fallback=0)
        native.disable_fallback()
    except OnnxcompError:
        raise
    except MemoryError as error:
        raise ResourceError(f"out of memory while loading {_label(model)}") from error
    except Exception as error:
        raise _explain(error, model, name) from error
    if name not in native.get_providers():
        raise ProviderError(
            f"{name} is in this build of onnxruntime but did not load, so the model would run on "
            f"{', '.join(native.get_providers())}; `onnxcomp doctor` says which library is missing"
        )
    return Session(native, name, kept)


def provider_name(provider: str) -> str:
    """ONNX Runtime's name of a provider given as "cpu", "cuda", "tensorrt" or by that name itself.

    Raises UsageError for an unknown word and ProviderError for a provider that this build lacks.
    """
    import onnxruntime as ort

    name = PROVIDERS.get(provider, provider)
    if name in ort.get_available_providers():
        return name
    if not name.endswith("ExecutionProvider"):
        raise UsageError(f"unknown execution provider {provider!r}; known: {', '.join(PROVIDERS)}, or a full name")
    hint = "; `pip install onnxruntime-gpu` brings it" if name in (PROVIDERS["cuda"], PROVIDERS["tensorrt"]) else ""
    raise ProviderError(
        f"{name} is not in the installed onnxruntime {ort.__version__}, "
        f"which has {', '.join(ort.get_available_providers())}{hint}"
    )


def executed_kernels(
    model: Any, feeds: Mapping[str, Array], *, provider: str = "cpu", threads: int = 1, runs: int = 4
) -> list[Kernel]:
    """Profile `runs` runs in a session of its own and list the kernels that ran, most expensive first.

    The first run is left out: it allocates and packs. Assignment to a provider does not prove which kernel ran
    (a quantized Conv may run as QLinearConv or as float Conv between Q and DQ): only the profile does.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for event in _kernel_events(model, feeds, provider, threads, runs):
        key = (event["args"].get("provider", "?"), event["args"]["op_name"])
        entry = found.setdefault(key, [0.0, 0.0])
        entry[0] += 1
        entry[1] += event["dur"]
    kernels = [Kernel(where, op, n / runs, us / runs) for (where, op), (n, us) in found.items()]
    return sorted(kernels, key=lambda k: (-k.microseconds, k.op))


def node_times(
    model: Any, feeds: Mapping[str, Array], *, provider: str = "cpu", threads: int = 1, runs: int = 9
) -> dict[str, float]:
    """Microseconds of each node that ran, by its name: the median over `runs` runs in a session of its own.

    Optimizations replace nodes: the names are those of what is left, mostly the old one with something behind it.
    """
    found: dict[str, list[float]] = {}
    for event in _kernel_events(model, feeds, provider, threads, runs):
        found.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event["dur"])
    return {name: float(np.median(times)) for name, times in found.items()}


def _kernel_events(
    model: Any, feeds: Mapping[str, Array], provider: str, threads: int, runs: int
) -> list[dict[str, Any]]:
    """The kernels of `runs` runs, as the profile lists them; a run before them is left out."""
    with tempfile.TemporaryDirectory(prefix="onnxcomp-profile-") as folder:
        session = open_session(model, provider=provider, threads=threads, profile=os.path.join(folder, "run"))
        for _ in range(runs + 1):
            session.run(feeds)
        events = json.loads(Path(session.native.end_profiling()).read_text(encoding="utf-8"))
    first = next(e for e in events if e.get("name") == "model_run")
    begin = first["ts"] + first["dur"]
    return [
        e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time") and e["ts"] >= begin
    ]


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
    if provider != PROVIDERS["cpu"] and ("ProviderBridge" in text or "libcu" in text or "EP Error" in text):
        return ProviderError(f"{provider} did not load: {text[:300]}; `onnxcomp doctor` says what is missing")
    if "Could not find an implementation" in text:
        text += "; the operator set of the model may be older (below 7) or newer than this ONNX Runtime supports"
    return ModelError(f"ONNX Runtime does not load {_label(model)}: {text[:500]}")
