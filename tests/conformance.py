"""Does the default lossless pipeline keep what a model computes? If not, which rewrite is it?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import defs, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxcomp.errors import OnnxcompError
from onnxcomp.graph import Model
from onnxcomp.manager import Context, run_pass
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.dead_channels import DeadChannels
from onnxcomp.passes.fold_constants import FoldConstants
from onnxcomp.passes.fuse import Fuse
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto

PASSES = {p.name: p for p in (Cleanup(), FoldConstants(), Fuse(), DeadChannels())}
EXACT = ("cleanup", "fold-constants", "cleanup")
FLOAT = ("fuse", "cleanup", "dead-channels")
RANDOM = {
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
    "Dropout",
}
# What ONNX Runtime 1.31 loads.
_IR, _OPSET = 13, 26

Engine = Callable[[onnx.ModelProto, Mapping[str, Any]], list[Any]]


@dataclass(frozen=True)
class Case:
    """A model and one set of inputs."""

    name: str
    proto: onnx.ModelProto
    feeds: Mapping[str, Any]


class Skipped(Exception):
    """The original does not run, so there is nothing to compare with."""


def lowered(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model in versions that ONNX Runtime loads, if its operators are the same in them; else as it is."""
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    versions = {o.domain: o.version for o in proto.opset_import}
    version = versions.get("", 1)
    nodes = [n for graph in graphs(proto) for n in graph.node] + [n for f in proto.functions for n in f.node]
    if version > _OPSET and not all(
        defs.get_schema(n.op_type, version).since_version <= _OPSET for n in nodes if n.domain in ("", "ai.onnx")
    ):
        return found
    found.ir_version = min(proto.ir_version, _IR)
    for entry in [*found.opset_import, *(o for f in found.functions for o in f.opset_import)]:
        if entry.domain in ("", "ai.onnx"):
            entry.version = min(entry.version, _OPSET)
    return found


def graphs(proto: onnx.ModelProto) -> list[onnx.GraphProto]:
    found = [proto.graph]
    for graph in found:
        for attribute in (a for node in graph.node for a in node.attribute):
            found.extend([attribute.g] if attribute.HasField("g") else attribute.graphs)
    return found


def frozen(case: Case, keep: int) -> Case | None:
    """The case with all inputs but the first `keep` turned into initializers: what constant folding sees."""
    proto = onnx.ModelProto()
    proto.CopyFrom(case.proto)
    inputs = list(proto.graph.input)
    fixed = {
        v.name for v in inputs[keep:] if isinstance(case.feeds.get(v.name), (np.ndarray, np.generic, onnx.TensorProto))
    }
    if not fixed:
        return None
    del proto.graph.input[:]
    proto.graph.input.extend(v for v in inputs if v.name not in fixed)
    for name in sorted(fixed):
        value = case.feeds[name]
        tensor = value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(np.asarray(value))
        proto.graph.initializer.add().CopyFrom(tensor)
        proto.graph.initializer[-1].name = name
    proto.ir_version = max(proto.ir_version, 4)
    return Case(f"{case.name}/{keep}", proto, {k: v for k, v in case.feeds.items() if k not in fixed})


def in_runtime(proto: onnx.ModelProto, feeds: Mapping[str, Any]) -> list[Any]:
    """Outputs in ONNX Runtime without optimizations. Packing is off: it is chosen by whether a weight is constant."""
    session = open_session(proto, optimize=False, config={"session.disable_prepacking": "1"})
    known = {i.name for i in session.native.get_inputs()} | {
        i.name for i in session.native.get_overridable_initializers()
    }
    arrays = {k: np.asarray(v) if isinstance(v, np.generic) else v for k, v in feeds.items() if k in known}
    return list(session.native.run(None, arrays))


def in_reference(proto: onnx.ModelProto, feeds: Mapping[str, Any]) -> list[Any]:
    """Outputs in the evaluator of the onnx package, which knows the element types that numpy lacks."""
    arrays = {k: numpy_helper.to_array(v) if isinstance(v, onnx.TensorProto) else v for k, v in feeds.items()}
    with np.errstate(all="ignore"):
        return list(ReferenceEvaluator(proto).run(None, arrays))


def engine_for(case: Case) -> tuple[Engine, list[Any]]:
    """The engine that runs the original, and what it gives. Raises Skipped where none does."""
    reasons = []
    for engine in (in_runtime, in_reference):
        try:
            return engine, engine(case.proto, case.feeds)
        except Exception as error:  # whatever an engine raises on a model that it does not support
            reasons.append(" ".join(str(error).split())[:160] or type(error).__name__)
    raise Skipped(" | ".join(reasons))


def run_passes(model: Model, names: Sequence[str], ctx: Context) -> list[tuple[str, str]]:
    """Run passes and give back each rewrite with the pass that made it."""
    made = []
    for name in names:
        before = len(ctx.rewrites)
        run_pass(PASSES[name], model, ctx)
        made += [(name, what) for what in ctx.rewrites[before:]]
    return made


