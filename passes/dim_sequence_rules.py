"""Coupling rules of recurrent operators, fused attention, and control flow."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxcomp.graph import Node
from onnxcomp.passes.dim_atoms import Atoms, UnknownDims, rule

__all__ = ["GATES"]

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_DIRECTIONS = "the axis of directions"


@rule("LSTM", "GRU", "RNN")
def _recurrent(atoms: Atoms, node: Node) -> None:
    """Hidden unit u: row u of every gate in W, R and B, column u of R, channel u of states and outputs."""
    x, w, r = node.inputs[:3]
    gates, hidden = GATES[str(node.op)], atoms.shape(r)[2]
    batch_first = bool(node.attrs.get("layout", 0))
    atoms.same(x, 2, w, 2)
    atoms.pin(x, 1 if batch_first else 0, why="the steps of a recurrence")
    atoms.summed(w, 2)
    atoms.summed(r, 2)
    unit = np.arange(gates * hidden) % hidden
    for tensor, count in ((w, gates), (r, gates), (_input(node, 3), 2 * gates), (_input(node, 7), 3)):
        if tensor is not None:  # weights, bias, peepholes: [directions, count * hidden, ...]
            atoms.pin(tensor, 0, why=_DIRECTIONS)
            atoms.join(atoms.at(tensor, 1), atoms.at(r, 2, np.resize(unit, count * hidden)))
    states = [t for t in (_input(node, 5), _input(node, 6), *node.outputs[1:]) if t is not None and t.name]
    for state in states:
        atoms.pin(state, 1 if batch_first else 0, why=_DIRECTIONS)
        atoms.same(state, 0 if batch_first else 1, x, 0 if batch_first else 1)
        atoms.same(state, 2, r, 2)
    y = node.outputs[0]
    if y.name:
        atoms.pin(y, 2 if batch_first else 1, why=_DIRECTIONS)
        atoms.same(y, 0, x, 0)
        atoms.same(y, 1 if batch_first else 2, x, 1)
        atoms.same(y, 3, r, 2)


def _input(node: Node, position: int) -> Any:
    tensor = node.inputs[position] if position < len(node.inputs) else None
    return tensor if tensor is not None and tensor.name else None


# --- attention ----------------------------------------------------------------------------------------------


@rule("Attention", domain="com.microsoft")
def _packed_attention(atoms: Atoms, node: Node) -> None:
    """A head: the same block of columns in each third of the packed weight, and of the output."""
    x, w, y = node.inputs[0], node.inputs[1], node.outputs[0]
    atoms.same(x, 2, w, 0)
    atoms.summed(w, 0)
    extras = [t for t in (*node.inputs[3:], *node.outputs[1:]) if t.name]
    hidden = atoms.shape(y)[2]
    if atoms.shape(w)[1] != 3 * hidden or any(atoms.rank(t) > 2 for t in extras):
        atoms.pin(w, 1, why="attention with a cache or unequal heads")
        return atoms.pin(y, why="attention with a cache or unequal heads")
    atoms.same(x, 0, y, 0)
    atoms.same(x, 1, y, 1)
    for extra in extras:
        atoms.pin(extra, why="positions of the attention")
    first = _first_of_head(hidden, int(node.attrs["num_heads"]))
    for tensor, axis in ((w, 1), (_input(node, 2), 0), (y, 2)):
        if tensor is not None:
            atoms.join(atoms.at(tensor, axis), atoms.at(y, 2, np.resize(first, atoms.shape(tensor)[axis])))
    return None


@rule("MultiHeadAttention", domain="com.microsoft")
def _multi_head(atoms: Atoms, node: Node) -> None:
    query, y = node.inputs[0], node.outputs[0]
    key, value = _input(node, 1), _input(node, 2)
    extras = [t for t in (*node.inputs[4:], *node.outputs[1:]) if t.name]
    if key is None or value is None or any(atoms.rank(t) != 3 for t in (query, key, value)) or extras:
        return atoms.pin_node(node, "attention with a mask, a cache or packed inputs")
    heads = int(node.attrs["num_heads"])
    first = _first_of_head(atoms.shape(y)[2], heads)
    for tensor in (query, key, value, y):
        width = atoms.shape(tensor)[2] // heads
        atoms.join(atoms.at(tensor, 2), atoms.at(y, 2, first[:: len(first) // heads].repeat(width)))
    for tensor in (query, key, value):
        atoms.same(tensor, 0, y, 0)
    atoms.same(query, 1, y, 1)
    atoms.same(key, 1, value, 1)
    atoms.pin(key, 1, why="positions of the attention")
    bias = _input(node, 3)
    if bias is not None:
        parts = np.concatenate([atoms.at(tensor, 2) for tensor in (query, key, value)])
        atoms.join(atoms.at(bias, 0), parts)
    return None


@rule("Attention")
def _attention(atoms: Atoms, node: Node) -> None:
    """Standard operator, inputs [batch, heads, positions, size]: heads, and the size of the values' heads."""
    query, key, value = node.inputs[:3]
    y = node.outputs[0]
    extras = [t for t in (*node.inputs[3:], *node.outputs[1:]) if t.name]
    equal = {atoms.shape(t)[1] for t in (query, key, value)}
    if atoms.rank(query) != 4 or len(equal) > 1 or any(atoms.rank(t) > 2 for t in extras):
        return atoms.pin_node(node, "attention with packed heads, a cache or unequal heads")
    for tensor in (query, key, value):
        atoms.same(tensor, 0, y, 0)
        atoms.same(tensor, 1, y, 1)
        atoms.pin(tensor, 2, why="positions of the attention")
    atoms.pin(query, 3, why="the size of a head scales the scores")
    atoms.pin(key, 3, why="the size of a head scales the scores")
    atoms.same(query, 2, y, 2)
    atoms.same(value, 3, y, 3)
    for extra in extras:
        atoms.pin(extra, why="positions of the attention")
    return None


