"""The weights that can be made sparse, each once however many nodes share it, with what multiplies it.

Conv, ConvTranspose, Gemm and MatMul of all scopes; input and recurrence weights of LSTM, GRU and RNN, whose inputs are
the sequence and the hidden states. A weight whose inputs cannot be observed in rows is still a weight: it is pruned
by magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.gram import Gram
from onnxcomp.graph import Constant, Model, Node
from onnxcomp.passes.dim_recurrent import Recurrent
from onnxcomp.passes.dim_sites import Site, sites

__all__ = ["Operand", "Source", "operands", "rewrite"]

Array = npt.NDArray[Any]
_RECURRENT = ("LSTM", "GRU", "RNN")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", *_RECURRENT)


@dataclass(frozen=True)
class Source:
    """A value whose rows multiply the weight: the name of the value, and how to read rows [groups, rows, K] off it.

    `shift` adds to the biases behind it (float64 [groups, outputs]); None where nothing can take up a mean.
    """

    name: str
    rows: Callable[[Array, int, np.random.Generator], Array]
    shift: Callable[[Model, Array], None] | None


@dataclass(frozen=True)
class Operand:
    """A weight as the matrix [groups, K, outputs per group]; `taps` is the number of kernel positions in K.

    `site` is the only operator that reads it, where it is one of the main graph. `misfit` says why only single
    weights can be chosen, if so.
    """

    constant: Constant
    nodes: tuple[Node, ...]
    shape: tuple[int, int, int]
    taps: int
    read: Callable[[], Array]
    write: Callable[[Array], None]
    sources: tuple[Source, ...] = ()
    site: Site | None = field(default=None, repr=False)
    misfit: str | None = None

    @property
    def key(self) -> str:
        return str(self.constant.name)

    @property
    def label(self) -> str:
        return " and ".join(node.label for node in self.nodes)

    @property
    def size(self) -> int:
        return int(self.constant.weight.size)

    @property
    def centered(self) -> bool:
        """Whether every bias behind it can take up the mean of its input."""
        return all(source.shift is not None for source in self.sources)


def operands(model: Model, refuse: Callable[[str, str], None] = lambda where, why: None) -> list[Operand]:
    """All of the main graph and its subgraphs, in the order of their first readers."""
    scopes = list(model.graph.scopes())
    by_weight: dict[Constant, list[Site]] = {}
    for scope in scopes:
        for site in sites(model, scope):
            by_weight.setdefault(site.view.weight, []).append(site)
    outputs, home = model.outputs(), set(model.graph.nodes)
    found: list[Operand] = []
    for constant in dict.fromkeys(t for scope in scopes for n in scope.nodes for t in n.inputs if _is_weight(t)):
        readers = list(dict.fromkeys(constant.outputs))
        other = next((n for n in readers if n.domain or n.op not in _WEIGHTED), None)
        if other is not None or constant in outputs:
            if any(not n.domain and n.op in _WEIGHTED for n in readers):
                refuse(constant.name, "it is a model output" if other is None else f"{other.op} reads it as well")
            continue
        shared = by_weight.get(constant, [])
        if len(shared) == len(readers) and len({_layout(s) for s in shared}) == 1:
            found.append(_multiplied(constant, shared, alone=shared[0].node in home))
        elif len(readers) == 1 and readers[0].op in _RECURRENT and constant in readers[0].inputs[1:3]:
            found.append(_recurrent(constant, readers[0]))
        else:
            found.append(_plain(constant, readers))
    return found


def _is_weight(tensor: Any) -> bool:
    if not isinstance(tensor, Constant) or tensor.sparse is not None or tensor.dtype.kind != "f":
        return False
    readers = [n for n in tensor.outputs if n.op in _WEIGHTED and not n.domain]
    first = any(tensor in n.inputs[:3] for n in readers if n.op in _RECURRENT)
    return len(tensor.shape) >= 2 and tensor.weight.size > 0 and (first or any(tensor in n.inputs[:2] for n in readers))


def _layout(site: Site) -> tuple[Any, ...]:
    view = site.view
    return view.op, view.transposed, view.groups, view.alpha


# --- kinds ---------------------------------------------------------------------------------------------------


def _multiplied(constant: Constant, shared: Sequence[Site], *, alone: bool) -> Operand:
    first = shared[0]
    view = first.view

    def write(matrix: Array) -> None:
        constant.values = np.ascontiguousarray((first.native(matrix) / view.alpha).astype(constant.dtype))

    shape = (view.groups, first.length, view.outputs // view.groups)
    taps = int(np.prod(first.form.weight.shape[2:])) if first.form.op == "Conv" else 1
    nodes = tuple(s.node for s in shared)
    site = first if alone and len(shared) == 1 else None
    return Operand(constant, nodes, shape, taps, first.matrix, write, tuple(map(_source, shared)), site)


def _source(site: Site) -> Source:
    rank = len(site.view.weight.shape)

    def rows(value: Array, count: int, rng: np.random.Generator) -> Array:
        if site.form.op == "Conv" and value.ndim > rank:  # all iterations of a loop, stacked
            value = value.reshape(-1, *value.shape[-(rank - 1) :])
        return site.patches(value, count, rng)

    def shift(model: Model, values: Array) -> None:
        site.rewrite_bias(model, site.bias() + values.reshape(-1))

    return Source(site.node.inputs[0].name, rows, shift if site.takes_bias else None)


def _recurrent(constant: Constant, node: Node) -> Operand:
    """W [directions, gates * H, inputs] or R [directions, gates * H, H]; the two halves of B are their biases."""
    directions, outputs, length = constant.shape
    product = Recurrent(node, 0, node.inputs.index(constant))

    def write(matrix: Array) -> None:
        constant.values = np.ascontiguousarray(matrix.transpose(0, 2, 1).astype(constant.dtype))

    def shift(model: Model, values: Array) -> None:
        product.rewrite_bias(model, product.bias() + values.reshape(-1))

    sources = (
        (Source(product.source, product.patches, shift if product.takes_bias else None),) if product.source else ()
    )
    return Operand(constant, (node,), (directions, length, outputs), 1, product.matrix, write, sources)


def _plain(constant: Constant, readers: Sequence[Node]) -> Operand:
    """A weight of which only its elements are known."""

    def read() -> Array:
        return constant.values.astype(np.float64).reshape(1, -1, 1)

    def write(matrix: Array) -> None:
        constant.values = matrix.reshape(constant.shape).astype(constant.dtype)

    why = "its input channels are not known here, so that only single weights can go"
    return Operand(constant, tuple(readers), (1, constant.weight.size, 1), 1, read, write, misfit=why)


def rewrite(model: Model, operand: Operand, matrix: Array, grams: Sequence[Gram] = ()) -> None:
    """Write a matrix, and let the biases take up what it changes on the means of the inputs."""
    shift = operand.read() - matrix
    operand.write(matrix)
    if operand.centered:
        for source, gram in zip(operand.sources, grams, strict=False):
            if source.shift is not None:
                source.shift(model, np.einsum("gk,gko->go", gram.mean, shift))
