"""Raising the standard opset of a model: per-channel DequantizeLinear needs 13, 4-bit types need 21.

onnx.version_converter is not used: it drops what it does not know, stops at contrib operators and at 2 GB.
Here every version step of an operator (ONNX, Changelog.md) is in one of two tables: it only widened (more
types, an added attribute or input whose default is the old behaviour), or a function rewrites the node. A
step in neither is refused.

An operator without a schema is the runtime's own and stays as it is, except those that ONNX Runtime accepts
in the standard domain up to opset 9 only (opset_legacy.py): these become standard operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import onnx

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.graph import Model, Node, sort
from onnxcomp.opset_adapters import ADAPTERS, REDUCTIONS, refuse
from onnxcomp.opset_legacy import LAST_LEGACY, LEGACY
from onnxcomp.opset_site import RefusedError, UpgradeSite
from onnxcomp.shapes import Shapes, infer

__all__ = ["NEWEST", "upgrade"]

NEWEST = 22  # the highest version that the tables below cover
_STANDARD = ("", "ai.onnx")

# Steps that need no rewriting. That of OneHot gives a meaning to negative indices, which version 9 forbids.
# From AveragePool 19 on ONNX Runtime sums in another order: the last bit of a value may differ.
_WIDENED = {
    version: frozenset(words.split())
    for version, words in {
        3: "GRU",
        7: "AveragePool",
        8: "Max MaxPool Mean Min Sum",
        9: "Cast Constant Flatten Gemm Greater Less MatMul PRelu",
        10: "AveragePool MaxPool ThresholdedRelu",
        11: f"{REDUCTIONS} ArgMax ArgMin AveragePool Compress Concat Constant Conv ConvTranspose "
        "DepthToSpace Equal Flatten Gather Gemm Hardmax If LogSoftmax Loop LpPool MaxPool MaxUnpool "
        "NonMaxSuppression OneHot ReduceSum Scan Slice Softmax Split Squeeze TopK Unsqueeze",
        12: "ArgMax ArgMin Clip Constant GatherND Max MaxPool Min Pow ReduceMax ReduceMin",
        13: f"{REDUCTIONS} Abs Add ArgMax ArgMin Cast Ceil Clip Concat Constant DepthToSpace "
        "DequantizeLinear Div Dropout Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND Gemm "
        "Greater Identity If IsNaN LRN Less Log Loop MatMul Max Mean MeanVarianceNormalization Min Mod "
        "Mul Neg NegativeLogLikelihoodLoss NonZero Pad Pow QuantizeLinear Reciprocal Relu Reshape "
        "ScatterElements ScatterND Shape Sigmoid Sign Size Slice SoftmaxCrossEntropyLoss SpaceToDepth Sqrt "
        "Sub Sum Tanh Tile Transpose",
        14: "Add CumSum Div GRU Identity LSTM Mul RNN Relu Reshape Sub",
        15: "BatchNormalization Pow Shape",
        16: "GreaterOrEqual Identity If LeakyRelu LessOrEqual Loop PRelu Scan ScatterElements "
        "ScatterND Where",
        17: "LayerNormalization",  # before, ONNX Runtime had its own of that name in the standard domain
        18: "LpPool OptionalGetElement OptionalHasElement Pad Resize ScatterElements ScatterND",
        19: "AveragePool Cast CastLike Constant DequantizeLinear Equal Identity If Loop Pad QuantizeLinear "
        "Reshape Resize Scan Shape Size",
        20: "ConstantOfShape IsInf IsNaN ReduceMax ReduceMin",
        21: "Cast CastLike Constant ConstantOfShape DequantizeLinear Flatten Identity If Loop Pad "
        "QLinearMatMul QuantizeLinear Reshape Scan Shape Size Squeeze Transpose Unsqueeze",
        22: "Acos Acosh Asin Asinh Atan Atanh AveragePool Bernoulli Conv ConvTranspose Cos Cosh DeformConv "
        "Det Dropout Elu EyeLike GRU GlobalAveragePool GlobalLpPool GlobalMaxPool GridSample HardSigmoid "
        "HardSwish InstanceNormalization LSTM LpNormalization LpPool MaxPool MaxRoiPool MaxUnpool Mish "
        "Multinomial NegativeLogLikelihoodLoss RNN RandomNormal RandomNormalLike RandomUniform "
        "RandomUniformLike RoiAlign Round Selu Sin Sinh Softplus Softsign Tan ThresholdedRelu",
    }.items()
}


def upgrade(model: Model, target: int) -> list[str]:
    """Raise the standard opset of `model` (graph, subgraphs, local functions) to `target` in place.

    What already has `target` or more stays. Outputs keep their values. Returns one note per kind of
    rewriting, none where only the version had to change. Scopes, nodes and tensors are other objects then.

    Raises ModelError naming the node that has no equivalent in `target` (the model is unchanged then),
    UsageError for a target above `NEWEST`.
    """
    if target > NEWEST:
        raise UsageError(f"opset {target} is not supported as a target; the highest is {NEWEST}")
    if all(version >= target for _, version in model.versions()):
        return []
    draft = model.copy()
    notes = _convert(draft, target)
    main = next((o.domain for o in draft.header.opset_import if o.domain in _STANDARD), "")
    draft.import_domain(main, target)
    for function in draft.functions:
        for entry in function.header.opset_import:
            if entry.domain in _STANDARD:
                entry.version = max(entry.version, target)
    model.become(draft)
    return [f"{key}: {count} node{'s' * (count > 1)}" for key, count in notes.items()]


def _convert(model: Model, target: int) -> Counter[str]:
    types = infer(model)
    notes = _replace_legacy(model, target, types)
    if notes:
        sort(model)
        types = infer(model)  # inference stopped at the operators without a schema
    notes += _rewrite(model, target, types)
    sort(model)
    return notes


def _sites(model: Model, target: int, types: Shapes) -> Iterator[tuple[UpgradeSite, int, Node]]:
    """Every standard node that is written in an opset below `target`."""
    local = {(domain, name) for domain, name, _ in (function.key for function in model.functions)}
    for scope, start in list(model.versions()):
        site = UpgradeSite(model, types, scope, target)
        for node in list(scope.nodes) if start < target else ():
            if (node.domain or "") in _STANDARD and (node.domain or "", node.op) not in local:
                yield site, start, node


def _replace_legacy(model: Model, target: int, types: Shapes) -> Counter[str]:
    """Replace what ONNX Runtime knows up to opset 9 only, by operators of opset 7."""
    notes: Counter[str] = Counter()
    for site, start, node in _sites(model, target, types):
        if node.op in LEGACY and start <= LAST_LEGACY < target:
            note = f"{node.op} replaced by standard operators"
            _apply(LEGACY[node.op], site, node, start)
            site.scope.remove([node])
            notes[note] += 1
    return notes


def _rewrite(model: Model, target: int, types: Shapes) -> Counter[str]:
    notes: Counter[str] = Counter()
    for site, start, first in _sites(model, target, types):
        site.inserted.append((first, start))
        while site.inserted:
            node, version = site.inserted.pop()
            while (step := _next_version(node.op, version, target)) is not None:
                op, version = node.op, step
                if op in _WIDENED.get(step, ()):
                    continue
                before = _state(node)
                site.version = step
                _apply(ADAPTERS.get((op, step), refuse), site, node, start)
                if _state(node) != before:
                    notes[f"{op} adapted to version {step}"] += 1
    return notes


def _apply(adapter: Callable[[UpgradeSite, Node], None], site: UpgradeSite, node: Node, start: int) -> None:
    where = f"node {node.label!r} ({node.op}) in graph {site.scope.name!r}"
    try:
        adapter(site, node)
    except RefusedError as error:
        raise ModelError(f"{where} cannot be upgraded from opset {start} to {site.target}: {error}") from None
    except (IndexError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"{where} does not fit its definition in opset {start}: {error}") from error


def _next_version(op: str, version: int, target: int) -> int | None:
    """The first version of the operator above `version` and up to `target`."""
    found = None
    while target > version:
        try:
            since = onnx.defs.get_schema(op, target, "").since_version
        except onnx.defs.SchemaError:
            break
        if since <= version:
            break
        found, target = since, since - 1
    return found


def _state(node: Node) -> tuple[Any, ...]:
    return node.op, dict(node.attrs), [id(t) for t in node.inputs], [id(t) for t in node.outputs]
