"""What is in a model, what it costs, and what the passes could do about it.

Parameters are the elements of all initializers and of the tensors in Constant nodes, each tensor once however
often it is used. Integers of type int64 are shapes and indices, not parameters, nor are text and truth
values. Scales and zero points of quantized models count like any other tensor, what the pass `pack` stored
as it is when unpacked, other packed tensors by the elements that are stored. Weights are read one at a time and
in pieces.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxcomp import io, storage
from onnxcomp.concrete import open_dimensions
from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import Constant, Model
from onnxcomp.layers import Layer, count_parameters, layers, stored
from onnxcomp.macs import Macs, Unknown, count_with_run
from onnxcomp.manager import Context, run_pass
from onnxcomp.registry import load_pass
from onnxcomp.safety import custom_operators
from onnxcomp.serde import export_model
from onnxcomp.weights import Weight

__all__ = ["Inspection", "Outlook", "Port", "Quantization", "StoredTensor", "inspect", "summary"]

Source = str | os.PathLike[str] | onnx.ModelProto | Model
Feeds = Mapping[str, npt.NDArray[Any]]

_TRIAL_NODES = 20_000
_LARGEST = 10
_CONTROL = ("If", "Loop", "Scan")
_QUANTIZABLE = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU")
_FLOATS = ("float16", "float32", "float64", "bfloat16")
_TRIED = ("cleanup", "fold-constants", "fuse", "dead-channels")


@dataclass(frozen=True)
class Port:
    """An input or output. A dimension is an int, a name or None; `shape` is None for an unknown rank."""

    name: str
    dtype: str | None
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Quantization:
    """`weighted` nodes multiply by a constant; `quantized` of them have weights of 8 bits or less."""

    quantize_linear: int
    dequantize_linear: int
    weighted: int
    quantized: int


@dataclass(frozen=True)
class Outlook:
    """What a pass could do: the rewrites it would make, or the nodes it could work on."""

    name: str
    candidates: int
    note: str


@dataclass(frozen=True)
class Inspection:
    """Everything `onnxcomp inspect` shows.

    `file_bytes` includes data files; for a model in memory `path` and `sha256` are None and it is the size
    that the file would have. `macs` is a lower bound if `macs_unknown` is not empty. `dynamic` gives for each
    open dimension the places where it occurs, as "INPUT[AXIS]" or "OUTPUT[AXIS]"; nameless ones are "?".
    """

    path: str | None
    sha256: str | None
    file_bytes: int
    ir_version: int
    opsets: dict[str, int]
    producer: str
    metadata: tuple[str, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    parameters: int
    nonzero_parameters: int
    bytes_by_type: dict[str, int]
    nodes: int
    operators: dict[str, int]
    macs: int
    macs_unknown: tuple[Unknown, ...]
    layers: tuple[Layer, ...]
    largest: tuple[StoredTensor, ...]
    dynamic: dict[str, tuple[str, ...]]
    quantization: Quantization
    notes: tuple[str, ...]
    passes: tuple[Outlook, ...]

    @property
    def sparsity(self) -> float:
        """Share of the parameters that are zero."""
        return 1 - self.nonzero_parameters / self.parameters if self.parameters else 0.0

    def to_json(self) -> dict[str, Any]:
        record = dataclasses.asdict(self)
        record["sparsity"] = self.sparsity
        record["passes"] = [{"pass": p.name, "candidates": p.candidates, "note": p.note} for p in self.passes]
        return record


def inspect(
    source: Source, *, feeds: Feeds | None = None, sizes: Mapping[str, int] | None = None, trial: bool = True
) -> Inspection:
    """Look at a model without changing it.

    `feeds`, one sample for all inputs, or `sizes`, numbers for open dimensions by name, make MACs of models
    with open dimensions known; batch dimensions are 1 without them.
    `trial` runs the lossless passes on a copy, unless the model has more than 20,000 nodes.

    Raises ModelError if the model cannot be loaded, DataError if it has to run on `feeds` and
    does not.
    """
    loaded = io.load(source)
    model = storage.plain(loaded)
    proto, _ = export_model(model)
    shapes, macs = count_with_run(model, feeds=feeds, sizes=sizes)
    tensors = list(stored(model))
    rows = layers(model, shapes, macs)
    parameters, nonzero = count_parameters(w for _, w in tensors)
    bytes_by_type: Counter[str] = Counter()
    for _, weight in tensors:
        bytes_by_type[_type_name(weight)] += weight.nbytes
    inputs, outputs = _ports(model.graph.inputs), _ports(model.graph.outputs)
    header = loaded.header
    operators = Counter(node.kind for node in model.nodes())
    return Inspection(
        **_file(source, loaded),
        ir_version=header.ir_version,
        opsets={entry.domain or "ai.onnx": entry.version for entry in header.opset_import},
        producer=f"{header.producer_name} {header.producer_version}".strip(),
        metadata=tuple(p.key for p in header.metadata_props),
        inputs=inputs,
        outputs=outputs,
        parameters=parameters,
        nonzero_parameters=nonzero,
        bytes_by_type=dict(bytes_by_type.most_common()),
        nodes=operators.total(),
        operators=dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        macs=macs.total,
        macs_unknown=macs.unknown,
        layers=tuple(rows),
        largest=_largest(tensors),
        dynamic=_dynamic(inputs + outputs),
        quantization=_quantization(operators, rows),
        notes=(*filter(None, [storage.note(loaded, model)]), *_notes(source, model, proto, rows), *macs.notes),
        passes=(*(_try_passes(model) if trial and operators.total() <= _TRIAL_NODES else ()), _quantize_outlook(rows)),
    )


def summary(
    source: Source,
    *,
    feeds: Feeds | None = None,
    sizes: Mapping[str, int] | None = None,
    macs: Macs | None = None,
) -> dict[str, Any]:
    """The numbers of the report: path, sha256, file_bytes, parameters, nonzero_parameters, macs, nodes.

    `macs` is None where MACs are not fully known; `path` and `sha256` are None for a model in memory.
    Arguments and errors are those of `inspect`; MACs that are given are not counted anew.
    """
    loaded = io.load(source)
    model = storage.plain(loaded)
    if macs is None:
        _, macs = count_with_run(model, feeds=feeds, sizes=sizes)
    parameters, nonzero = count_parameters(w for _, w in stored(model))
    return {
        **_file(source, loaded),
        "parameters": parameters,
        "nonzero_parameters": nonzero,
        "macs": macs.total if macs.exact else None,
        "nodes": sum(1 for _ in model.nodes()),
    }


def _file(source: Source, model: Model) -> dict[str, Any]:
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return {"path": str(path), "sha256": io.sha256(path), "file_bytes": io.model_bytes(path)}
    proto, payloads = export_model(model)
    return {"path": None, "sha256": None, "file_bytes": proto.ByteSize() + sum(w.nbytes for w in payloads)}


def _largest(tensors: list[tuple[str, Weight]]) -> tuple[StoredTensor, ...]:
    chosen = sorted(tensors, key=lambda item: -item[1].nbytes)[:_LARGEST]
    return tuple(StoredTensor(name, _type_name(w), w.shape, w.nbytes) for name, w in chosen)


def _type_name(weight: Weight) -> str:
    return "string" if weight.data_type == onnx.TensorProto.STRING else str(weight.dtype)


# --- parts of an inspection ---------------------------------------------------------------------------------


def _ports(tensors: list[Any]) -> tuple[Port, ...]:
    return tuple(
        Port(
            t.name,
            None if t.dtype is None else str(np.dtype(t.dtype)),
            None if t.shape is None else tuple(t.shape),
        )
        for t in tensors
    )


def _dynamic(ports: tuple[Port, ...]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for port in ports:
        for axis, dim in enumerate(port.shape or ()):
            if not isinstance(dim, int):
                found.setdefault(dim or "?", []).append(f"{port.name}[{axis}]")
    return {name: tuple(places) for name, places in found.items()}


def _quantization(operators: Mapping[str, int], rows: list[Layer]) -> Quantization:
    weighted = [row for row in rows if row.weighted]
    return Quantization(
        operators.get("QuantizeLinear", 0),
        operators.get("DequantizeLinear", 0),
        len(weighted),
        sum(row.quantized for row in weighted),
    )


def _notes(source: Source, model: Model, proto: onnx.ModelProto, rows: list[Layer]) -> list[str]:
    """What makes a model harder to work on."""
    notes = []
    if model.opset < 13:
        notes.append(f"opset {model.opset} is older than 13, which per-channel quantization needs")
    if custom := custom_operators(proto):
        names = ", ".join(f"{domain}.{name}" if domain else name for domain, name in custom)
        notes.append(f"custom operators, which are left alone: {names}")
    if control := Counter(node.op for node in model.nodes() if node.op in _CONTROL):
        notes.append("control flow: " + ", ".join(f"{count} {op}" for op, count in control.items()))
    overridable = [t.name for t in model.graph.inputs if t.default is not None]
    if overridable:
        notes.append(f"{len(overridable)} initializers are also inputs that a caller may override: they stay")
    constants = [t.name for t in model.graph.initializers if isinstance(t, Constant)]
    if listed := [name for name in constants if name in model.graph.listed["input"]]:
        notes.append(f"{len(listed)} initializers are listed as inputs, as files of IR version 3 must")
    if isinstance(source, (str, os.PathLike)) and io.model_bytes(Path(source)) > Path(source).stat().st_size:
        notes.append("weights are in external data files: move them together with the model file")
    if free := open_dimensions(model):
        notes.append(f"open dimensions besides the batch: {', '.join(free)}")
    if nested := sum(row.parameters for row in rows if row.nested):
        notes.append(f"{nested} parameters are used in branches or loops")
    return notes


# --- what passes could do -----------------------------------------------------------------------------------


def _try_passes(model: Model) -> list[Outlook]:
    """Run the lossless passes one after the other on a copy."""
    copy, found = model.copy(), []
    for name in _TRIED:
        before = sum(1 for _ in copy.nodes())
        try:
            record = run_pass(load_pass(name)(), copy, Context())
        except OnnxcompError as error:
            found.append(Outlook(name, 0, str(error)))
            break
        found.append(Outlook(name, record.rewrites, f"{before} -> {sum(1 for _ in copy.nodes())} nodes"))
    return found


def _quantize_outlook(rows: list[Layer]) -> Outlook:
    """Layers with constant float weights that 8-bit quantization could take, and their share of MACs."""
    chosen = [r for r in rows if r.op in _QUANTIZABLE and r.weighted and r.dtype in _FLOATS]
    known = any(r.macs for r in rows)
    note = f"{sum(r.share for r in chosen):.1%} of the known MACs" if known else "no MACs are known"
    return Outlook("quantize", len(chosen), note)