def _first_of_head(hidden: int, heads: int) -> Any:
    size = hidden // heads
    return np.arange(hidden) // size * size


# --- control flow -------------------------------------------------------------------------------------------


@rule("If")
def _if(atoms: Atoms, node: Node) -> None:
    for body in node.bodies():
        for inner, outer in zip(body.outputs, node.outputs, strict=True):
            _alias(atoms, inner, outer)


@rule("Loop")
def _loop(atoms: Atoms, node: Node) -> None:
    """Carried values: input of the node, input and output of the body, output of the node are one."""
    body = node.bodies()[0]
    carried = len(node.inputs) - 2
    for inner in (*body.inputs[:2], body.outputs[0]):
        atoms.pin(inner, why="it controls a loop")
    for k in range(carried):
        _alias(atoms, body.inputs[2 + k], node.inputs[2 + k])
        _alias(atoms, body.outputs[1 + k], node.inputs[2 + k])
        _alias(atoms, node.outputs[k], node.inputs[2 + k])
    for inner, outer in zip(body.outputs[1 + carried :], node.outputs[carried:], strict=True):
        _stacked(atoms, inner, outer, 0)


@rule("Scan")
def _scan(atoms: Atoms, node: Node) -> None:
    body, scanned = node.bodies()[0], int(node.attrs["num_scan_inputs"])
    carried = len(node.inputs) - scanned
    if atoms.opset < 9:
        return atoms.pin_node(node, "Scan with a batch axis")
    for k in range(carried):
        _alias(atoms, body.inputs[k], node.inputs[k])
        _alias(atoms, body.outputs[k], node.inputs[k])
        _alias(atoms, node.outputs[k], node.inputs[k])
    axes = node.attrs.get("scan_input_axes") or [0] * scanned
    for inner, outer, axis in zip(body.inputs[carried:], node.inputs[carried:], axes, strict=True):
        _stacked(atoms, inner, outer, int(axis))
    axes = node.attrs.get("scan_output_axes") or [0] * (len(node.outputs) - carried)
    for inner, outer, axis in zip(body.outputs[carried:], node.outputs[carried:], axes, strict=True):
        _stacked(atoms, inner, outer, int(axis))
    return None


def _alias(atoms: Atoms, inner: Any, outer: Any) -> None:
    """Two names of one value. Where a shape is not known (a branch that did not run), the other is pinned."""
    if not outer.name:
        return atoms.pin(inner, why="its shape outside of the subgraph is not known")
    try:
        if atoms.rank(inner) != atoms.rank(outer):
            raise UnknownDims("the rank changes")
        return atoms.same_axes(inner, outer)
    except UnknownDims:
        for tensor in (inner, outer):
            atoms.pin(tensor, why="it crosses into a subgraph with an unknown shape")
    return None


def _stacked(atoms: Atoms, inner: Any, outer: Any, axis: int) -> None:
    """`outer` holds one `inner` per iteration along `axis`."""
    if not outer.name:
        return
    axis %= atoms.rank(outer)
    atoms.pin(outer, axis, why="one slice for each iteration")
    for k in range(atoms.rank(inner)):
        atoms.same(inner, k, outer, k + (k >= axis))
