"""Which values become 8-bit on ONNX Runtime's CPU provider, decided before anything is changed.

The rules are what its kernels and fusions ask for (measured and read in its source):

* Conv runs as QLinearConv only if its input is dequantized and everything that reads its output quantizes it, so a
  selected Conv has 8-bit input and output. A Relu or Clip behind it is absorbed where zero is the lowest code.
* Gemm and MatMul multiply 8-bit inputs and give float (QGemm, MatMulIntegerToFloat), so only their input is 8-bit, and
  what follows (normalization, GELU, residual sums of transformers) stays as it is.
* Between such nodes, operators with 8-bit kernels (residual sums, pooling, concatenation) and those that only move data
  go along when all their inputs are 8-bit already. Everything else stays in float: a conversion costs more than
  the operator gains.
* ConvTranspose has no 8-bit kernel here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.graph import Constant, Graph, Model, Node, Variable, producer
from onnxcomp.linear import Linear, linear
from onnxcomp.manager import Context
from onnxcomp.shapes import Shapes

__all__ = ["MOVES", "Placement", "Unit", "addend_of", "place", "why_no_weight"]

Array = npt.NDArray[Any]

# 8-bit kernels with output parameters of their own.
_OWN = frozenset({"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Relu", "Clip"})
# Operators that move values: the output has the parameters of the input, the codes do not change.
MOVES = frozenset(
    {"MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "Expand", "Split",
     "DepthToSpace", "SpaceToDepth", "Tile", "Pad"}
)  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """A node that is to run on 8-bit values.

    `activation` is the Relu or Clip that its output quantization absorbs, `addend` the Add of a constant per column
    behind a MatMul. `name` is that of the value it computes, `output` the value behind all; `quantized_output` says
    whether it must be 8-bit (Conv) or may be float (Gemm).
    """

    node: Node
    view: Linear | None
    activation: Node | None
    quantized_output: bool
    name: str
    addend: Node | None = None

    @property
    def output(self) -> Any:
        return (self.activation or self.node).outputs[0]

    @property
    def label(self) -> str:
        return str(self.node.label)

    @property
    def key(self) -> str:
        """Names the unit in every copy of the model: the name of the value it computed before quantization."""
        return self.name

    @property
    def linear_output(self) -> Any:
        """The value before the activation, bias included."""
        return (self.addend or self.node).outputs[0]

    @property
    def takes_bias(self) -> bool:
        return self.view is not None and (self.view.op != "MatMul" or self.addend is not None)

    @property
    def has_bias(self) -> bool:
        return self.view is not None and (self.view.bias is not None or self.addend is not None)

    def bias_values(self) -> Array:
        """The bias per output channel (float64), also where it is an Add behind a MatMul."""
        assert self.view is not None
        if self.addend is None:
            return self.view.bias_values()
        constant = next(t for t in self.addend.inputs if isinstance(t, Constant))
        return np.asarray(constant.values.astype(np.float64).reshape(-1))


@dataclass
class Placement:
    """The units in node order, and the 8-bit values in order of appearance.

    `same` maps a value to the one whose scale and zero point it must share. `edges` lists who reads each value as
    8-bit; without it, all units do, and everyone where a unit computes the value.
    """

    units: list[Unit] = field(default_factory=list)
    quantized: dict[Any, None] = field(default_factory=dict)
    same: dict[Any, Any] = field(default_factory=dict)
    edges: dict[Any, list[Node]] | None = None

    def root(self, tensor: Any) -> Any:
        """The value that decides scale and zero point of `tensor`."""
        while tensor in self.same:
            tensor = self.same[tensor]
        return tensor


def place(
    model: Model, scope: Graph, shapes: Shapes, ctx: Context, *, keep_float: Iterable[str] = (), ops: Iterable[str] = ()
) -> Placement:
    """Choose units and 8-bit values of a scope.

    `keep_float` names nodes that stay (by name or by their first output), `ops` are the operators to take.
    """
    kept, wanted = set(keep_float), set(ops) or {"Conv", "Gemm", "MatMul"}
    outputs, home = set(scope.outputs), set(scope.nodes)
    plan = Placement()
    absorbed: set[Node] = set()
    for node in scope.nodes:
        if node in absorbed or node.domain or not node.outputs or kept & {node.label, node.outputs[0].name}:
            continue
        view = linear(model, node) if node.op in wanted else None
        if view is not None:
            reason = _unfit(view, shapes)
            if reason is not None:
                ctx.refuse(node.label, reason)
                continue
            plan.quantized.setdefault(node.inputs[0])
        elif not _goes_along(model, node, plan, shapes):
            if node.op in wanted | {"ConvTranspose", "LSTM", "GRU", "RNN"}:
                ctx.refuse(node.label, _why_not(node))
            continue
        convolution = node.op == "Conv"
        activation = _activation(model, node, outputs, home) if node.op in ("Conv", "Gemm", "Add") else None
        quantized = view is None or convolution
        addend = addend_of(view, outputs, home) if view is not None and view.op == "MatMul" else None
        unit = Unit(node, view, activation, quantized, node.outputs[0].name, addend)
        plan.units.append(unit)
        if activation is not None:
            absorbed.add(activation)
        if quantized:
            for output in [unit.output] if len(node.outputs) == 1 else node.outputs:
                plan.quantized.setdefault(output)
                if view is None and node.op in MOVES:
                    plan.same[output] = node.inputs[0]
    _drop_idle(plan, outputs)
    _share_with_concat(plan, outputs)
    return plan


def _unfit(view: Linear, shapes: Shapes) -> str | None:
    if shapes[view.node.inputs[0]].elem not in (0, 1) or view.weight.weight.data_type != 1:
        return "its values are not float32"
    if view.op == "ConvTranspose":
        return "ONNX Runtime's CPU provider has no 8-bit kernel for it"
    if isinstance(view.node.inputs[0], Constant):
        return "its input is constant"
    return None


def _why_not(node: Node) -> str:
    if node.op == "ConvTranspose":
        return "ONNX Runtime's CPU provider has no 8-bit kernel for it"
    if node.op in ("LSTM", "GRU", "RNN"):
        return "recurrent layers have no static 8-bit kernel"
    return why_no_weight(node)


def why_no_weight(node: Node) -> str:
    """Why a product or convolution has no constant weight to quantize."""
    operands = node.inputs[:2]
    if any((made := producer(t)) is not None and made.op == "DequantizeLinear" for t in operands):
        return "it is quantized already, or its weight is stored so"
    if any(isinstance(t, Variable) and t.default is not None for t in operands):
        return "its weight is also an input of the model, which callers may override"
    return "its weight is not constant"


def _goes_along(model: Model, node: Node, plan: Placement, shapes: Shapes) -> bool:
    """Whether a node without weights runs on 8-bit values: all its data inputs are, and a kernel exists."""
    if node.op in MOVES:
        data = [node.inputs[0]]
        if node.op == "Pad" and not _pads_with_zero(model, node):
            return False
        if node.op == "MaxPool" and (model.opset < 12 or len([o for o in node.outputs if o.name]) > 1):
            return False
    elif node.op in ("Relu", "Clip"):
        data = [node.inputs[0]]
        if node.op == "Clip" and _clip_bounds(model, node) is None:
            return False
    elif node.op in _OWN:
        data = list(node.inputs)
    else:
        return False
    if any(not t.name or isinstance(t, Constant) or t not in plan.quantized for t in data):
        return False
    return all(shapes[t].elem in (0, 1) for t in data)


def _pads_with_zero(model: Model, node: Node) -> bool:
    if node.attrs.get("mode", "constant") != "constant" or len(node.inputs) < 2:
        return False
    if len(node.inputs) > 2 and node.inputs[2].name:
        value = model.value(node.inputs[2])
        return value is not None and not value.any()
    return True


def _clip_bounds(model: Model, node: Node) -> tuple[float, float] | None:
    """Constant bounds of a Clip, infinite where absent; None if they are computed."""
    bounds = []
    for position, absent in ((1, float("-inf")), (2, float("inf"))):
        tensor = node.inputs[position] if len(node.inputs) > position and node.inputs[position].name else None
        value = None if tensor is None else model.value(tensor)
        if tensor is not None and value is None:
            return None
        bounds.append(absent if value is None else float(value.reshape(())))
    return bounds[0], bounds[1]


def _activation(model: Model, node: Node, outputs: set[Any], home: set[Node]) -> Node | None:
    """The Relu, or Clip from zero, that alone reads the node's output: quantization to u8 does its work."""
    value = node.outputs[0]
    if value in outputs or len(value.outputs) != 1 or value.outputs[0] not in home:
        return None
    follower: Node = value.outputs[0]
    if follower.domain or follower.op not in ("Relu", "Clip"):
        return None
    if follower.op == "Clip":
        bounds = _clip_bounds(model, follower)
        if bounds is None or bounds[0] != 0:
            return None
    return follower


