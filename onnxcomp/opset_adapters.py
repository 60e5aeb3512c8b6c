"""How a node is rewritten where a version of its operator changed more than it added (ONNX, Changelog.md).

An adapter is called with a node of the version before and leaves one of the version that it is listed for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx

from onnxcomp.graph import Node, Variable
from onnxcomp.opset_site import RefusedError, UpgradeSite, keep_first_output, set_input, take

__all__ = ["ADAPTERS", "REDUCTIONS", "refuse"]

REDUCTIONS = (
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSumSquare"
)


def refuse(site: UpgradeSite, node: Node) -> None:
    raise RefusedError(f"its change in opset {site.version} has no equivalent here")


def _drop_consumed_inputs(site: UpgradeSite, node: Node) -> None:
    node.attrs.pop("consumed_inputs", None)


def _to_input(attribute: str, position: int) -> Callable[[UpgradeSite, Node], None]:
    """An adapter: a list of integers moves from an attribute to an input; an empty list meant the default."""

    def adapt(site: UpgradeSite, node: Node) -> None:
        values = take(node, attribute)
        if values:
            set_input(node, position, site.constant(f"{node.outputs[0].name}_{attribute}", values))

    return adapt


def _concat_4(site: UpgradeSite, node: Node) -> None:
    node.attrs.setdefault("axis", 1)


def _reshape_5(site: UpgradeSite, node: Node) -> None:
    set_input(node, 1, site.constant(f"{node.outputs[0].name}_shape", take(node, "shape", [])))


def _cast_6(site: UpgradeSite, node: Node) -> None:
    node.attrs["to"] = onnx.TensorProto.DataType.Value(str(take(node, "to")).upper())


def _broadcast_7(site: UpgradeSite, node: Node) -> None:
    """Before, B was aligned at `axis` of A; now both are aligned at the end."""
    flag, axis = take(node, "broadcast", 0), take(node, "axis")
    if not flag or axis is None:
        return
    a, b = (site.types[t] for t in node.inputs[:2])
    if a.rank is None or b.rank is None:
        raise RefusedError("it broadcasts along an axis, and the rank of an input is unknown")
    if b.size == 1 and b.rank <= a.rank:
        return
    missing = a.rank - axis - b.rank
    if axis < 0 or missing < 0:
        raise RefusedError(f"axis {axis} does not fit inputs of rank {a.rank} and {b.rank}")
    if missing:
        node.inputs[1] = _unsqueeze(site, node.inputs[1], range(b.rank, b.rank + missing))


def _unsqueeze(site: UpgradeSite, tensor: Any, axes: Sequence[int]) -> Any:
    output = site.model.variable(f"{tensor.name}_unsqueezed", tensor.dtype)
    return site.insert("Unsqueeze", [tensor], output, {"axes": list(axes)})


def _batch_normalization_7(site: UpgradeSite, node: Node) -> None:
    if not take(node, "is_test", 0) and any(site.is_read(t) for t in node.outputs[1:]):
        raise RefusedError("it is in training mode")
    keep_first_output(node)


def _batch_normalization_9(site: UpgradeSite, node: Node) -> None:
    if not take(node, "spatial", 1):
        raise RefusedError("it normalizes each position by itself (spatial=0)")


def _batch_normalization_14(site: UpgradeSite, node: Node) -> None:
    if any(site.is_read(t) for t in node.outputs[1:]):
        raise RefusedError("its statistics (outputs after the first) are read")
    keep_first_output(node)


def _dropout_7(site: UpgradeSite, node: Node) -> None:
    if not take(node, "is_test", 0):
        raise RefusedError("it is in training mode (is_test=0)")


def _dropout_10(site: UpgradeSite, node: Node) -> None:
    if any(site.is_read(t) for t in node.outputs[1:]):
        raise RefusedError("its mask is read, whose element type changed to bool")


def _dropout_12(site: UpgradeSite, node: Node) -> None:
    ratio = take(node, "ratio")
    if ratio is not None:
        set_input(node, 1, site.constant(f"{node.outputs[0].name}_ratio", ratio, np.float32))


def _gemm_7(site: UpgradeSite, node: Node) -> None:
    node.attrs.pop("broadcast", None)


def _recurrent_7(site: UpgradeSite, node: Node) -> None:
    node.attrs.pop("output_sequence", None)  # an output that is not named is not computed


def _prelu_7(site: UpgradeSite, node: Node) -> None:
    """Before, a slope of rank 1 had one element per channel; now it is aligned with the last axis."""
    x, slope = (site.types[t] for t in node.inputs[:2])
    if slope.shape is None or (x.rank is None and slope.size != 1):
        raise RefusedError("the rank of an input is unknown")
    if slope.rank == 1 and slope.size != 1 and x.rank is not None and x.rank > 2:
        node.inputs[1] = _unsqueeze(site, node.inputs[1], range(1, x.rank - 1))


def _upsample_7(site: UpgradeSite, node: Node) -> None:
    height, width = take(node, "height_scale"), take(node, "width_scale")
    if height is None or width is None:
        raise RefusedError("it has no height_scale or width_scale")
    node.attrs["scales"] = [1.0, 1.0, height, width]
    if node.attrs.get("mode") == "bilinear":
        node.attrs["mode"] = "linear"


def _upsample_9(site: UpgradeSite, node: Node) -> None:
    scales = take(node, "scales", [])
    set_input(node, 1, site.constant(f"{node.outputs[0].name}_scales", scales, np.float32))


def _upsample_10(site: UpgradeSite, node: Node) -> None:
    node.op = "Resize"
    site.enlarging.add(node)


def _mean_variance_9(site: UpgradeSite, node: Node) -> None:
    if node.attrs:
        raise RefusedError("it has the attributes of ONNX Runtime's own operator before opset 9")


def _slice_10(site: UpgradeSite, node: Node) -> None:
    for position, name in enumerate(("starts", "ends", "axes"), start=1):
        values = take(node, name)
        if values is not None:
            set_input(node, position, site.constant(f"{node.outputs[0].name}_{name}", values))


def _topk_10(site: UpgradeSite, node: Node) -> None:
    set_input(node, 1, site.constant(f"{node.outputs[0].name}_k", [take(node, "k", 1)]))


def _clip_11(site: UpgradeSite, node: Node) -> None:
    for position, name in enumerate(("min", "max"), start=1):
        bound = take(node, name)
        if bound is not None:
            dtype = site.dtype(node.inputs[0])
            set_input(node, position, site.constant(f"{node.outputs[0].name}_{name}", bound, dtype))


def _pad_2(site: UpgradeSite, node: Node) -> None:
    node.attrs["pads"] = take(node, "paddings", [])


def _pad_11(site: UpgradeSite, node: Node) -> None:
    fill = take(node, "value", 0.0)
    set_input(node, 1, site.constant(f"{node.outputs[0].name}_pads", take(node, "pads", [])))
    if fill and node.attrs.get("mode", "constant") == "constant":
        set_input(node, 2, site.constant(f"{node.outputs[0].name}_fill", fill, site.dtype(node.inputs[0])))


def _resize_11(site: UpgradeSite, node: Node) -> None:
    """Before, coordinates were x / scale, and "nearest" rounded down when enlarging, up when reducing."""
    scales = node.inputs[1]
    rounding = "floor"
    if node.attrs.get("mode", "nearest") == "nearest" and node not in site.enlarging:
        factors = site.model.value(scales)
        if factors is None:
            raise RefusedError("it takes the nearest value, and its scales are not constant")
        if np.any(factors < 1):
            rounding = "ceil"
            if np.any(factors > 1):
                raise RefusedError("it enlarges one axis and reduces another, which rounded differently")
    node.attrs.update(coordinate_transformation_mode="asymmetric", nearest_mode=rounding)
    # The region, which has no meaning here, may be left out from version 13 on.
    name = f"{node.outputs[0].name}_roi"
    set_input(node, 1, Variable("") if site.target >= 13 else site.constant(name, [], np.float32))
    set_input(node, 2, scales)


def _resize_13(site: UpgradeSite, node: Node) -> None:
    if node.attrs.get("coordinate_transformation_mode") == "tf_half_pixel_for_nn":
        raise RefusedError("coordinate_transformation_mode tf_half_pixel_for_nn was abolished")
    for position, tensor in enumerate(node.inputs[1:3], start=1):
        weight = site.model.weight(tensor)
        if weight is not None and weight.size == 0:  # how version 11 left an input out
            node.inputs[position] = Variable("")


def _scatter_11(site: UpgradeSite, node: Node) -> None:
    node.op = "ScatterElements"


def _softmax_13(site: UpgradeSite, node: Node) -> None:
    """Before, all axes from `axis` (default 1) on counted as one; now `axis` (default -1) is a single one."""
    axis = take(node, "axis", 1)
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


def _roi_align_16(site: UpgradeSite, node: Node) -> None:
    node.attrs["coordinate_transformation_mode"] = "output_half_pixel"


def _split_18(site: UpgradeSite, node: Node) -> None:
    if len(node.inputs) < 2 or not node.inputs[1].name:
        node.attrs["num_outputs"] = len(node.outputs)


def _dft_20(site: UpgradeSite, node: Node) -> None:
    set_input(node, 2, site.constant(f"{node.outputs[0].name}_axis", take(node, "axis", 1)))


def _grid_sample_20(site: UpgradeSite, node: Node) -> None:
    renamed = {"bilinear": "linear", "bicubic": "cubic"}
    if "mode" in node.attrs:
        mode = take(node, "mode")
        node.attrs["mode"] = renamed.get(mode, mode)


ADAPTERS: dict[tuple[str, int], Callable[[UpgradeSite, Node], None]] = {
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
        (18, REDUCTIONS, _to_input("axes", 1)),
        (18, "Split", _split_18),
        (20, "DFT", _dft_20),
        (20, "GridSample", _grid_sample_20),
    )
    for op in words.split()
}
