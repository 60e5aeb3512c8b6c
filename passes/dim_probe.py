"""Before dimensions are coupled: a plain form of the model, the shapes of one run, and which dimensions vary.

The plain form has no local functions and no Constant nodes, and shares no small constants: two operators that use
the same vector of zeros are not coupled by it. Weights of two or more axes stay shared: they are tied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.concrete import concrete_shapes, concrete_types, expand_functions
from onnxcomp.errors import DataError, InconclusiveError
from onnxcomp.graph import Constant, Graph, Model
from onnxcomp.passes.dim_atoms import Dims
from onnxcomp.runtime import open_session
from onnxcomp.serde import export_model
from onnxcomp.shapes import Shapes, infer
from onnxcomp.synthesis import synthesize, usable_inputs

__all__ = ["Probe", "plain_form", "probe"]

Feeds = Mapping[str, npt.NDArray[Any]]
_TIED_RANK = 2


@dataclass(frozen=True)
class Probe:
    """Shapes of all values in one run (batch 1 where it is open), and the axes that other inputs would change.

    An axis in `periodic` holds the batch and something else (attention heads, say): at the batch of one its extent is
    that of something else. `feeds` are the inputs of that run, `larger` inputs with a batch of two if it is open.
    """

    shapes: Mapping[Any, Dims]
    varying: frozenset[tuple[Any, int]]
    periodic: frozenset[tuple[Any, int]]
    feeds: Feeds
    larger: Feeds | None


def plain_form(model: Model) -> Model:
    """A copy without local functions and Constant nodes, where each use of a small constant has its own."""
    copy = expand_functions(model)
    for scope in list(copy.graph.scopes()):
        _constants_to_initializers(copy, scope)
    for scope in list(copy.graph.scopes()):
        _separate_small(copy, scope)
    return copy


def _constants_to_initializers(model: Model, scope: Graph) -> None:
    outputs, gone = model.outputs(), []
    for node in scope.nodes:
        weight = model.weight(node.outputs[0]) if node.kind == "Constant" else None
        if weight is not None and node.outputs[0] not in outputs:
            constant = Constant(node.outputs[0].name, weight)
            scope.initializers.append(constant)
            model.redirect(node.outputs[0], constant)
            gone.append(node)
    scope.remove(gone)


def _separate_small(model: Model, scope: Graph) -> None:
    taken: set[Any] = set()
    for node in scope.nodes:
        for position, tensor in enumerate(node.inputs):
            if not isinstance(tensor, Constant) or (_axes(tensor) >= _TIED_RANK and tensor.dtype.kind == "f"):
                continue
            if tensor in taken or len(tensor.outputs) > 1:
                node.inputs[position] = model.constant(scope, tensor.name, tensor.weight)
            taken.add(tensor)


def _axes(constant: Any) -> int:
    return sum(d > 1 for d in constant.shape)


def probe(model: Model, sample: Feeds | None = None) -> Probe:
    """Run the model (in plain form) to learn its shapes; `sample` is used where made-up inputs do not run.

    Raises DataError if neither runs, ModelError if ONNX Runtime does not take the model.
    """
    session = open_session(model, optimize=False)
    proto = export_model(model)[0]
    try:
        feeds: Feeds = usable_inputs(session, proto, count=1)[0]
    except InconclusiveError as error:
        if sample is None:
            raise DataError(f"the shapes of the model cannot be found: {error}") from error
        feeds = sample
    shapes = _shapes(model, feeds)
    varying: set[tuple[Any, int]] = set()
    periodic: set[tuple[Any, int]] = set()
    larger: Feeds | None = None
    for symbol, base in _symbols(session, feeds).items():
        sizes = {**_symbols(session, feeds), symbol: 2 * base}
        other = synthesize(session.inputs, proto, seed=0, count=1, sizes=sizes)[0]
        try:
            found = _shapes(model, other)
        except DataError:
            # It does not run at this size: what type inference calls open counts as varying.
            varying.update(_open_axes(model, shapes))
            continue
        larger = other if base == 1 and larger is None else larger
        for axis, doubled in _changes(shapes, found):
            (periodic if doubled and base == 1 and shapes[axis[0]][axis[1]] > 1 else varying).add(axis)
    return Probe(shapes, frozenset(varying), frozenset(periodic - varying), feeds, larger)


def _shapes(model: Model, feeds: Feeds) -> dict[Any, Dims]:
    """Shapes by tensor: inferred for these inputs, and measured by a run where inference leaves any of them open."""
    known: dict[str, Dims] = {name: tuple(np.shape(value)) for name, value in feeds.items()}
    tensors = dict.fromkeys(_tensors(model))
    found = _inferred(tensors, concrete_types(model, known=known))
    if len(found) < len(tensors):
        known = concrete_shapes(model, feeds)
        found = _inferred(tensors, concrete_types(model, known=known))
        found.update({t: known[t.name] for t in tensors if t.name in known and not isinstance(t, Constant)})
    return found


def _inferred(tensors: Iterable[Any], types: Shapes) -> dict[Any, Dims]:
    found: dict[Any, Dims] = {}
    for tensor in tensors:
        dims = types[tensor].shape
        if dims is not None and all(isinstance(d, int) for d in dims):
            found[tensor] = tuple(d for d in dims if isinstance(d, int))
    return found


def _tensors(model: Model) -> Iterator[Any]:
    for scope in model.graph.scopes():
        yield from scope.inputs
        yield from scope.initializers
        yield from scope.outputs
        for node in scope.nodes:
            yield from (t for t in (*node.inputs, *node.outputs) if t.name)


def _symbols(session: Any, feeds: Feeds) -> dict[str, int]:
    """Open dimensions of the inputs with the extents that `feeds` give them, named as in `synthesize`."""
    found: dict[str, int] = {}
    for spec in session.inputs:
        for axis, dim in enumerate(spec.shape or ()):
            if not isinstance(dim, int):
                found.setdefault(dim or f"{spec.name}:{axis}", np.shape(feeds[spec.name])[axis])
    return found


def _changes(first: Mapping[Any, Dims], second: Mapping[Any, Dims]) -> Iterator[tuple[tuple[Any, int], bool]]:
    """Axes whose extent differs, and whether it doubled."""
    for tensor, dims in first.items():
        other = second.get(tensor, dims)
        yield from (((tensor, k), e == 2 * d) for k, (d, e) in enumerate(zip(dims, other, strict=False)) if d != e)


def _open_axes(model: Model, shapes: Mapping[Any, Dims]) -> Iterator[tuple[Any, int]]:
    types = infer(model)
    for tensor in shapes:
        for k, dim in enumerate(types[tensor].shape or ()):
            if not isinstance(dim, int):
                yield tensor, k
