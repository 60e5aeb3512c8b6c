"""fuse: fold what follows or precedes a weighted operator into its weight. Same function up to rounding.

Batch normalization at inference is y = s x + t per channel with s = gamma / sqrt(var + epsilon), t = beta - s mean.
After a weighted operator with output channel c:

    W'[c] = s[c] W[c]        b'[c] = s[c] b[c] + t[c]

and before one, with input channel k (no padding, or t = 0):

    W'[., k] = s[k] W[., k]  b' = b + sum_k W[., k] t[k]

Mul, Div, Add and Sub with a constant per channel are the same with s or t alone. Everything is computed in float64 and
rounded once. Zero padding moves into the Conv behind it, and MatMul + Add of a matrix becomes Gemm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Constant, Graph, Model, Node, producer, sort
from onnxcomp.linear import LINEAR_OPS, Linear, linear, output_rank, per_channel
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.passes.activations import fuse_hard_sigmoid
from onnxcomp.passes.dead import remove_dead
from onnxcomp.passes.pairs import absorb_output, fuse_padding, matmul_to_gemm, relu_into_clip
from onnxcomp.shapes import Shapes

__all__ = ["Fuse"]

Array = npt.NDArray[Any]
_ARITHMETIC = ("Mul", "Div", "Add", "Sub")
_SHARED_LIMIT = 1 << 16  # bytes: a larger weight that others use as well is not copied for the sake of one node
_MAX_ROUNDS = 16


@dataclass(frozen=True)
class Fuse(Pass):
    """Fold batch normalization, arithmetic with constants, and padding into weighted operators."""

    name: ClassVar[str] = "fuse"
    effect: ClassVar[Effect] = "float"

    def run(self, model: Model, ctx: Context) -> Mapping[str, Any]:
        counts = {"after": 0, "before": 0, "padding": 0, "gemm": 0, "clip": 0, "hard sigmoid": 0}
        _lift_constants(model)
        shapes = ctx.shapes(model)  # what follows changes weights, not values
        for _ in range(_MAX_ROUNDS):
            step = dict.fromkeys(counts, 0)
            for scope in [scope for scope, opset in model.versions() if opset == model.opset]:
                step["hard sigmoid"] += fuse_hard_sigmoid(model, scope, shapes, ctx)  # before its Add goes elsewhere
                step["after"] += _fuse_following(model, scope, shapes, ctx)
                step["before"] += _fuse_preceding(model, scope, shapes, ctx)
                step["padding"] += fuse_padding(model, scope, shapes, ctx)
                step["gemm"] += matmul_to_gemm(model, scope, shapes, ctx)
                step["clip"] += relu_into_clip(model, scope, ctx)
            for key, count in step.items():
                counts[key] += count
            if not any(step.values()):
                break
            sort(model)
            remove_dead(model, ctx)
        return {key: count for key, count in counts.items() if count}


def _lift_constants(model: Model) -> None:
    """Constant nodes beside weighted operators of functions become initializers; the file gets Constant nodes again."""
    for body in [function.body for function in model.functions]:
        if not any(node.kind in LINEAR_OPS for node in body.nodes):
            continue
        lifted = []
        for node in body.nodes:
            weight = model.weight(node.outputs[0]) if node.kind == "Constant" else None
            if weight is not None and not any(o is node.outputs[0] for o in body.outputs):
                constant = Constant(node.outputs[0].name, weight)
                body.initializers.append(constant)
                model.redirect(node.outputs[0], constant)
                lifted.append(node)
        body.remove(lifted)


# --- y = s x + t -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Affine:
    """A node as y = scale * x + shift per channel; `source` is x."""

    source: Any
    scale: Array
    shift: Array


def _affine(model: Model, node: Node, rank: int | None, axis: int, channels: int) -> _Affine | str | None:
    """The node as an affine map of one operand; a reason where it nearly is one; None where it is something else."""
    if not node.plain:
        return None
    if node.kind == "BatchNormalization":
        # Its channels are those of axis 1, whatever the weighted operator's are.
        return _batch_norm(model, node, channels) if rank is not None and axis == 1 - rank else None
    if node.kind not in _ARITHMETIC or (model.opset < 7 and "axis" in node.attrs):
        return None
    a, b = node.inputs
    constant, source = (b, a) if isinstance(b, Constant) else (a, b)
    if not isinstance(constant, Constant) or (node.op == "Div" and constant is a):
        return None
    values = per_channel(constant.values, rank, axis, channels)
    if values is None:
        return f"the constant operand of {node.label} is not one value per channel"
    one, zero = np.ones(channels), np.zeros(channels)
    if node.op == "Mul":
        return _Affine(source, values, zero)
    if node.op == "Div":
        return _Affine(source, 1 / values, zero) if values.all() else "it divides by zero"
    if node.op == "Add":
        return _Affine(source, one, values)
    return _Affine(source, one, -values) if constant is b else _Affine(source, -one, values)


def _batch_norm(model: Model, node: Node, channels: int) -> _Affine | str:
    if node.attrs.get("training_mode", 0) or (model.opset < 7 and not node.attrs.get("is_test", 0)):
        return f"{node.label} is in training mode"
    if model.opset < 14 and len([o for o in node.outputs if o.name]) > 1:
        return f"{node.label} has the outputs of training mode"
    if any(o.name and o.outputs for o in node.outputs[1:]):
        return f"the statistics of {node.label} are used"
    if not node.attrs.get("spatial", 1):
        return f"{node.label} normalizes each position on its own (spatial=0)"
    if not all(isinstance(t, Constant) for t in node.inputs[1:5]):
        return f"the parameters of {node.label} are not constant"
    gamma, beta, mean, var = (t.values.astype(np.float64).reshape(-1) for t in node.inputs[1:5])
    if any(p.size != channels for p in (gamma, beta, mean, var)):
        return f"the parameters of {node.label} do not have {channels} channels"
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = gamma / np.sqrt(var + float(node.attrs.get("epsilon", 1e-5)))
    if not np.isfinite(scale).all():
        return f"{node.label} has a variance that is not positive"
    return _Affine(node.inputs[0], scale, beta - scale * mean)


# --- weighted operator, then affine ----------------------------------------------------------------------------


def _fuse_following(model: Model, scope: Graph, shapes: Shapes, ctx: Context) -> int:
    outputs, home, gone = set(scope.outputs), set(scope.nodes), set()
    for node in scope.nodes:
        view = linear(model, node) if node not in gone else None
        if view is None or len(node.outputs[0].outputs) != 1 or node.outputs[0] in outputs:
            continue
        follower = node.outputs[0].outputs[0]
        rank = output_rank(view, shapes)
        axis = view.channel_axis(rank) if rank is not None else -1
        found = _affine(model, follower, rank, axis, view.outputs)
        if found is None or follower not in home:
            continue
        if view.op == "MatMul" and follower.op in ("Add", "Sub"):
            continue  # that is a bias: it stays behind a MatMul, or makes it a Gemm
        reason = found if isinstance(found, str) else _keep_following(view, found)
        if isinstance(found, str) or reason is not None:
            if follower.op == "BatchNormalization":  # arithmetic behind a weight is mostly meant to stay
                ctx.refuse(follower.label, reason or "")
            continue
        if any(o in outputs for o in follower.outputs[1:]) or found.source is not node.outputs[0]:
            continue
        weight, bias = view.scaled_outputs(found.scale), None
        if view.bias is not None or found.shift.any():
            bias = view.bias_values() * found.scale + found.shift
        if _overflows(weight, view.weight.dtype) or (bias is not None and _overflows(bias, view.weight.dtype)):
            ctx.refuse(follower.label, f"folded into {node.label}, the weight overflows its type")
        elif ctx.allow(f"{follower.label} into {node.label}"):
            view.rewrite(model, scope, weight, bias)
            absorb_output(node, follower)
            outputs = set(scope.outputs)
            gone.add(follower)
    scope.remove(gone)
    return len(gone)


def _keep_following(view: Linear, found: _Affine) -> str | None:
    """Why the affine map cannot go into this operator, None if it can."""
    if view.weight.weight.nbytes > _SHARED_LIMIT and len(view.weight.outputs) > 1:
        return f"the weight {view.weight.name} in front of it is shared with another node"
    if view.op == "MatMul" and found.shift.any():
        return "the MatMul in front of it has no bias"
    return None


def _overflows(weight: Array, dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" and bool(np.abs(weight).max(initial=0) > float(np.finfo(dtype).max))


# --- affine, then weighted operator ----------------------------------------------------------------------------


def _fuse_preceding(model: Model, scope: Graph, shapes: Shapes, ctx: Context) -> int:
    outputs, home, gone = set(scope.outputs), set(scope.nodes), set()
    for node in scope.nodes:
        view = linear(model, node)
        before = producer(node.inputs[0]) if view is not None else None
        if (
            view is None
            or before is None
            or before not in home
            or before in gone
            or before.kind != "BatchNormalization"
        ):
            continue
        if len(before.outputs[0].outputs) != 1 or any(o in outputs for o in before.outputs):
            continue
        rank = len(view.weight.shape) if view.op != "MatMul" else shapes[node.inputs[0]].rank
        axis = (1 - rank if view.op in ("Conv", "ConvTranspose") else -1) if rank is not None else -1
        found = _affine(model, before, rank, axis, view.inputs)
        if isinstance(found, str):
            ctx.refuse(before.label, found)
        elif found is not None:
            reason = _keep_preceding(view, found)
            weight = view.scaled_inputs(found.scale)
            if reason is not None or _overflows(weight, view.weight.dtype):
                ctx.refuse(before.label, reason or f"folded into {node.label}, the weight overflows its type")
            elif ctx.allow(f"{before.label} into {node.label}"):
                bias = view.bias_values() + view.response(found.shift) if found.shift.any() else None
                if bias is None and view.bias is not None:
                    bias = view.bias_values()
                view.rewrite(model, scope, weight, bias)
                node.inputs[0] = found.source
                gone.add(before)
    scope.remove(gone)
    return len(gone)


def _keep_preceding(view: Linear, found: _Affine) -> str | None:
    if view.weight.weight.nbytes > _SHARED_LIMIT and len(view.weight.outputs) > 1:
        return f"the weight {view.weight.name} behind it is shared with another node"
    if not found.shift.any():
        return None
    if view.op in ("MatMul", "ConvTranspose"):
        return f"the {view.op} behind it cannot take up its shift"
    if view.op == "Conv" and (_pads(view.node) or view.node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")):
        return "the Conv behind it pads with zeros, which the shift would have moved"
    return None


def _pads(node: Node) -> bool:
    return any(node.attrs.get("pads", ()))
