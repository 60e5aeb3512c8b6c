"""Coupling rules of normalization, reductions, operators that let slices compete, and quantization."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxcomp.graph import Node
from onnxcomp.passes.dim_atoms import SPATIAL, Atoms, rule

__all__: list[str] = []


@rule("BatchNormalization", "InstanceNormalization")
def _channel_norm(atoms: Atoms, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    atoms.same_axes(x, y)
    for parameter in node.inputs[1:]:
        atoms.same(parameter, 0, y, 1)
    for extra in node.outputs[1:]:
        atoms.pin(extra, why="statistics of a training step")


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def _layer_norm(atoms: Atoms, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    axis = int(node.attrs.get("axis", -1)) % atoms.rank(x)
    atoms.same_axes(x, y)
    for k in range(axis, atoms.rank(x)):
        atoms.averaged(x, k)
    atoms.broadcast(node.inputs[1:3], y)
    for extra in node.outputs[1:]:
        if extra.name:
            atoms.same_axes(x, extra, but=range(axis, atoms.rank(x)))


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain="com.microsoft")
def _skip_layer_norm(atoms: Atoms, node: Node) -> None:
    y = node.outputs[0]
    atoms.broadcast(node.inputs, y)
    atoms.averaged(node.inputs[0], -1)
    if len(node.outputs) > 3 and node.outputs[3].name:
        atoms.same_axes(node.outputs[3], y)


@rule("GroupNormalization")
def _group_norm(atoms: Atoms, node: Node) -> None:
    """Whole groups go; a channel fewer in a group would change the statistics of the others."""
    x, y = node.inputs[0], node.outputs[0]
    groups, channels = int(node.attrs["num_groups"]), atoms.shape(x)[1]
    group = np.arange(channels) // (channels // groups)
    atoms.same_axes(x, y)
    atoms.join(atoms.at(x, 1), atoms.at(x, 1, group * (channels // groups)))
    for parameter in node.inputs[1:3]:
        per_channel = atoms.shape(parameter)[0] == channels
        atoms.join(atoms.at(x, 1), atoms.at(parameter, 0) if per_channel else atoms.at(parameter, 0, group))


@rule("LpNormalization")
def _lp_norm(atoms: Atoms, node: Node) -> None:
    atoms.same_axes(node.inputs[0], node.outputs[0])
    atoms.averaged(node.inputs[0], int(node.attrs.get("axis", -1)))


@rule("MeanVarianceNormalization")
def _mean_variance(atoms: Atoms, node: Node) -> None:
    atoms.same_axes(node.inputs[0], node.outputs[0])
    for k in node.attrs.get("axes", [0, 2, 3]):
        atoms.averaged(node.inputs[0], int(k))


@rule("LRN")
def _lrn(atoms: Atoms, node: Node) -> None:
    """Each channel is scaled by its neighbours, which removal brings closer."""
    atoms.same_axes(node.inputs[0], node.outputs[0])
    atoms.averaged(node.inputs[0], 1)


# --- reductions and competition -----------------------------------------------------------------------------


@rule(
    *(f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"))
)
def _reduce(atoms: Atoms, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    given = atoms.integers(node, 1, "axes")
    if given is None and len(node.inputs) > 1 and node.inputs[1].name:
        return atoms.pin_node(node, "it reduces axes that are not constant")
    keep = int(node.attrs.get("keepdims", 1))
    everything = given is None and not int(node.attrs.get("noop_with_empty_axes", 0))
    axes = set(range(atoms.rank(x))) if everything else {k % atoms.rank(x) for k in given or ()}
    out = 0
    for k in range(atoms.rank(x)):
        if k in axes:
            out += keep
            _reduced(atoms, node, x, k)
        else:
            atoms.same(x, k, y, out)
            out += 1
    return None


def _reduced(atoms: Atoms, node: Node, x: Any, axis: int) -> None:
    if node.op in ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"):
        atoms.summed(x, axis)
    else:
        atoms.averaged(x, axis)


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "MaxPool", "AveragePool", "LpPool")
def _pool(atoms: Atoms, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    for k in (0, 1):
        atoms.same(x, k, y, k)
    for k in range(2, atoms.rank(x)):
        atoms.pin(x, k, why=SPATIAL)
        atoms.pin(y, k, why=SPATIAL)
    for indices in node.outputs[1:]:
        atoms.pin(indices, why="indices of the largest elements")


@rule("Softmax", "LogSoftmax", "Hardmax")
def _softmax(atoms: Atoms, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    new = atoms.opset >= 13
    axis = int(node.attrs.get("axis", -1 if new else 1)) % atoms.rank(x)
    atoms.same_axes(x, y)
    for k in [axis] if new else range(axis, atoms.rank(x)):
        atoms.pin(x, k, why=f"{node.op} lets the slices compete")


@rule("ArgMax", "ArgMin", "TopK", "CumSum", "CumProd")
def _ordered(atoms: Atoms, node: Node) -> None:
    """Positions along the axis have a meaning."""
    x = node.inputs[0]
    axis = (
        atoms.integers(node, 1)
        if node.op.startswith("Cum")
        else [int(node.attrs.get("axis", 0 if "Arg" in node.op else -1))]
    )
    if axis is None:
        return atoms.pin_node(node, "its axis is not constant")
    axis = [axis[0] % atoms.rank(x)]
    atoms.pin(x, axis[0], why=f"the order along the axis matters to {node.op}")
    for y in node.outputs:
        if y.name and atoms.rank(y) == atoms.rank(x):
            atoms.same_axes(x, y, but=axis)
            atoms.pin(y, axis[0], why=f"the order along the axis matters to {node.op}")
        elif y.name:
            for k in range(atoms.rank(x)):
                if k != axis[0]:
                    atoms.same(x, k, y, k - (k > axis[0]))
    return None


# --- quantization -------------------------------------------------------------------------------------------


@rule("QuantizeLinear", "DequantizeLinear")
def _quantize(atoms: Atoms, node: Node) -> None:
    x, y = node.inputs[0], node.outputs[0]
    atoms.same_axes(x, y)
    axis = int(node.attrs.get("axis", 1))
    for parameter in node.inputs[1:3]:
        if not parameter.name or atoms.rank(parameter) == 0 or atoms.shape(parameter) == (1,):
            continue
        if atoms.rank(parameter) == 1:
            atoms.same(parameter, 0, x, axis)
        else:
            atoms.pin(parameter, why="scales of blocks")
            atoms.same_axes(parameter, x)
