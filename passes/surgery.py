"""Removal of coupled slices: every constant loses them, and what names widths in numbers is rewritten.

All follows from one function, keep(tensor, axis): indices that stay. Constants are taken along it; a repair, one small
function per operator that has them, rewrites attributes and shape constants:

    @repair("Crop", domain="my.domain")
    def crop(cut: Cut, node: Node, twin: Node) -> None:
        twin.attrs["channels"] = cut.extent(node.outputs[0], 1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Constant, Graph, Model, Node, Variable, producer, sort
from onnxcomp.passes.dim_residuals import Residual
from onnxcomp.passes.dims import Coupling
from onnxcomp.provenance import Origin, note

__all__ = ["REPAIRS", "Cut", "Repair", "remove", "repair", "twins"]

Array = npt.NDArray[Any]
Repair = Callable[["Cut", Node, Node], None]
REPAIRS: dict[str, Repair] = {}


def repair(*ops: str, domain: str = "") -> Callable[[Repair], Repair]:
    """Register a function that rewrites a node of these operators; it runs where a slice of the node's tensors goes."""

    def register(function: Repair) -> Repair:
        for op in ops:
            REPAIRS[f"{domain}.{op}" if domain else op] = function
        return function

    return register


class Cut:
    """A removal in progress. Questions are about tensors of `coupling.model`, edits go to its copy `model`."""

    def __init__(self, coupling: Coupling, units: Iterable[int]) -> None:
        self.coupling = coupling
        self.removed = coupling.mask(units)
        self.model = coupling.model.copy()
        self.scope = self.model.graph  # the scope of the node that is being rewritten

    def keep(self, tensor: Any, axis: int) -> Array:
        return self.coupling.keep(tensor, axis, self.removed)

    @property
    def residuals(self) -> list[Residual]:
        """The residual branches that go."""
        return [r for r in self.coupling.residuals if self.removed[r.unit]]

    def extent(self, tensor: Any, axis: int) -> int:
        """Extent of an axis after the removal."""
        return len(self.keep(tensor, axis))

    def changes(self, tensor: Any, axis: int) -> bool:
        return self.extent(tensor, axis) != self.coupling.probe.shapes[tensor][axis]

    def axes(self, tensor: Any) -> list[int]:
        """The axes that lose slices."""
        dims = self.coupling.probe.shapes.get(tensor, ())
        return [k for k in range(len(dims)) if self.changes(tensor, k)]

    def varies(self, tensor: Any, axis: int) -> bool:
        """Whether a larger batch makes the axis longer: see dim_probe."""
        return (tensor, axis) in self.coupling.probe.periodic

    def integers(self, twin: Node, position: int, values: Iterable[int]) -> None:
        """Give an input new integers, as a constant of its own."""
        array = np.asarray(list(values), np.int64)
        constant = self.model.constant(self.scope, f"{twin.outputs[0].name}_kept", array)
        while len(twin.inputs) <= position:
            twin.inputs.append(Variable(""))
        twin.inputs[position] = constant


def remove(coupling: Coupling, units: Iterable[int]) -> Cut:
    """A copy of the coupled model without these units; the result's `model` is sorted and complete.

    Nodes of removed branches stay in it, dead, so that the result's nodes are those of the original.
    """
    import onnxcomp.passes.dim_shape_repairs  # noqa: F401  (registers its repairs)

    cut = Cut(coupling, units)
    pairs = list(_scope_pairs(coupling.model, cut.model))
    touched: dict[int, bool] = {}

    def loses(tensor: Any) -> bool:
        if id(tensor) not in touched:
            touched[id(tensor)] = bool(cut.axes(tensor))
        return touched[id(tensor)]

    narrowed: dict[str, Origin] = {}
    all_twins = twins(coupling.model, cut.model)
    for residual in cut.residuals:
        total = producer(all_twins[residual.total.outputs[0]])
        assert total is not None  # a copy has the same nodes
        total.op, total.inputs = "Identity", [all_twins[residual.stays]]
    for tensor, twin in all_twins.items():
        if not loses(tensor):
            continue
        if isinstance(tensor, Constant):
            twin.values = _taken(cut, tensor)
        elif twin not in cut.model.graph.inputs:
            twin.info, twin.shape = None, None
            narrowed[twin.name] = _origin(cut, tensor)
    note(cut.model, narrowed)
    for scope, copy in pairs:
        cut.scope = copy
        del copy.header.value_info[:]
        for node, twin in zip(list(scope.nodes), list(copy.nodes), strict=True):
            if node.kind in REPAIRS and any(loses(t) for t in (*node.inputs, *node.outputs) if t.name):
                REPAIRS[node.kind](cut, node, twin)
    sort(cut.model)
    return cut


def _origin(cut: Cut, tensor: Any) -> Origin:
    """What is left of a value; nothing that can be said where an axis grows with the batch."""
    axes = cut.axes(tensor)
    if any(cut.varies(tensor, axis) for axis in axes):
        return Origin("")
    return Origin(tensor.name, tuple((axis, tuple(cut.keep(tensor, axis).tolist())) for axis in axes))


