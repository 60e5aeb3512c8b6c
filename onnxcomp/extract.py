"""A part of a model as a model of its own: the nodes between given values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxcomp.errors import ModelError
from onnxcomp.graph import Constant, Model, Node, Variable, producer

__all__ = ["Given", "extract"]

Given = tuple[np.dtype[Any], Sequence[int | None]]  # element type and shape of a value, None for any size


def extract(model: Model, inputs: Mapping[str, Given], outputs: Sequence[str]) -> tuple[Model, list[str]]:
    """A copy that computes the values `outputs` of the main graph from the values `inputs`, and from inputs of the
    model where these are not enough.

    Inputs that nothing reads are left out. A value may be both: what is computed for it is then an output under another
    name. The names of the outputs, in order, come second.

    Raises ModelError if there is no such value.
    """
    copy = model.copy()
    graph = copy.graph
    values = {t.name: t for node in graph.nodes for t in node.outputs if t.name}
    values |= {t.name: t for t in graph.inputs}
    if missing := [name for name in (*inputs, *outputs) if name not in values]:
        raise ModelError(f"the main graph of the model computes no value {missing[0]!r}")
    wanted = [values[name] for name in outputs]
    given = [_cut(copy, values[name], kind, wanted) for name, kind in inputs.items()]
    graph.outputs = wanted
    live = _needed(wanted)
    graph.remove([n for n in graph.nodes if n not in live])
    read = {t for node in graph.nodes for t in node.reads()} | set(wanted)
    graph.inputs = [t for t in dict.fromkeys([*graph.inputs, *given]) if t in read]
    graph.initializers = [t for t in graph.initializers if t in read]
    del graph.header.value_info[:]
    del graph.header.quantization_annotation[:]
    return copy, [t.name for t in wanted]


def _cut(model: Model, tensor: Any, kind: Given, wanted: Sequence[Any]) -> Any:
    """A new input that everyone reads in place of `tensor`, under its name."""
    if isinstance(tensor, Constant):
        raise ModelError(f"{tensor.name!r} is a constant, which cannot be an input")
    name = tensor.name
    if producer(tensor) is None:
        return tensor
    if tensor in wanted:
        tensor.name = model.fresh(f"{name}/computed")
        tensor.info = None
    new = Variable(name, dtype=kind[0], shape=list(kind[1]))
    model.redirect(tensor, new)
    return new


def _needed(wanted: Sequence[Any]) -> set[Node]:
    stack = [p for t in wanted if (p := producer(t)) is not None]
    live: set[Node] = set()
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack.extend(p for t in node.reads() for p in t.inputs)
    return live