def check(case: Case, tolerance: float = 1e-3) -> int:
    """Compare the case before and after the pipeline; returns the number of rewrites.

    Raises Skipped if the original does not run, AssertionError that names pass and rewrite if anything changed.
    """
    engine, expected = engine_for(case)
    random = any(n.op_type in RANDOM for g in graphs(case.proto) for n in g.node)
    model, ctx = from_proto(case.proto), Context()
    made = run_passes(model, EXACT, ctx)
    exact = onnx.ModelProto.FromString(model.to_bytes())
    # ONNX Runtime computes the constants, so the reference evaluator may differ from it in the last bit. On half
    # precision ONNX Runtime itself leaves out roundings between nodes, more or fewer as the graph changes.
    exactly = engine is in_runtime and not uses_half(case.proto)
    problem = difference(case, exact, engine, expected, None if exactly else tolerance, random)
    if problem is not None:
        raise AssertionError(f"{case.name}: {problem}; {culprit(case, EXACT, engine, expected, made, random, exactly)}")
    fused = run_passes(model, FLOAT, ctx)
    made += fused
    if not made:
        return 0
    final = model.to_bytes()
    result = onnx.ModelProto.FromString(final)
    problem = difference(case, result, engine, expected, tolerance, random) if fused else None
    if problem is not None:
        guilty = culprit(case, EXACT + FLOAT, engine, expected, made, random, False)
        raise AssertionError(f"{case.name}: {problem}; {guilty}")
    again = from_proto(result)
    repeated = run_passes(again, EXACT + FLOAT, Context())
    assert not repeated, f"{case.name}: a second run rewrites {repeated[:3]}"
    assert again.to_bytes() == final, f"{case.name}: a second run writes other bytes"
    return len(made)


def culprit(
    case: Case, passes: Sequence[str], engine: Engine, expected: list[Any], made: list[Any], random: bool, exactly: bool
) -> str:
    """The first rewrite after which the result is wrong, found by bisection."""
    low, high = 0, len(made)
    while low < high:
        middle = (low + high) // 2
        model = from_proto(case.proto)
        run_passes(model, passes, Context(limit=middle))
        proto = onnx.ModelProto.FromString(model.to_bytes())
        if difference(case, proto, engine, expected, None if exactly else 1e-3, random) is None:
            low = middle + 1
        else:
            high = middle
    return f"the culprit is {made[low - 1]}" if low else "wrong even without a rewrite"


def difference(
    case: Case, proto: onnx.ModelProto, engine: Engine, expected: list[Any], tolerance: float | None, random: bool
) -> str | None:
    """How the result differs from the original in interface or outputs, None if it does not."""
    if interface(proto) != interface(case.proto):
        return f"interface changed from {interface(case.proto)} to {interface(proto)}"
    try:
        found = engine(proto, case.feeds)
    except Exception as error:
        return f"no longer runs: {' '.join(str(error).split())[:300]}"
    for name, a, b in zip([o.name for o in proto.graph.output], expected, found, strict=True):
        problem = unequal(a, b, tolerance, random)
        if problem is not None:
            return f"output {name!r} {problem}"
    return None


def uses_half(proto: onnx.ModelProto) -> bool:
    """Whether a value of the model is, or may be, of type float16."""
    tensors = [t for g in graphs(proto) for t in g.initializer]
    values = [v for g in graphs(proto) for part in (g.input, g.output, g.value_info) for v in part]
    attributes = [a for g in graphs(proto) for n in g.node for a in n.attribute]
    half = onnx.TensorProto.FLOAT16
    return (
        any(t.data_type == half for t in tensors)
        or any(v.type.tensor_type.elem_type == half for v in values)
        or any((a.name == "to" and a.i == half) or a.t.data_type == half for a in attributes)
    )


def interface(proto: onnx.ModelProto) -> list[Any]:
    """Names, order, and types with symbolic dimensions of what a caller must give and gets."""
    fixed = {i.name for i in proto.graph.initializer} if proto.ir_version < 4 else set()
    inputs = [v for v in proto.graph.input if v.name not in fixed]
    return [
        [(v.name, v.type.SerializeToString(deterministic=True)) for v in side] for side in (inputs, proto.graph.output)
    ]


def unequal(a: Any, b: Any, tolerance: float | None, random: bool = False) -> str | None:
    """How two output values differ; bits count where `tolerance` is None."""
    if isinstance(a, (list, tuple, dict)) or a is None:
        pairs = list(_pairs(a, b))
        if type(a) is not type(b) or (a is not None and len(a) != len(b)):
            return f"was {type(a).__name__}, is {type(b).__name__}"
        return next((p for x, y in pairs if (p := unequal(x, y, tolerance, random)) is not None), None)
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"was {a.dtype}{list(a.shape)}, is {b.dtype}{list(b.shape)}"
    if random:
        return None
    if a.dtype.kind in "OUSb" or tolerance is None:
        same = a.tobytes() == b.tobytes() if a.dtype.kind not in "OUS" else a.tolist() == b.tolist()
        if same or (
            a.dtype.kind in "fc"
            and np.array_equal(a, b, equal_nan=True)
            and not (np.signbit(a) ^ np.signbit(b))[a == 0].any()
        ):
            return None
        return "is not bit-equal"
    if a.dtype.kind in "iu":
        return None if np.array_equal(a, b) else "differs"
    x, y = (
        a.astype(np.complex128 if a.dtype.kind == "c" else np.float64),
        b.astype(np.complex128 if a.dtype.kind == "c" else np.float64),
    )
    wide = tolerance * (20 if a.dtype.itemsize < 4 else 1)
    with np.errstate(invalid="ignore"):
        close = np.allclose(
            x, y, rtol=wide, atol=wide * max(1.0, float(np.abs(x[np.isfinite(x)]).max(initial=0.0))), equal_nan=True
        )
    return None if close else f"differs by up to {np.nanmax(np.abs(x - y)):.3g}"


def _pairs(a: Any, b: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        yield from ((a[k], b.get(k)) for k in a)
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        yield from zip(a, b, strict=False)


def explained(error: Exception) -> str:
    """A message of a failure for a table."""
    return f"{type(error).__name__}: {error}" if not isinstance(error, (AssertionError, OnnxcompError)) else str(error)