def _taken(cut: Cut, tensor: Constant) -> Array:
    values = tensor.values
    for axis in cut.axes(tensor):
        values = np.take(values, cut.keep(tensor, axis), axis=axis)
    return values


def twins(model: Model, copy: Model) -> dict[Any, Any]:
    """Each tensor of a model with its counterpart in a copy whose nodes are the same."""
    found: dict[Any, Any] = {}
    for scope, other in _scope_pairs(model, copy):
        for tensors, others in ((scope.inputs, other.inputs), (scope.outputs, other.outputs)):
            found.update(zip(tensors, others, strict=True))
        for node, twin in zip(scope.nodes, other.nodes, strict=True):
            found.update(zip(node.inputs, twin.inputs, strict=True))
            found.update(zip(node.outputs, twin.outputs, strict=True))
    return {tensor: twin for tensor, twin in found.items() if tensor.name}


def _scope_pairs(model: Model, copy: Model) -> Iterator[tuple[Graph, Graph]]:
    yield from zip(list(model.graph.scopes()), list(copy.graph.scopes()), strict=True)


# --- repairs ------------------------------------------------------------------------------------------------


@repair("Conv", "ConvTranspose", "ConvInteger")
def _groups(cut: Cut, node: Node, twin: Node) -> None:
    """The width of a group of the weight stays or shrinks; whatever it is, the input is made of such groups."""
    groups = int(node.attrs.get("group", 1))
    x, w = node.inputs[0], node.inputs[1]
    if groups == 1:
        return
    if node.op == "ConvTranspose":
        width = cut.coupling.probe.shapes[w][0] // groups
    else:
        width = cut.extent(w, 1)
    twin.attrs["group"] = cut.extent(x, 1) // width


repair("FusedConv", domain="com.microsoft")(_groups)


@repair("GroupNormalization")
def _group_norm(cut: Cut, node: Node, twin: Node) -> None:
    x = node.inputs[0]
    per_group = cut.coupling.probe.shapes[x][1] // int(node.attrs["num_groups"])
    twin.attrs["num_groups"] = cut.extent(x, 1) // per_group


@repair("LSTM", "GRU", "RNN")
def _hidden_size(cut: Cut, node: Node, twin: Node) -> None:
    twin.attrs["hidden_size"] = cut.extent(node.inputs[2], 2)


@repair("Attention", "MultiHeadAttention", domain="com.microsoft")
def _heads(cut: Cut, node: Node, twin: Node) -> None:
    y = node.outputs[0]
    size = cut.coupling.probe.shapes[y][2] // int(node.attrs["num_heads"])
    twin.attrs["num_heads"] = cut.extent(y, 2) // size
    if "qkv_hidden_sizes" in twin.attrs:
        twin.attrs["qkv_hidden_sizes"] = [cut.extent(y, 2)] * 3
    if node.op == "Attention" and "scale" not in twin.attrs:
        twin.attrs["scale"] = float(size**-0.5)


@repair("Split")
def _split(cut: Cut, node: Node, twin: Node) -> None:
    axis = int(node.attrs.get("axis", 0))
    sizes = [cut.extent(y, axis) for y in node.outputs]
    twin.attrs.pop("num_outputs", None)
    if cut.model.opset < 13:
        twin.attrs["split"] = sizes
    else:
        cut.integers(twin, 1, sizes)


@repair("Gather")
def _gather(cut: Cut, node: Node, twin: Node) -> None:
    x, indices, y = node.inputs[0], node.inputs[1], node.outputs[0]
    axis = int(node.attrs.get("axis", 0)) % len(cut.coupling.probe.shapes[x])
    chosen = cut.coupling.model.value(indices)
    if chosen is not None and chosen.ndim == 1 and (cut.changes(x, axis) or cut.changes(y, axis)):
        chosen = chosen % cut.coupling.probe.shapes[x][axis]
        cut.integers(twin, 1, np.searchsorted(cut.keep(x, axis), chosen[cut.keep(y, axis)]).tolist())


@repair("Pad")
def _pad(cut: Cut, node: Node, twin: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    rank = len(cut.coupling.probe.shapes[x])
    old = node.attrs["pads"] if "pads" in node.attrs else cut.coupling.model.value(node.inputs[1])
    pads = [int(p) for p in np.asarray(old)]
    axes = list(range(rank))
    if len(node.inputs) > 3 and node.inputs[3].name:
        axes = [int(a) % rank for a in np.asarray(cut.coupling.model.value(node.inputs[3])).reshape(-1)]
    for place, axis in enumerate(axes):
        begin, kept = pads[place], cut.keep(y, axis)
        if cut.changes(y, axis) and (begin > 0 or pads[place + len(axes)] > 0):
            end = begin + cut.coupling.probe.shapes[x][axis]
            pads[place] = int(np.count_nonzero(kept < begin))
            pads[place + len(axes)] = int(np.count_nonzero(kept >= end))
    if "pads" in node.attrs:
        twin.attrs["pads"] = pads
    else:
        cut.integers(twin, 1, pads)
