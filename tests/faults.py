"""Passes with one fault among many correct rewrites, on models of this repository and one small graph besides.

A `Fault` wraps a correct pass and spoils what one of its rewrites left behind, whenever that rewrite is made. Each is a
mistake that passes really make: a wrong axis, a stale scale, a lost bias, a slice that is off by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from onnx.parser import parse_model

from onnxcomp import io
from onnxcomp.calibration.data import open_data
from onnxcomp.graph import Constant, Model, Node, producer
from onnxcomp.manager import Context, Effect, Pass, Pipeline
from onnxcomp.passes.fuse import Fuse
from onnxcomp.passes.quantize import Quantize
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto

__all__ = ["Fault", "Faulty", "FaultyLossy", "LosesBias", "Rebuild", "base", "faults", "samples"]

Array = npt.NDArray[Any]
MODELS = Path(__file__).resolve().parent.parent / "models"
SAMPLES = 4


@dataclass(frozen=True)
class Rebuild(Pass):
    """Makes every node of the main graph and its constants anew: correct, and as many rewrites as there are nodes."""

    name: ClassVar[str] = "rebuild"
    effect: ClassVar[Effect] = "float"

    def run(self, model: Model, ctx: Context) -> None:
        for node in list(model.graph.nodes):
            if ctx.allow(f"rebuild {node.label}"):
                for place, tensor in enumerate(node.inputs):
                    if isinstance(tensor, Constant):
                        node.inputs[place] = model.constant(model.graph, tensor.name, tensor.weight)
                node.attrs = dict(node.attrs)
                node.proto = None


@dataclass(frozen=True)
class Faulty(Pass):
    """`inner`, but where it makes the rewrite `at`, `spoil`(model) damages the model."""

    name: ClassVar[str] = "faulty"
    effect: ClassVar[Effect] = "float"

    inner: Pass
    at: str
    spoil: Callable[[Model], None]

    def run(self, model: Model, ctx: Context) -> Mapping[str, Any] | None:
        done = len(ctx.rewrites)
        details = self.inner.run(model, ctx)
        if self.at in ctx.rewrites[done:]:
            self.spoil(model)
        return details


@dataclass(frozen=True)
class FaultyLossy(Faulty):
    effect: ClassVar[Effect] = "lossy"


@dataclass(frozen=True)
class LosesBias(Pass):
    """Makes every Conv anew, and forgets the bias of the one called `at`: a fault with a name on the command line."""

    name: ClassVar[str] = "loses-bias"
    effect: ClassVar[Effect] = "float"

    at: str = ""

    def run(self, model: Model, ctx: Context) -> None:
        for node in model.graph.nodes:
            if node.op == "Conv" and ctx.allow(f"rebuild {node.label}"):
                node.inputs = node.inputs[: 2 if node.label == self.at else None]


@dataclass(frozen=True)
class Fault:
    """What goes wrong in which model, in which rewrite of which pass; `spoil`(model, node) does it to the node."""

    what: str
    model: str
    at: str
    node: str
    spoil: Callable[[Model, Node], None]
    inner: Pass = Rebuild()
    lossy: bool = False

    @property
    def faulty(self) -> Pass:
        def spoil(model: Model) -> None:
            self.spoil(model, next(n for n in model.graph.nodes if n.label == self.node))

        return (FaultyLossy if self.lossy else Faulty)(self.inner, self.at, spoil)


# --- models -----------------------------------------------------------------------------------------------------

_SIGNAL = """<ir_version: 10, opset_import: ["" : 17]>
signal (float[N, 8, 6, 6] x, int64[N, 4] ids) => (float[N, 5] y, int64[N] chosen)
<float[8, 8, 1, 1] w0, float[4] low, float[9, 4] table, float[4, 12] w1, float[1, 4, 1, 1] mean,
 float[1, 4, 1, 1] spread, float[16, 5] head, float[5] offset, int64[2] parts = {3, 5}, int64[2] fours = {4, 4},
 float[4] up = {1, 1, 2, 2},
 int64[8] pads = {0, 0, 1, 1, 0, 0, 0, 0}, float zero = {0}, int64[1] one = {1}, int64[1] six = {6}, int64[1] two = {2},
 int64[2] flat = {0, -1}, float half = {0.5}>
{
  a = Conv (x, w0)
  b, c = Split <axis = 1> (a, fours)
  d = Sub (b, c)
  e = Sub (d, mean)
  f = Div (e, spread)
  g = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"> (f, , up)
  h = Pad (g, pads, zero)
  i = Slice (h, one, six, two)
  j = Tanh (i)
  big = Greater (j, half)
  k = Where (big, j, i)
  l = ReduceMax <axes = [2, 3], keepdims = 0> (k)
  ll = ReduceMean <axes = [2, 3], keepdims = 0> (k)
  m = GlobalAveragePool (g)
  n = Flatten (m)
  o = Gather (table, ids)
  p = ReduceMean <axes = [1], keepdims = 0> (o)
  q = Concat <axis = 1> (l, n, p)
  r = MatMul (p, w1)
  s = Sigmoid (r)
  t = Mul (q, s)
  u = Pow (t, two_f)
  v = Concat <axis = 1> (u, ll)
  z = MatMul (v, head)
  y = Add (z, offset)
  chosen = ArgMax <axis = 1, keepdims = 0> (y)
}"""


def _signal() -> Model:
    """A small graph of operators that the trained models lack, with random weights."""
    rng = np.random.default_rng(7)
    text = _SIGNAL.replace("float half = {0.5}", "float half = {0.5}, float two_f = {2}")
    for declared in ("w0", "low", "table", "w1", "mean", "spread", "head", "offset"):
        place = text.index(f" {declared}")
        begin = text.rindex("float[", 0, place)
        shape = [int(d) for d in text[begin + 6 : text.index("]", begin)].split(",")]
        values = rng.uniform(0.5, 1.5, shape) if declared == "spread" else rng.standard_normal(shape)
        listed = ", ".join(f"{v:.6f}" for v in values.ravel())
        text = text[: place + len(declared) + 1] + f" = {{{listed}}}" + text[place + len(declared) + 1 :]
    return from_proto(parse_model(text))


@functools.cache
def _loaded(name: str) -> Model:
    """The model that the pass gets: `NAME+int8` quantized, digits_gru with folded weights."""
    if name == "signal":
        return _signal()
    stem, _, kind = name.partition("+")
    model = io.load(MODELS / f"{stem}.onnx")
    if stem == "digits_gru":
        Pipeline.parse("cleanup,fold-constants,cleanup").run(model, Context())
    if kind == "int8":
        calib = open_data(str(MODELS / "data" / f"{stem}.calib.npz"), open_session(model).inputs)
        plain = Quantize(ranges="minmax", rounding="nearest", bias_correction=False, islands=False)
        Fuse().run(model, Context())
        plain.run(model, Context(data=calib))
    return model


def base(name: str) -> Model:
    """The model of a fault, a copy."""
    return _loaded(name).copy()


@functools.cache
def samples(name: str) -> dict[str, Array]:
    """A few inputs of it."""
    if name == "signal":
        rng = np.random.default_rng(3)
        return {
            "x": rng.standard_normal((SAMPLES, 8, 6, 6)).astype(np.float32),
            "ids": rng.integers(0, 9, (SAMPLES, 4)),
        }
    with np.load(MODELS / "data" / f"{name.partition('+')[0]}.eval.npz") as data:
        return {k: data[k][:SAMPLES] for k in data.files if k != "labels"}


# --- what goes wrong --------------------------------------------------------------------------------------------

Spoil = Callable[[Model, Node], None]


def values(place: int, change: Callable[[Array], Array]) -> Spoil:
    """Another value of a constant input."""

    def spoil(model: Model, node: Node) -> None:
        old = node.inputs[place]
        new = np.ascontiguousarray(change(np.array(old.values))).astype(old.dtype)
        node.inputs[place] = model.constant(model.graph, old.name, new)

    return spoil


def attribute(**given: Any) -> Spoil:
    """Other attributes."""
    return lambda model, node: node.attrs.update(given)


def operator(op: str, **attrs: Any) -> Spoil:
    """Another operator."""

    def spoil(model: Model, node: Node) -> None:
        node.op, node.attrs = op, attrs
        if op in ("Identity", "Relu", "Tanh", "Sigmoid"):
            node.inputs = node.inputs[:1]

    return spoil


def inputs(*order: int) -> Spoil:
    """The inputs in another order, or one of them twice."""

    def spoil(model: Model, node: Node) -> None:
        node.inputs = [node.inputs[i] for i in order]

    return spoil


def outputs(*order: int) -> Spoil:
    def spoil(model: Model, node: Node) -> None:
        node.outputs = [node.outputs[i] for i in order]

    return spoil


def lost_bias(model: Model, node: Node) -> None:
    node.inputs = node.inputs[:2]


def through_half(model: Model, node: Node) -> None:
    """The result is rounded to 16 bits on the way."""
    result = node.outputs[0]
    exact, short = model.variable("exact"), model.variable("short")
    node.outputs[0] = exact
    model.graph.add("Cast", [exact], [short], attrs={"to": 10})
    model.graph.add("Cast", [short], [result], attrs={"to": 1})


def two_groups(model: Model, node: Node) -> None:
    """Depthwise taken for groups of two, with the odd channels reading the even ones."""
    weight = np.array(node.inputs[1].values)
    node.inputs[1] = model.constant(model.graph, "regrouped", np.concatenate([weight, weight * 0], axis=1))
    node.attrs["group"] = weight.shape[0] // 2


def skipped(model: Model, node: Node) -> None:
    """Whoever reads the node's result gets its first input instead."""
    model.redirect(node.outputs[0], node.inputs[0])


