"""Raising the standard opset of a model: per-channel DequantizeLinear needs 13, 4-bit types need 21.

onnx.version_converter is not used: it drops what it does not know, stops at contrib operators and at 2 GB.
Here every version step of an operator (ONNX, Changelog.md) is in one of two tables: it only widened (more
types, an added attribute or input whose default is the old behaviour), or a function rewrites the node. A
step in neither is refused.

An operator without a schema is the runtime's own and stays as it is, except those that ONNX Runtime accepts
in the standard domain up to opset 9 only (`_LEGACY`): these become standard operators.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.graph import AttributeRef, Graph, Model, Node, Variable, sort
from onnxcomp.shapes import Shapes, infer

__all__ = ["NEWEST", "upgrade"]

NEWEST = 22  # the highest version that the tables below cover
_LAST_LEGACY = 9
_STANDARD = ("", "ai.onnx")

_REDUCTIONS = (
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSumSquare"
)

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
        11: f"{_REDUCTIONS} ArgMax ArgMin AveragePool Compress Concat Constant Conv ConvTranspose "
        "DepthToSpace Equal Flatten Gather Gemm Hardmax If LogSoftmax Loop LpPool MaxPool MaxUnpool "
        "NonMaxSuppression OneHot ReduceSum Scan Slice Softmax Split Squeeze TopK Unsqueeze",
        12: "ArgMax ArgMin Clip Constant GatherND Max MaxPool Min Pow ReduceMax ReduceMin",
        13: f"{_REDUCTIONS} Abs Add ArgMax ArgMin Cast Ceil Clip Concat Constant DepthToSpace "
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


class _RefusedError(Exception):
    """Why a node cannot be rewritten."""


@dataclass
class _Site:
    """Where a node is rewritten: its scope and the operator version that is being reached."""

    model: Model
    types: Shapes
    scope: Graph
    target: int
    version: int = 0
    inserted: list[tuple[Node, int]] = field(default_factory=list)
    enlarging: set[Node] = field(default_factory=set)  # were Upsample: all scales are at least 1

    def constant(self, wish: str, values: npt.ArrayLike, dtype: Any = np.int64) -> Any:
        with np.errstate(over="ignore"):  # the limits of float become infinite in float16, and bound the same
            array = np.asarray(values, np.float64 if dtype != np.int64 else np.int64).astype(dtype)
        return self.model.constant(self.scope, wish, array)

    def insert(self, op: str, inputs: Sequence[Any], output: Any, attrs: dict[str, Any] | None = None) -> Any:
        """Add a node with the meaning that `op` has in the version being reached. Returns its output."""
        self.inserted.append((self.scope.add(op, inputs, [output], attrs=attrs), self.version))
        return output

    def detach(self, node: Node, wish: str) -> tuple[Any, Any]:
        """Give `node` a new first output. Returns it, and the old one for another node to produce."""
        old = node.outputs[0]
        new = self.model.variable(f"{old.name}_{wish}", old.dtype)
        node.outputs[0] = new
        return new, old

    def dtype(self, tensor: Any) -> Any:
        found = self.types[tensor].dtype or tensor.dtype
        if found is None:
            raise _RefusedError(f"the element type of {tensor.name!r} is unknown")
        return found

    def is_read(self, tensor: Any) -> bool:
        return bool(tensor.outputs) or any(output is tensor for output in self.scope.outputs)


def _sites(model: Model, target: int, types: Shapes) -> Iterator[tuple[_Site, int, Node]]:
    """Every standard node that is written in an opset below `target`."""
    local = {(domain, name) for domain, name, _ in (function.key for function in model.functions)}
    for scope, start in list(model.versions()):
        site = _Site(model, types, scope, target)
        for node in list(scope.nodes) if start < target else ():
            if (node.domain or "") in _STANDARD and (node.domain or "", node.op) not in local:
                yield site, start, node


def _replace_legacy(model: Model, target: int, types: Shapes) -> Counter[str]:
    """Replace what ONNX Runtime knows up to opset 9 only, by operators of opset 7."""
    notes: Counter[str] = Counter()
    for site, start, node in _sites(model, target, types):
        if node.op in _LEGACY and start <= _LAST_LEGACY < target:
            note = f"{node.op} replaced by standard operators"
            _apply(_LEGACY[node.op], site, node, start)
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
                _apply(_ADAPTERS.get((op, step), _refuse), site, node, start)
                if _state(node) != before:
                    notes[f"{op} adapted to version {step}"] += 1
    return notes


def _apply(adapter: Callable[[_Site, Node], None], site: _Site, node: Node, start: int) -> None:
    where = f"node {node.label!r} ({node.op}) in graph {site.scope.name!r}"
    try:
        adapter(site, node)
    except _RefusedError as error:
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


def _take(node: Node, name: str, default: Any = None) -> Any:
    """Remove an attribute and return its value."""
    value = node.attrs.pop(name, default)
    if isinstance(value, AttributeRef):
        raise _RefusedError(f"its attribute {name!r} is set by the caller of the function")
    return value


def _set_input(node: Node, position: int, tensor: Any) -> None:
    while len(node.inputs) <= position:
        node.inputs.append(Variable(""))
    node.inputs[position] = tensor


def _keep_first_output(node: Node) -> None:
    while len(node.outputs) > 1:
        node.outputs.pop()


def _refuse(site: _Site, node: Node) -> None:
    raise _RefusedError(f"its change in opset {site.version} has no equivalent here")


def _drop_consumed_inputs(site: _Site, node: Node) -> None:
    node.attrs.pop("consumed_inputs", None)


def _to_input(attribute: str, position: int) -> Callable[[_Site, Node], None]:
    """An adapter: a list of integers moves from an attribute to an input; an empty list meant the default."""

    def adapt(site: _Site, node: Node) -> None:
        values = _take(node, attribute)
        if values:
            _set_input(node, position, site.constant(f"{node.outputs[0].name}_{attribute}", values))

    return adapt


def _concat_4(site: _Site, node: Node) -> None:
    node.attrs.setdefault("axis", 1)


def _reshape_5(site: _Site, node: Node) -> None:
    _set_input(node, 1, site.constant(f"{node.outputs[0].name}_shape", _take(node, "shape", [])))


def _cast_6(site: _Site, node: Node) -> None:
    node.attrs["to"] = onnx.TensorProto.DataType.Value(str(_take(node, "to")).upper())


def _broadcast_7(site: _Site, node: Node) -> None:
    """Before, B was aligned at `axis` of A; now both are aligned at the end."""
    flag, axis = _take(node, "broadcast", 0), _take(node, "axis")
    if not flag or axis is None:
        return
    a, b = (site.types[t] for t in node.inputs[:2])
    if a.rank is None or b.rank is None:
        raise _RefusedError("it broadcasts along an axis, and the rank of an input is unknown")
    if b.size == 1 and b.rank <= a.rank:
        return
    missing = a.rank - axis - b.rank
    if axis < 0 or missing < 0:
        raise _RefusedError(f"axis {axis} does not fit inputs of rank {a.rank} and {b.rank}")
    if missing:
        node.inputs[1] = _unsqueeze(site, node.inputs[1], range(b.rank, b.rank + missing))


def _unsqueeze(site: _Site, tensor: Any, axes: Sequence[int]) -> Any:
    output = site.model.variable(f"{tensor.name}_unsqueezed", tensor.dtype)
    return site.insert("Unsqueeze", [tensor], output, {"axes": list(axes)})


def _batch_normalization_7(site: _Site, node: Node) -> None:
    if not _take(node, "is_test", 0) and any(site.is_read(t) for t in node.outputs[1:]):
        raise _RefusedError("it is in training mode")
    _keep_first_output(node)


def _batch_normalization_9(site: _Site, node: Node) -> None:
    if not _take(node, "spatial", 1):
        raise _RefusedError("it normalizes each position by itself (spatial=0)")


def _batch_normalization_14(site: _Site, node: Node) -> None:
    if any(site.is_read(t) for t in node.outputs[1:]):
        raise _RefusedError("its statistics (outputs after the first) are read")
    _keep_first_output(node)


def _dropout_7(site: _Site, node: Node) -> None:
    if not _take(node, "is_test", 0):
        raise _RefusedError("it is in training mode (is_test=0)")


def _dropout_10(site: _Site, node: Node) -> None:
    if any(site.is_read(t) for t in node.outputs[1:]):
        raise _RefusedError("its mask is read, whose element type changed to bool")


def _dropout_12(site: _Site, node: Node) -> None:
    ratio = _take(node, "ratio")
    if ratio is not None:
        _set_input(node, 1, site.constant(f"{node.outputs[0].name}_ratio", ratio, np.float32))


def _gemm_7(site: _Site, node: Node) -> None:
    node.attrs.pop("broadcast", None)


def _recurrent_7(site: _Site, node: Node) -> None:
    node.attrs.pop("output_sequence", None)  # an output that is not named is not computed


def _prelu_7(site: _Site, node: Node) -> None:
    """Before, a slope of rank 1 had one element per channel; now it is aligned with the last axis."""
    x, slope = (site.types[t] for t in node.inputs[:2])
    if slope.shape is None or (x.rank is None and slope.size != 1):
        raise _RefusedError("the rank of an input is unknown")
    if slope.rank == 1 and slope.size != 1 and x.rank is not None and x.rank > 2:
        node.inputs[1] = _unsqueeze(site, node.inputs[1], range(1, x.rank - 1))


def _upsample_7(site: _Site, node: Node) -> None:
    height, width = _take(node, "height_scale"), _take(node, "width_scale")
    if height is None or width is None:
        raise _RefusedError("it has no height_scale or width_scale")
    node.attrs["scales"] = [1.0, 1.0, height, width]
    if node.attrs.get("mode") == "bilinear":
        node.attrs["mode"] = "linear"


def _upsample_9(site: _Site, node: Node) -> None:
    scales = _take(node, "scales", [])
    _set_input(node, 1, site.constant(f"{node.outputs[0].name}_scales", scales, np.float32))


def _upsample_10(site: _Site, node: Node) -> None:
    node.op = "Resize"
    site.enlarging.add(node)


def _mean_variance_9(site: _Site, node: Node) -> None:
    if node.attrs:
        raise _RefusedError("it has the attributes of ONNX Runtime's own operator before opset 9")


def _slice_10(site: _Site, node: Node) -> None:
    for position, name in enumerate(("starts", "ends", "axes"), start=1):
        values = _take(node, name)
        if values is not None:
            _set_input(node, position, site.constant(f"{node.outputs[0].name}_{name}", values))


def _topk_10(site: _Site, node: Node) -> None:
    _set_input(node, 1, site.constant(f"{node.outputs[0].name}_k", [_take(node, "k", 1)]))


def _clip_11(site: _Site, node: Node) -> None:
    for position, name in enumerate(("min", "max"), start=1):
        bound = _take(node, name)
        if bound is not None:
            dtype = site.dtype(node.inputs[0])
            _set_input(node, position, site.constant(f"{node.outputs[0].name}_{name}", bound, dtype))


def _pad_2(site: _Site, node: Node) -> None:
    node.attrs["pads"] = _take(node, "paddings", [])


def _pad_11(site: _Site, node: Node) -> None:
    fill = _take(node, "value", 0.0)
    _set_input(node, 1, site.constant(f"{node.outputs[0].name}_pads", _take(node, "pads", [])))
    if fill and node.attrs.get("mode", "constant") == "constant":
        _set_input(node, 2, site.constant(f"{node.outputs[0].name}_fill", fill, site.dtype(node.inputs[0])))


def _resize_11(site: _Site, node: Node) -> None:
    """Before, coordinates were x / scale, and "nearest" rounded down when enlarging, up when reducing."""
    scales = node.inputs[1]
    rounding = "floor"
    if node.attrs.get("mode", "nearest") == "nearest" and node not in site.enlarging:
        factors = site.model.value(scales)
        if factors is None:
            raise _RefusedError("it takes the nearest value, and its scales are not constant")
        if np.any(factors < 1):
            rounding = "ceil"
            if np.any(factors > 1):
                raise _RefusedError("it enlarges one axis and reduces another, which rounded differently")
    node.attrs.update(coordinate_transformation_mode="asymmetric", nearest_mode=rounding)
    # The region, which has no meaning here, may be left out from version 13 on.
    name = f"{node.outputs[0].name}_roi"
    _set_input(node, 1, Variable("") if site.target >= 13 else site.constant(name, [], np.float32))
    _set_input(node, 2, scales)


def _resize_13(site: _Site, node: Node) -> None:
    if node.attrs.get("coordinate_transformation_mode") == "tf_half_pixel_for_nn":
        raise _RefusedError("coordinate_transformation_mode tf_half_pixel_for_nn was abolished")
    for position, tensor in enumerate(node.inputs[1:3], start=1):
        weight = site.model.weight(tensor)
        if weight is not None and weight.size == 0:  # how version 11 left an input out
            node.inputs[position] = Variable("")


def _scatter_11(site: _Site, node: Node) -> None:
    node.op = "ScatterElements"


def _softmax_13(site: _Site, node: Node) -> None:
    """Before, all axes from `axis` (default 1) on counted as one; now `axis` (default -1) is a single one."""
    axis = _take(node, "axis", 1)
    shape = site.types[node.inputs[0]].shape
    if axis == -1:
        node.attrs["axis"] = -1
        return
    if shape is not None:
        first = axis + len(shape) if axis < 0 else axis
        wide = [i for i in range(first, len(shape)) if shape[i] != 1]
        if len(wide) <= 1:
            node.attrs["axis"] = wide[0] if wide else len(shape) - 1
            return
    source = node.inputs[0]
    flat, output = site.detach(node, "flat")
    before = site.model.variable(f"{source.name}_flat", source.dtype)
    shape_of = site.model.variable(f"{source.name}_shape", np.int64)
    node.inputs[0] = site.insert("Flatten", [source], before, {"axis": axis})
    node.attrs["axis"] = -1
    site.insert("Reshape", [flat, site.insert("Shape", [source], shape_of)], output)


def _roi_align_16(site: _Site, node: Node) -> None:
    node.attrs["coordinate_transformation_mode"] = "output_half_pixel"


def _split_18(site: _Site, node: Node) -> None:
    if len(node.inputs) < 2 or not node.inputs[1].name:
        node.attrs["num_outputs"] = len(node.outputs)


def _dft_20(site: _Site, node: Node) -> None:
    _set_input(node, 2, site.constant(f"{node.outputs[0].name}_axis", _take(node, "axis", 1)))


def _grid_sample_20(site: _Site, node: Node) -> None:
    renamed = {"bilinear": "linear", "bicubic": "cubic"}
    if "mode" in node.attrs:
        mode = _take(node, "mode")
        node.attrs["mode"] = renamed.get(mode, mode)


def _affine(site: _Site, node: Node) -> None:
    """alpha · x + beta"""
    scaled = _elementwise(site, node, "Mul", node.inputs[0], _take(node, "alpha", 1.0))
    _elementwise(site, node, "Add", scaled, _take(node, "beta", 0.0), _give_output(node))


def _image_scaler(site: _Site, node: Node) -> None:
    """scale · x + bias, one bias per channel; x is [N, C, H, W]."""
    scaled = _elementwise(site, node, "Mul", node.inputs[0], _take(node, "scale", 1.0))
    bias = np.reshape(_take(node, "bias", []), (-1, 1, 1))
    _elementwise(site, node, "Add", scaled, bias, _give_output(node))


def _scale(site: _Site, node: Node) -> None:
    """scale · x"""
    _elementwise(site, node, "Mul", node.inputs[0], _take(node, "scale", 1.0), _give_output(node))


def _scaled_function(op: str) -> Callable[[_Site, Node], None]:
    """An adapter for alpha · op(beta · x)."""

    def adapt(site: _Site, node: Node) -> None:
        alpha, beta = _take(node, "alpha"), _take(node, "beta")
        if alpha is None or beta is None:
            raise _RefusedError("it has no alpha or beta")
        scaled = _elementwise(site, node, "Mul", node.inputs[0], beta)
        value = site.insert(op, [scaled], site.model.variable(f"{node.outputs[0].name}_{op}", scaled.dtype))
        _elementwise(site, node, "Mul", value, alpha, _give_output(node))

    return adapt


def _crop(site: _Site, node: Node) -> None:
    """x[:, :, top : H - bottom, left : W - right]; `scale` (height, width) replaces bottom and right."""
    border, size = _take(node, "border", []), _take(node, "scale")
    if len(border) != 4:
        raise _RefusedError(f"its border has {len(border)} elements, 4 expected")
    left, top, right, bottom = border
    end = np.iinfo(np.int64).max
    ends = [top + size[0], left + size[1]] if size else [-bottom or end, -right or end]
    attrs = {"starts": [top, left], "ends": ends, "axes": [2, 3]}
    site.insert("Slice", [node.inputs[0]], _give_output(node), attrs)


def _give_output(node: Node) -> Any:
    """The output of a node that is about to go; a tensor has one producer."""
    output = node.outputs[0]
    node.outputs.clear()
    return output


def _elementwise(site: _Site, node: Node, op: str, x: Any, operand: npt.ArrayLike, output: Any = None) -> Any:
    dtype = site.types[node.inputs[0]].dtype or node.inputs[0].dtype or np.dtype(np.float32)
    output = site.model.variable(f"{x.name}_{op}", dtype) if output is None else output
    return site.insert(op, [x, site.constant(f"{x.name}_{op}_operand", operand, dtype)], output)


_LEGACY: dict[str, Callable[[_Site, Node], None]] = {
    "Affine": _affine,
    "Crop": _crop,
    "ImageScaler": _image_scaler,
    "ParametricSoftplus": _scaled_function("Softplus"),
    "Scale": _scale,
    "ScaledTanh": _scaled_function("Tanh"),
}

_ADAPTERS: dict[tuple[str, int], Callable[[_Site, Node], None]] = {
    (op, version): adapter
    for version, words, adapter in (
        (2, "Pad", _pad_2),
        (4, "Concat", _concat_4),
        (5, "Reshape", _reshape_5),
        (
            6,
            "Abs Add BatchNormalization Ceil Clip Div Dropout Elu Exp Floor Gemm HardSigmoid "
            "InstanceNormalization LeakyRelu Log Max Mean Min Mul Neg PRelu Reciprocal Relu Selu Sigmoid "
            "Sqrt Sub Sum Tanh",
            _drop_consumed_inputs,
        ),
        (6, "Cast", _cast_6),
        (7, "Add And Div Equal Greater Less Mul Or Pow Sub Xor", _broadcast_7),
        (7, "BatchNormalization", _batch_normalization_7),
        (7, "Dropout", _dropout_7),
        (7, "GRU LSTM RNN", _recurrent_7),
        (7, "Gemm", _gemm_7),
        (7, "PRelu", _prelu_7),
        (7, "Upsample", _upsample_7),
        (9, "BatchNormalization", _batch_normalization_9),
        (9, "MeanVarianceNormalization", _mean_variance_9),
        (9, "Upsample", _upsample_9),
        (10, "Dropout", _dropout_10),
        (10, "Slice", _slice_10),
        (10, "TopK", _topk_10),
        (10, "Upsample", _upsample_10),
        (11, "Clip", _clip_11),
        (11, "Pad", _pad_11),
        (11, "Resize", _resize_11),
        (11, "Scatter", _scatter_11),
        (12, "Dropout", _dropout_12),
        (13, "Hardmax LogSoftmax Softmax", _softmax_13),
        (13, "ReduceSum Squeeze Unsqueeze", _to_input("axes", 1)),
        (13, "Resize", _resize_13),
        (13, "Split", _to_input("split", 1)),
        (14, "BatchNormalization", _batch_normalization_14),
        (16, "RoiAlign", _roi_align_16),
        (18, _REDUCTIONS, _to_input("axes", 1)),
        (18, "Split", _split_18),
        (20, "DFT", _dft_20),
        (20, "GridSample", _grid_sample_20),
    )
    for op in words.split()
}
