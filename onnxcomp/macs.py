"""Multiply-accumulate operations of a model, per node.

Counted are products with weights and matrix products: y = sum_k x[k] w[k] costs one MAC per term, at padded
positions too. Biases, activations, normalization, pooling and every other element-wise operator count 0. That
is the convention of fvcore and of published tables; one MAC is two floating-point operations.

Shapes come from inference, with batch dimensions taken as 1, or from one real run (`concrete_shapes`). A
product whose shapes are not known is listed as unknown, never counted as 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.concrete import (
    Dims,
    bind,
    concrete_shapes,
    concrete_types,
    expand_functions,
    open_dimensions,
)
from onnxcomp.errors import DataError, ModelError, OnnxcompError
from onnxcomp.graph import Constant, Function, Graph, Model, Node, Variable, producer
from onnxcomp.mac_rules import RULES, WITHOUT_RULE, Operands, UnknownShape
from onnxcomp.runtime import open_session
from onnxcomp.safety import custom_operators
from onnxcomp.serde import export_model
from onnxcomp.shapes import Shapes
from onnxcomp.synthesis import synthesize

__all__ = ["Dims", "Macs", "Unknown", "concrete_shapes", "concrete_types", "count_macs", "count_with_run"]

Key = tuple[str, str]  # domain and name of an operator or function

_MAX_TRIPS = 1 << 31  # exporters write a larger trip count for a loop that ends by its condition


@dataclass(frozen=True)
class Unknown:
    """A node whose MACs are not known."""

    where: str
    op: str
    reason: str


@dataclass(frozen=True)
class Macs:
    """MACs by node, for those that multiply and run.

    A call of a local function stands for its body; of an If, only nodes of the counted branch are there. With
    `unknown` not empty the total is a lower bound. `notes` says what was assumed.
    """

    nodes: Mapping[Node, int]
    unknown: tuple[Unknown, ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def total(self) -> int:
        return sum(self.nodes.values())

    @property
    def exact(self) -> bool:
        return not self.unknown


def count_macs(
    model: Model,
    shapes: Shapes | None = None,
    *,
    sizes: Mapping[str, int] | None = None,
    known: Mapping[str, Dims] | None = None,
) -> Macs:
    """Count the MACs of one run of the model.

    `shapes` are inferred for concrete inputs if they are not given. `sizes` gives symbolic dimensions by
    name; batch dimensions that it does not name are 1. `known` gives shapes by value name and goes before
    `shapes`: see `concrete_shapes`. Fixed batch dimensions count in full.

    An If counts as its dearest branch (with `known`: as the branch that ran), the body of a Loop or Scan once
    for each iteration if their number is constant, else once with a note. Local functions count at each call.

    Raises ModelError for local functions that cannot be expanded.
    """
    bound = bind(model, sizes or {}, known or {})
    counter = _Counter(model, shapes or concrete_types(model, sizes=sizes, known=known), bound, known or {})
    nodes = counter.scope(model.graph)
    return Macs(nodes, tuple(counter.unknown), tuple(dict.fromkeys(counter.notes)))


def count_with_run(
    model: Model,
    *,
    feeds: Mapping[str, npt.NDArray[Any]] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> tuple[Shapes, Macs]:
    """Types of all values, and MACs: by inference if that is enough, else after one run of the model.

    The run is on `feeds`, or without them on made-up inputs if `sizes` and the batch leave no dimension open.
    With `feeds`, models with branches and loops always run, as their cost depends on it.

    Raises DataError if the model has to run on `feeds` and does not.
    """
    known = {name: tuple(np.shape(value)) for name, value in (feeds or {}).items()}
    shapes = concrete_types(model, sizes=sizes, known=known)
    macs = count_macs(model, shapes, sizes=sizes, known=known)
    if macs.exact and not (feeds is not None and any(node.bodies() for node in model.nodes())):
        return shapes, macs
    if feeds is None and open_dimensions(model, sizes):
        return shapes, macs
    try:
        known = concrete_shapes(model, _made_up(model, sizes or {}) if feeds is None else feeds)
    except OnnxcompError as error:
        # A lower bound is better than nothing, unless the caller's sample is at fault.
        if isinstance(error, DataError) and feeds is not None:
            raise
        return shapes, macs
    shapes = concrete_types(model, sizes=sizes, known=known)
    return shapes, count_macs(model, shapes, sizes=sizes, known=known)


def _made_up(model: Model, sizes: Mapping[str, int]) -> dict[str, npt.NDArray[Any]]:
    session = open_session(model, optimize=False)
    return synthesize(session.inputs, export_model(model)[0], seed=0, count=1, sizes=bind(model, sizes, {}))[
        0
    ]


# --- counting -----------------------------------------------------------------------------------------------


class _Counter:
    """One walk over the scopes that run. Values are looked up by name, as `known` and Shapes do."""

    def __init__(
        self, model: Model, shapes: Shapes, bound: Mapping[str, int], known: Mapping[str, Dims]
    ) -> None:
        self.model, self.shapes, self.bound, self.known = model, shapes, bound, known
        self.functions = {(_domain(f.header.domain), f.header.name): f for f in model.functions}
        self.opaque = set(custom_operators(export_model(model)[0]))
        self.multiplying = _multiplying(self.functions, self.opaque)
        self.unknown: list[Unknown] = []
        self.notes: list[str] = []

    def scope(self, scope: Graph) -> dict[Node, int]:
        counts: dict[Node, int] = {}
        for node in scope.nodes:
            try:
                counts.update(self.node(node))
            except (UnknownShape, ModelError) as error:
                self.unknown.append(Unknown(node.label, node.kind, str(error)))
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                # A rule trusts its operator's definition; a node that breaks it is no reason to fail here.
                reason = f"its inputs or attributes do not fit the operator ({error})"
                self.unknown.append(Unknown(node.label, node.kind, reason))
        return counts

    def node(self, node: Node) -> dict[Node, int]:
        key = (_domain(node.domain), node.op)
        if node.kind in RULES:
            return {node: RULES[node.kind](Operands(node, self.dims))}
        if key in self.functions:
            return self.call(node) if key in self.multiplying else {}
        if node.kind in WITHOUT_RULE or key in self.opaque:
            raise UnknownShape("there is no rule for this operator")
        return self.control(node) if node.bodies() else {}

    def dims(self, tensor: Any) -> Dims:
        """The shape of a value. Raises UnknownShape."""
        if not isinstance(tensor, Constant) and tensor.name in self.known:
            return self.known[tensor.name]
        weight = self.model.weight(tensor)
        if weight is not None:
            return weight.shape
        shape = self.shapes[tensor].shape
        if shape is None:
            raise UnknownShape(f"the shape of {tensor.name!r} is not known")
        dims = [self.bound.get(d, d) if isinstance(d, str) else d for d in shape]
        if not all(isinstance(d, int) for d in dims):
            text = ", ".join("?" if d is None else str(d) for d in dims)
            raise UnknownShape(f"the shape of {tensor.name!r} is open: [{text}]")
        return tuple(d for d in dims if isinstance(d, int))

    def control(self, node: Node) -> dict[Node, int]:
        bodies = node.bodies()
        if node.op == "If":
            ran = [b for b in bodies if any(o.name in self.known for n in b.nodes for o in n.outputs)]
            branches = [self.scope(body) for body in ran or bodies]
            return max(branches, key=lambda counts: sum(counts.values()))
        once = {inner: macs for body in bodies for inner, macs in self.scope(body).items()}
        trips = self.trips(node) if once else 1
        if trips is None:
            self.notes.append(
                f"the body of {node.label!r} counts once: the number of iterations is not constant"
            )
        return {inner: macs * (1 if trips is None else trips) for inner, macs in once.items()}

    def trips(self, node: Node) -> int | None:
        """Iterations of a Loop or Scan, None if not constant."""
        if node.op == "Loop" and node.inputs[0].name and _runs_on(self.model, node):
            count = self.model.value(node.inputs[0])
            return int(count.item()) if count is not None and 0 <= count.item() < _MAX_TRIPS else None
        if node.op == "Scan" and self.model.opset >= 9:
            first = len(node.inputs) - int(node.attrs["num_scan_inputs"])
            axis = int((node.attrs.get("scan_input_axes") or [0])[0])
            try:
                return self.dims(node.inputs[first])[axis]
            except UnknownShape:
                return None
        return None

    def call(self, node: Node) -> dict[Node, int]:
        """Count a call of a local function on a model that consists of this call alone, expanded."""
        found = count_macs(_call_model(self.model, node, self.shapes, self.dims), sizes=self.bound)
        self.unknown.extend(Unknown(f"{node.label}/{u.where}", u.op, u.reason) for u in found.unknown)
        self.notes.extend(found.notes)
        return {node: found.total}


def _runs_on(model: Model, loop: Node) -> bool:
    """Whether nothing but the trip count ends a Loop: its condition is absent or true, and stays so."""
    start = loop.inputs[1] if len(loop.inputs) > 1 else None
    if start is not None and start.name:
        value = model.value(start)
        if value is None or not bool(value.all()):
            return False
    body = loop.bodies()[0]
    condition = body.outputs[0]
    while (source := producer(condition)) is not None and source.op == "Identity":
        condition = source.inputs[0]
    value = model.value(condition)
    return condition is body.inputs[1] or (value is not None and bool(value.all()))


# --- local functions ----------------------------------------------------------------------------------------


def _domain(domain: str | None) -> str:
    return "" if domain in (None, "ai.onnx") else str(domain)


def _multiplying(functions: Mapping[Key, Function], opaque: set[Key]) -> set[Key]:
    """The functions that contain a product, or what may be one, directly or through others."""
    found: set[Key] = set()
    while True:
        new = {
            key
            for key, function in functions.items()
            for scope in function.body.scopes()
            for n in scope.nodes
            if n.kind in RULES or n.kind in WITHOUT_RULE or (_domain(n.domain), n.op) in found | opaque
        }
        if new <= found:
            return found
        found |= new


def _call_model(model: Model, node: Node, shapes: Shapes, dims: Callable[[Any], Dims]) -> Model:
    """A model of one function call, its body in the place of the call. Raises UnknownShape, ModelError."""
    scope, values = Graph("call"), {"": Variable("")}
    for tensor in node.inputs:
        if tensor.name not in values:
            weight = model.weight(tensor)
            if weight is not None:
                values[tensor.name] = Constant(tensor.name, weight)
                continue
            # Of the element type no cost depends; without one there is no shape in the message.
            dtype = shapes[tensor].dtype or np.dtype(np.float32)
            values[tensor.name] = Variable(tensor.name, dtype=dtype, shape=list(dims(tensor)))
            scope.inputs.append(values[tensor.name])
    outputs = [Variable(t.name) for t in node.outputs]
    scope.add(node.op, [values[t.name] for t in node.inputs], outputs, domain=node.domain, attrs=node.attrs)
    scope.outputs = [o for o in outputs if o.name]
    return expand_functions(Model(model.header, scope, model.functions))
