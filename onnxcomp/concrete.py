"""Numbers for the open dimensions of a model: by inference with the caller's sizes, or from one real run."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.inliner

from onnxcomp.errors import DataError, ModelError
from onnxcomp.graph import Graph, Model, Node, Variable
from onnxcomp.runtime import open_session
from onnxcomp.serde import export_model, import_model
from onnxcomp.shapes import Shapes, infer

__all__ = ["Dims", "bind", "concrete_shapes", "concrete_types", "expand_functions", "open_dimensions"]

Dims = tuple[int, ...]
_BATCH_NAMES = frozenset({"n", "b", "none"})
_NO_BATCH = ("seq", "time", "len", "token", "frame", "step", "height", "width")


def concrete_types(
    model: Model, *, sizes: Mapping[str, int] | None = None, known: Mapping[str, Dims] | None = None
) -> Shapes:
    """Infer types with the open dimensions of the inputs replaced by sizes, and batch dimensions by 1.

    `sizes` and `known` are those of `onnxcomp.macs.count_macs`; an open dimension without a name is
    "INPUT:AXIS" in `sizes`. The result is about the model's own tensors, which stay as they are.
    """
    bound = bind(model, sizes or {}, known or {})
    graph = model.graph
    # The same nodes behind other inputs: the message is made from names.
    concrete = Graph(graph.name)
    concrete.header, concrete.listed, concrete.initializers = graph.header, graph.listed, graph.initializers
    concrete.nodes, concrete.outputs = graph.nodes, graph.outputs
    for tensor in graph.inputs:
        shape = tensor.shape and _bound_shape(tensor, bound)
        given = known.get(tensor.name, shape) if known else shape
        twin = Variable(tensor.name, dtype=tensor.dtype, shape=None if given is None else list(given))
        twin.info = tensor.info
        concrete.inputs.append(twin)
    shapes = infer(Model(model.header, concrete, model.functions))
    types = {t: shapes[t] for scope in graph.scopes() for t in _values(scope)}
    return Shapes(
        {**types, **{t: shapes[twin] for t, twin in zip(graph.inputs, concrete.inputs, strict=True)}}
    )


def _values(scope: Graph) -> Iterator[Any]:
    yield from scope.inputs
    for node in scope.nodes:
        yield from node.outputs


def concrete_shapes(model: Model, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, Dims]:
    """Shapes of all values in one run, by value name, from ONNX Runtime's own profile: no value is kept.

    The model runs once, unoptimized, on the CPU. Values in branches and loops that ran are included; a name
    with several shapes, in two scopes or two iterations, is left out. `feeds` is one sample for all inputs.

    Raises DataError if the model does not run on `feeds`, ModelError if ONNX Runtime does not take the model,
    ResourceError if it has more than 2 GB.
    """
    copy = expand_functions(model)
    nodes = {f"n{index}": node for index, node in enumerate(copy.nodes())}
    for name, node in nodes.items():
        node.name = name
    with tempfile.TemporaryDirectory(prefix="onnxcomp-shapes-") as folder:
        # A prepacked weight is missing among the inputs that the profile lists.
        config = {"session.disable_prepacking": "1"}
        session = open_session(copy, optimize=False, profile=os.path.join(folder, "run"), config=config)
        try:
            session.run(feeds)
        except Exception as error:  # ONNX Runtime's exception types share no base class
            text = " ".join(str(error).split())[:300]
            raise DataError(f"the model does not run on the sample given for its shapes: {text}") from error
        finally:
            profile = session.native.end_profiling()
        events = json.loads(Path(profile).read_text(encoding="utf-8"))
    given = {name: tuple(np.shape(value)) for name, value in feeds.items()}
    return _listed_shapes(events, nodes, given)


def expand_functions(model: Model) -> Model:
    """A copy without local functions. Values of the other scopes keep their names.

    Raises ModelError for functions that cannot be expanded.
    """
    proto, payloads = export_model(model)
    if model.functions:
        try:
            proto = onnx.inliner.inline_local_functions(proto)
        except Exception as error:  # native code: RuntimeError and others
            raise ModelError(f"the local functions of the model cannot be expanded: {error}") from error
    return import_model(proto, payloads)


def bind(model: Model, sizes: Mapping[str, int], known: Mapping[str, Dims]) -> dict[str, int]:
    """Numbers for the symbols of the inputs: from a run, from the caller, 1 for batches."""
    bound: dict[str, int] = {}
    for tensor in model.graph.inputs:
        dims = list(tensor.shape or ())
        for axis, dim in enumerate(dims):
            if isinstance(dim, str) and len(known.get(tensor.name, ())) == len(dims):
                bound[dim] = known[tensor.name][axis]
            elif isinstance(dim, str) and _is_batch(dim, axis, len(dims)):
                bound.setdefault(dim, 1)
    return {**bound, **sizes}


def open_dimensions(model: Model, sizes: Mapping[str, int] | None = None) -> list[str]:
    """Open dimensions of the inputs besides batches, as `sizes` calls them."""
    bound = bind(model, sizes or {}, {})
    return list(
        dict.fromkeys(
            f"{tensor.name}:{axis}" if dim is None else str(dim)
            for tensor in model.graph.inputs
            for axis, dim in enumerate(_bound_shape(tensor, bound))
            if not isinstance(dim, int)
        )
    )


def _bound_shape(tensor: Any, bound: Mapping[str, int]) -> list[int | str | None]:
    shape = tensor.shape or ()
    rank = len(shape)
    dims: list[int | str | None] = []
    for axis, dim in enumerate(shape):
        if dim is None:
            dims.append(bound.get(f"{tensor.name}:{axis}", 1 if _is_batch("", axis, rank) else None))
        else:
            dims.append(dim if isinstance(dim, int) else bound.get(dim, dim))
    return dims


def _is_batch(name: str, axis: int, rank: int) -> bool:
    lower = name.lower()
    if lower in _BATCH_NAMES or "batch" in lower:
        return True
    return axis == 0 and rank > 1 and not any(word in lower for word in _NO_BATCH)


def _listed_shapes(
    events: list[dict[str, Any]], nodes: Mapping[str, Node], given: Mapping[str, Dims]
) -> dict[str, Dims]:
    """The shapes in a profile of ONNX Runtime, by value name; a name with several shapes is left out."""
    found, clashes = dict(given), set[str]()
    for event in events:
        node = nodes.get(event["name"].removesuffix("_kernel_time")) if event.get("cat") == "Node" else None
        if node is None or "output_type_shape" not in event["args"]:
            continue
        for tensors, listed in ((node.inputs, "input_type_shape"), (node.outputs, "output_type_shape")):
            values, kinds = [t.name for t in tensors if t.name], event["args"][listed]
            # Sequences and maps are not listed: the positions are only certain when the numbers agree.
            for name, kind in zip(values, kinds, strict=True) if len(values) == len(kinds) else ():
                shape = tuple(next(iter(kind.values())))
                if found.setdefault(name, shape) != shape:
                    clashes.add(name)
    return {name: shape for name, shape in found.items() if name not in clashes}
