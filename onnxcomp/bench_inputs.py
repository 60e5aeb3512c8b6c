"""Inputs for a benchmark: of the data given, or made up in the shapes and batch sizes asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from onnxcomp.calibration.data import open_data
from onnxcomp.errors import DataError, InconclusiveError, UsageError
from onnxcomp.registry import suggest
from onnxcomp.synthesis import usable_inputs

if TYPE_CHECKING:
    import onnx

    from onnxcomp.runtime import Session, TensorSpec

__all__ = ["Shapes", "data_feeds", "made_feeds", "parse_shapes", "require_same_inputs"]

Shapes = Mapping[str, Sequence[int]]
Feeds = Sequence[Mapping[str, npt.NDArray[Any]]]

_BATCHES = 4  # of data
_MADE = 2


def parse_shapes(given: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by input from a mapping, or from texts such as "input=1x3x224x224" (several in one text with commas).

    A shape without a name, which a model with one input does not need, goes under "". Raises UsageError.
    """
    if isinstance(given, Mapping):
        return {str(name): _sizes(list(sizes), f"{name}={list(sizes)}") for name, sizes in given.items()}
    texts = [given] if isinstance(given, str) else list(given or ())
    found: dict[str, tuple[int, ...]] = {}
    for text in itertools.chain.from_iterable(str(t).split(",") for t in texts):
        name, _, sizes = text.rpartition("=")
        found[name.strip()] = _sizes(sizes.lower().split("x") if sizes.strip() else [], text)
    return found


def data_feeds(
    data: Any, session: Session, *, preprocess: Any, batch: int | None, seed: int
) -> Feeds:
    """The first batches of `data` (any form of `open_data`)."""
    dataset = open_data(data, session.inputs, preprocess=preprocess, batch=batch or 1, seed=seed)
    feeds = [b.feeds for b in itertools.islice(dataset.batches(), _BATCHES)]
    sizes = {len(value) for spec in session.inputs[:1] for value in (f[spec.name] for f in feeds[:1])}
    if batch is not None and sizes and sizes != {batch}:
        raise UsageError(f"batch is {batch}, but the model or the data make it {sizes.pop()}")
    return feeds


def made_feeds(
    session: Session, proto: onnx.ModelProto | None, *, shapes: Shapes, batch: int | None, seed: int
) -> Feeds:
    """Two feeds made from the graph, with `shapes` and `batch` where the model leaves them open.

    Raises UsageError where it does not, and DataError if the model does not run with them.
    """
    wanted = with_batch(with_shapes(session.inputs, shapes), batch)
    before, session.inputs = session.inputs, wanted
    try:
        return usable_inputs(session, proto, seed=seed, count=_MADE)
    except InconclusiveError as error:
        if not shapes and batch is None:
            raise
        asked = ", ".join(f"{spec.name} {list(spec.shape or ())}" for spec in wanted)
        raise DataError(f"the model does not run on the inputs asked for ({asked}): {error}") from error
    finally:
        session.inputs = before


def with_shapes(specs: Iterable[TensorSpec], shapes: Shapes) -> tuple[TensorSpec, ...]:
    """The inputs with sizes in place of open dimensions, also where other inputs share their symbols.

    Raises UsageError for an unknown input, another rank, or a dimension that is fixed to another size.
    """
    known = {spec.name: spec for spec in specs}
    if "" in shapes and len(known) == 1:
        shapes = {next(iter(known)): shapes[""]}
    symbols: dict[str, int] = {}
    fixed: dict[str, tuple[int, ...]] = {}
    for name, sizes in shapes.items():
        if name not in known:
            raise UsageError(
                f"--shape names input {name!r}, which the model does not have{suggest(name, known)}; "
                f"its inputs are {', '.join(known)}"
            )
        dims = known[name].shape
        if dims is not None and (
            len(dims) != len(sizes)
            or any(isinstance(d, int) and d != n for d, n in zip(dims, sizes, strict=True))
        ):
            raise UsageError(f"--shape gives {name!r} the shape {list(sizes)}, but the model has {list(dims)}")
        fixed[name] = tuple(sizes)
        symbols.update({d: n for d, n in zip(dims or (), sizes, strict=False) if isinstance(d, str)})
    return tuple(
        replace(spec, shape=fixed[name])
        if name in fixed
        else replace(spec, shape=spec.shape and tuple(_known(d, symbols) for d in spec.shape))
        for name, spec in known.items()
    )


def with_batch(specs: Sequence[TensorSpec], batch: int | None) -> tuple[TensorSpec, ...]:
    """The inputs with a batch of `batch`: the open dimension on axis 0, and its symbol wherever else it stands.

    Raises UsageError where the model fixes another size.
    """
    if batch is None:
        return tuple(specs)
    leading = [spec.shape[0] for spec in specs if spec.shape]
    symbols = {d: batch for d in leading if isinstance(d, str)}
    if all(isinstance(d, int) for d in leading) and batch not in leading:
        shown = ", ".join(f"{spec.name} {list(spec.shape or ())}" for spec in specs)
        if not specs:
            raise UsageError(f"batch is {batch}, but the model has no inputs")
        raise UsageError(f"batch is {batch}, but the model fixes its inputs: {shown}")
    made = []
    for spec in specs:
        dims = tuple(_known(d, symbols) for d in spec.shape or ())
        if dims and dims[0] is None:
            dims = (batch, *dims[1:])
        made.append(replace(spec, shape=dims if spec.shape is not None else None))
    return tuple(made)


def require_same_inputs(models: Sequence[tuple[str, onnx.ModelProto]]) -> None:
    """Raises DataError where a model (label, graph) takes other inputs, by name or type, than the first."""
    (first, proto), *others = models
    wanted = _inputs(proto)
    for label, other in others:
        found = _inputs(other)
        if found != wanted:
            raise DataError(
                f"{label} takes {_listed(found)}, but {first} takes {_listed(wanted)}; models that are timed together "
                "need inputs of the same names and types"
            )


def _inputs(proto: onnx.ModelProto) -> dict[str, str]:
    """Element type by name of the inputs that have to be fed."""
    from onnx import TensorProto

    initializers = {t.name for t in proto.graph.initializer}
    return {
        value.name: TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
        for value in proto.graph.input
        if value.name not in initializers
    }


def _listed(inputs: Mapping[str, str]) -> str:
    return ", ".join(f"{name!r} ({kind})" for name, kind in inputs.items()) or "no inputs"


def _known(dim: int | str | None, symbols: Mapping[str, int]) -> int | str | None:
    return symbols.get(dim, dim) if isinstance(dim, str) else dim


def _sizes(given: Sequence[Any], text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(n) for n in given)
    except (TypeError, ValueError):
        sizes = (-1,)
    if any(n < 0 for n in sizes):
        raise UsageError(f"--shape {text!r} is not NAME=SIZExSIZE..., such as input=1x3x224x224")
    return sizes