def addend_of(view: Linear, outputs: set[Any], home: set[Node]) -> Node | None:
    """The Add that alone reads a MatMul and adds one constant per column."""
    value = view.node.outputs[0]
    if value in outputs or len(value.outputs) != 1 or value.outputs[0] not in home:
        return None
    follower: Node = value.outputs[0]
    if follower.op != "Add" or follower.domain:
        return None
    constant = next((t for t in follower.inputs if isinstance(t, Constant)), None)
    fits = constant is not None and constant.weight.size == view.outputs and constant.shape[-1:] == (view.outputs,)
    return follower if fits and constant is not None and len(constant.shape) == 1 else None


def _drop_idle(plan: Placement, outputs: set[Any]) -> None:
    """Take back units without weights whose results nobody reads as 8-bit: they would only add a conversion."""
    while True:
        used = {t for u in plan.units for t in u.node.inputs}
        idle = [
            u
            for u in plan.units
            if u.view is None
            and u.node.op not in ("AveragePool", "MaxPool", "Add")
            and not any(o in used for o in [u.output, *u.node.outputs])
        ]
        if not idle:
            return
        for unit in idle:
            plan.units.remove(unit)
            for output in [unit.output, *unit.node.outputs]:
                plan.quantized.pop(output, None)
                plan.same.pop(output, None)


def _share_with_concat(plan: Placement, outputs: set[Any]) -> None:
    """What only feeds a concatenation takes its scale: one rounding instead of two, and the kernel only copies."""
    for unit in plan.units:
        if unit.node.op == "Concat":
            for tensor in unit.node.inputs:
                alone = len(tensor.outputs) == 1 and tensor not in outputs and producer(tensor) is not None
                if alone and tensor not in plan.same and plan.root(unit.output) is not tensor:
                    plan.same[tensor] = unit.output