def stale(place: int) -> Spoil:
    """The node reads what the producer of its input read: that node is skipped for this reader."""

    def spoil(model: Model, node: Node) -> None:
        before = producer(node.inputs[place])
        assert before is not None
        node.inputs[place] = before.inputs[0]

    return spoil


def flipped(*axes: int) -> Callable[[Array], Array]:
    return lambda w: np.flip(w, axes)


def rolled(axis: int, by: int = 1) -> Callable[[Array], Array]:
    return lambda w: np.roll(w, by, axis)


def nan_in(w: Array) -> Array:
    w.reshape(-1)[3] = np.nan
    return w


def swapped(axis: int) -> Callable[[Array], Array]:
    """The first two slices change places."""

    def change(w: Array) -> Array:
        order = np.arange(w.shape[axis])
        order[:2] = 1, 0
        return np.take(w, order, axis)

    return change


D, K, T, G, S, R = "digits_denoiser", "digits_keras", "digits_transformer", "digits_gru", "signal", "digits_resnet"
DW = "functional_1/depthwise_conv2d_{}/depthwise"
POOL = "global_average_pooling2d_1"
BN = "functional_1/batch_normalization_{}/batchnorm/{}_1"


def rebuilt(what: str, model: str, node: str, spoil: Spoil) -> Fault:
    return Fault(what, model, f"rebuild {node}", node, spoil)


def fused(what: str, number: int, spoil: Spoil) -> Fault:
    """A mistake in folding the batch normalization behind one convolution of the residual network."""
    names = [(n.label, n.outputs[0].outputs[0].label) for n in _loaded(R).graph.nodes if n.op == "Conv"]
    conv, norm = names[number]
    return Fault(what, R, f"{norm} into {conv}", conv, spoil, Fuse())


def _int8(op: str, number: int) -> str:
    """The label of a node of the quantized denoiser."""
    found = [n for n in _loaded(f"{D}+int8").graph.nodes if n.op == op]
    return str(found[number].label)


def faults() -> list[Fault]:
    """All of them."""
    q, weight_dq = f"{D}+int8", [
        n.label for n in _loaded(f"{D}+int8").graph.nodes if n.op == "DequantizeLinear" and "axis" in n.attrs
    ]  # fmt: skip
    activation = _int8("QuantizeLinear", 4)
    return [
        rebuilt("transposed kernel", D, "/down/Conv", values(1, lambda w: w.swapaxes(2, 3))),
        rebuilt("padding at the wrong side", D, "/bottom/Conv", attribute(pads=[0, 0, 2, 2])),
        rebuilt("lost bias", D, "/widen/Conv", lost_bias),
        rebuilt("swapped filters", D, "/middle/Conv", values(1, swapped(0))),
        rebuilt("input channels off by one", D, "/refine/Conv", values(1, rolled(1))),
        rebuilt("wrong dilation", D, "/leave/Conv", attribute(dilations=[2, 2], pads=[2, 2, 2, 2])),
        rebuilt("stale slope", D, "/LeakyRelu_3", attribute(alpha=0.01)),
        rebuilt("dropped activation", D, "/LeakyRelu_4", operator("Identity")),
        rebuilt("wrong order of Concat", D, "/Concat_1", inputs(1, 0)),
        rebuilt("wrong depth order", D, "/shuffle/DepthToSpace", attribute(mode="DCR")),
        rebuilt("flipped kernel", D, "/up/ConvTranspose", values(1, flipped(2))),
        rebuilt("reversed per-channel factor", K, BN.format("8_1", "mul"), values(1, flipped(1))),
        rebuilt("shift of another layer's sign", K, BN.format("11_1", "add"), values(1, lambda v: -v)),
        rebuilt("clipped at zero only", K, "functional_1/re_lu_9_1/Relu6", values(2, lambda v: v * 0 + 1)),
        rebuilt("depthwise filters off by one", K, DW.format("4_1"), values(1, rolled(0))),
        rebuilt("wrong group", K, DW.format("3_1"), two_groups),
        rebuilt("same padding at the lower end", K, DW.format("1_2"), attribute(pads=[1, 1, 0, 0])),
        rebuilt("softmax over the wrong axis", K, "functional_1/dense_1/Softmax", attribute(axis=0)),
        rebuilt("largest instead of mean", K, f"functional_1/{POOL}/Mean", operator("GlobalMaxPool")),
        rebuilt("a residual branch twice", K, "functional_1/add_2_1/Add", inputs(0, 0)),
        rebuilt("NaN in a weight", K, "Conv__195", values(1, nan_in)),
        rebuilt("wrong permutation", T, "node_permute_1", attribute(perm=[2, 0, 3, 4, 1])),
        rebuilt("wrong epsilon", T, "node_layer_norm_3", attribute(epsilon=1e-2)),
        rebuilt("attention without its scale", T, "node_Mul_109", skipped),
        rebuilt("transposed weight", T, "node_MatMul_121", values(1, np.transpose)),
        rebuilt("query taken for value", T, "node_select_5", values(1, lambda v: v * 0)),
        rebuilt("another function of the same shape", T, "node_Erf_126", operator("Tanh")),
        rebuilt("positions off by one", T, "node_add_27", values(1, rolled(1))),
        rebuilt("rounded to 16 bits", T, "node_MatMul_123", through_half),
        rebuilt("stale factor of Gemm", T, "node_linear_12", attribute(alpha=0.5)),
        rebuilt("swapped gates", G, "/gru/GRU_1", values(1, lambda w: np.roll(w, 64, axis=1))),
        rebuilt("reset gate applied too early", G, "/gru/GRU", attribute(linear_before_reset=0)),
        rebuilt("mean over the wrong axis", G, "/ReduceMean", attribute(axes=[2])),
        rebuilt("swapped operands of Sub", S, "Sub(d)", inputs(1, 0)),
        rebuilt("truncated Resize", S, "Resize(g)", attribute(nearest_mode="ceil")),
        rebuilt("wrong end of Pad", S, "Pad(h)", values(1, rolled(0, 4))),
        rebuilt("slice starts off by one", S, "Slice(i)", values(1, lambda v: v * 0)),
        rebuilt("swapped parts of Split", S, "Split(b)", outputs(1, 0)),
        rebuilt("swapped branches of Where", S, "Where(k)", inputs(0, 2, 1)),
        rebuilt("rows of the table off by one", S, "Gather(o)", values(0, rolled(0))),
        rebuilt("smallest instead of largest", S, "ReduceMax(l)", operator("ReduceMin", axes=[2, 3], keepdims=0)),
        rebuilt("wrong exponent", S, "Pow(u)", values(1, lambda v: v + 1)),
        rebuilt("first of equals counted from behind", S, "ArgMax(chosen)", operator("ArgMin", axis=1, keepdims=0)),
        rebuilt("the value before the activation", S, "Mul(t)", stale(1)),
        rebuilt("wrong zero point", q, activation, values(2, lambda z: z + 3)),
        rebuilt("stale scale of an activation", q, _int8("QuantizeLinear", 6), values(1, lambda s: s * 1.25)),
        rebuilt("scales of other channels", q, weight_dq[4], values(1, rolled(0))),
        rebuilt("bias codes lost", q, weight_dq[-1], values(0, lambda b: b * 0)),
        fused("the mean is forgotten", 4, values(2, lambda b: b * 0)),
        fused("the factor on the wrong channels", 8, values(1, swapped(0))),
        fused("epsilon of another normalization", 11, values(1, lambda w: w * 1.001)),
        Fault(
            "scale taken from another layer", D, "/middle/Conv to int8", "/middle/Conv",
            lambda model, node: values(1, lambda s: s * 3)(model, node.inputs[1].inputs[0]),
            Quantize(ranges="minmax", rounding="nearest", bias_correction=False, islands=False), lossy=True,
        ),
    ]  # fmt: skip


