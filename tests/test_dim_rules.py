"""Every coupling rule against the definition: the pruned graph equals the original with the removed slices masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.passes.dim_probe import plain_form
from onnxcomp.passes.dim_proof import masked, provable, removal_error
from onnxcomp.passes.dims import Coupling, couple
from onnxcomp.passes.surgery import remove
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto

EXACT = 2e-5

# A graph that makes channels (m), the operator in the middle, and one that adds the channels up (s).
IMAGE = "net (float[batch, 3, 6, 6] x) => (float[batch, 2, h, w] y) {{ a = Conv (x, m) {} y = Conv (b, s) }}"
ROWS = "net (float[batch, 5, 3] x) => (float[batch, t, 2] y) {} {{ a = MatMul (x, m) {} y = MatMul (b, s) }}"

IMAGES: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "elementwise": ("c = Sigmoid (a) b = Mul (a, c)", {}),
    "constant operand": ("b = Add (a, k)", {"k": (8, 1, 1)}),
    "prelu": ("b = PRelu (a, k)", {"k": (8, 1, 1)}),
    "where": ("c = Greater (a, k) d = Neg (a) b = Where (c, a, d)", {"k": (1, 8, 1, 1)}),
    "batch norm": ("b = BatchNormalization (a, g, h, i, j)", {"g": (8,), "h": (8,), "i": (8,), "j": (8,)}),
    "instance norm": ("b = InstanceNormalization (a, g, h)", {"g": (8,), "h": (8,)}),
    "depthwise": ("b = Conv <group = 8> (a, k)", {"k": (8, 1, 3, 3)}),
    "depthwise with multiplier": (
        "c = Conv <group = 8> (a, k) b = Conv (c, l)", {"k": (16, 1, 3, 3), "l": (8, 16, 1, 1)},
    ),
    "narrow groups": ("b = Conv <group = 4> (a, k, h)", {"k": (8, 2, 3, 3), "h": (8,)}),
    "transposed": ("b = ConvTranspose (a, k, h)", {"k": (8, 8, 2, 2), "h": (8,)}),
    "transposed groups": ("b = ConvTranspose <group = 4> (a, k)", {"k": (8, 2, 2, 2)}),
    "pools": ("c = MaxPool <kernel_shape = [2, 2]> (a) b = AveragePool <kernel_shape = [2, 2]> (c)", {}),
    "gate": ("c = GlobalAveragePool (a) d = Conv (c, k) e = Sigmoid (d) b = Mul (a, e)", {"k": (8, 8, 1, 1)}),
    "concat": ("c = Relu (a) d = Concat <axis = 1> (a, c) b = Conv (d, k)", {"k": (8, 16, 1, 1)}),
    "split": ("c, d = Split <axis = 1> (a) e = Mul (c, d) b = Conv (e, k)", {"k": (8, 4, 1, 1)}),
    "transpose": ("c = Transpose <perm = [0, 2, 3, 1]> (a) d = Tanh (c) b = Transpose <perm = [0, 3, 1, 2]> (d)", {}),
    "depth to space": ("c = DepthToSpace <blocksize = 2> (a) b = Conv (c, k)", {"k": (8, 2, 1, 1)}),
    "depth to space by column": (
        'c = DepthToSpace <blocksize = 2, mode = "CRD"> (a) b = Conv (c, k)', {"k": (8, 2, 1, 1)},
    ),
    "space to depth": ("c = SpaceToDepth <blocksize = 2> (a) b = Conv (c, k)", {"k": (8, 32, 1, 1)}),
    "reduced positions": ("c = ReduceMean <axes = [2, 3]> (a) b = Mul (a, c)", {}),
    "summed channels": ("c = Conv (a, k) d = ReduceSum (c, ax) e = Mul (a, d) b = Relu (e)", {"k": (6, 8, 1, 1)}),
    "dropout": ("b = Dropout (a)", {}),
}  # fmt: skip

SEQUENCES: dict[str, tuple[str, str, dict[str, tuple[int, ...]]]] = {
    "gemm": ("<int64[2] f = {-1, 8}, int64[3] g = {-1, 5, 8}>",
             "c = Reshape (a, f) d = Gemm <transB = 1> (c, k, h) b = Reshape (d, g)", {"k": (8, 8), "h": (8,)}),
    "scores of queries and keys": ("", "c = MatMul (x, k) d = Transpose <perm = [0, 2, 1]> (c) e = MatMul (a, d) "
                                   "f = Softmax (e) b = MatMul (f, a)", {"k": (3, 8)}),
    "heads": ("<int64[4] f = {0, 5, 4, 2}, int64[3] g = {0, 5, 8}>",
              "c = Reshape (a, f) d = Transpose <perm = [0, 2, 1, 3]> (c) e = Transpose <perm = [0, 1, 3, 2]> (d) "
              "i = MatMul (d, e) j = Softmax (i) k = MatMul (j, d) l = Transpose <perm = [0, 2, 1, 3]> (k) "
              "b = Reshape (l, g)", {}),
    "slices": ("<int64[1] f = {0}, int64[1] g = {4}, int64[1] h = {8}, int64[1] i = {2}>",
               "c = Slice (a, f, g, i) d = Slice (a, g, h, i) e = Mul (c, d) b = Concat <axis = 2> (e, d)", {}),
    "every second slice": ("<int64[1] f = {0}, int64[1] g = {8}, int64[1] h = {2}>",
                           "c = Slice (a, f, g, h, h) b = Concat <axis = 2> (c, c)", {}),
    "gather": ("<int64[4] f = {6, 1, 1, 3}>", "c = Gather <axis = 2> (a, f) b = Concat <axis = 2> (c, c)", {}),
    "scattered channels": ("<int64[4, 1] f = {6, 1, -5, 0}, int64[1] g = {0}, int64[1] h = {4}>",
                           "c = Transpose <perm = [2, 0, 1]> (a) d = Slice (c, g, h, g) e = Relu (d) "
                           "i = ScatterND (c, f, e) b = Transpose <perm = [1, 2, 0]> (i)", {}),
    "scattered grid": ("<int64[2, 2, 2] f = {1, 2, 1, 5, 3, 2, 3, 5}, int64[2] g = {0, 0}, int64[2] h = {2, 2}>",
                       "c = ReduceMean <axes = [0], keepdims = 0> (a) d = Slice (c, g, h) e = ScatterND (c, f, d) "
                       "b = Add (a, e)", {}),
    "padding": ("<int64[6] f = {0, 0, 2, 0, 0, 3}>", "c = Pad (a, f) d = Add (c, k) b = MatMul (d, l)",
                {"k": (13,), "l": (13, 8)}),
    "shuffle": ("<int64[4] f = {0, 5, 2, 4}, int64[3] g = {0, 5, 8}>",
                "c = Reshape (a, f) d = Transpose <perm = [0, 1, 3, 2]> (c) b = Reshape (d, g)", {}),
    "repeated for the batch": (
        "<int64[1] f = {0}, int64[2] g = {5, 1}>",
        "c = Shape (x) d = Gather (c, f) e = Concat <axis = 0> (d, g) i = Tile (k, e) b = Add (a, i)",
        {"k": (1, 1, 8)}),
    "expand": ("<int64[3] f = {1, 5, 8}>", "c = Expand (k, f) b = Add (a, c)", {"k": (1, 1, 8)}),
    "shape computed from the batch": (
        "<int64[1] f = {0}, int64[1] g = {5}, int64[2] h = {2, 4}, int64[1] k = {8}, int64[1] p = {5}>",
        "c = Shape (x) d = Gather (c, f) e = Concat <axis = 0> (d, g, h) i = Reshape (a, e) j = Tanh (i) "
        "l = Concat <axis = 0> (d, p, k) b = Reshape (j, l)", {}),
    "lstm": ("", "c = Transpose <perm = [1, 0, 2]> (a) d, e = LSTM <hidden_size = 4> (c, k, l, n) f = Squeeze (d, one) "
             "g = Transpose <perm = [1, 0, 2]> (f) b = MatMul (g, o)",
             {"k": (1, 16, 8), "l": (1, 16, 4), "n": (1, 32), "o": (4, 8)}),
    "gru in both directions": ("<int64[3] r = {0, 0, -1}>", "c = Transpose <perm = [1, 0, 2]> (a) "
                               "d = GRU <hidden_size = 4, "
                               'direction = "bidirectional"> (c, k, l, n) e = Transpose <perm = [2, 0, 1, 3]> (d) '
                               "f = Reshape (e, r) b = MatMul (f, o)",
                               {"k": (2, 12, 8), "l": (2, 12, 4), "n": (2, 24), "o": (8, 8)}),
    "rnn": ("", "c = Transpose <perm = [1, 0, 2]> (a) d = RNN <hidden_size = 4> (c, k, l) f = Squeeze (d, one) "
            "g = Transpose <perm = [1, 0, 2]> (f) b = MatMul (g, o)", {"k": (1, 4, 8), "l": (1, 4, 4), "o": (4, 8)}),
    "einsum": ("", 'c = Einsum <equation = "bti,ij->btj"> (a, k) b = Relu (c)', {"k": (8, 8)}),
    "fused attention": ("", "c = com.microsoft.Attention <num_heads = 4> (a, k, h) b = Relu (c)",
                        {"k": (8, 24), "h": (24,)}),
    "fused attention of three": (
        "", "c = MatMul (a, k) d = MatMul (a, l) e = MatMul (a, n) "
        "b = com.microsoft.MultiHeadAttention <num_heads = 4> (c, d, e)", {"k": (8, 8), "l": (8, 8), "n": (8, 8)}),
    "If": ("", "c = ReduceMax <keepdims = 0> (x) d = Greater (c, zero) b = If (d) "
           "<then_branch = t () => (float[batch, 5, 8] p) "
           "{ p = Relu (a) }, else_branch = e () => (float[batch, 5, 8] q) { q = Neg (a) }>", {}),
}  # fmt: skip


def load(text: str, shapes: dict[str, tuple[int, ...]]) -> Coupling:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> {text}')
    rng = np.random.default_rng(3)
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32)
        values = np.abs(values) + 0.1 if name == "j" else values  # a variance
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    for name, array in (("ax", np.array([1])), ("one", np.array([1])), ("zero", np.float32(0))):
        if f"{name})" in text:
            model.graph.initializer.append(numpy_helper.from_array(array, name))
    return couple(plain_form(from_proto(model)))


def some_units(coupling: Coupling, seed: int) -> list[int]:
    """A random part of every group, at least one unit and never all that lies in an axis."""
    rng = np.random.default_rng(seed)
    chosen: list[int] = []
    for group in coupling.groups:
        count = int(rng.integers(1, max(group.width, 2)))
        units = rng.choice(group.units, count, replace=False).tolist() if group.width > 1 else []
        chosen.extend(units if provable(coupling, units) else [])
    while empty := coupling.emptied(coupling.mask(chosen)):
        chosen.remove(next(unit for unit in chosen if unit in empty))
    return chosen


def assert_exact(coupling: Coupling, units: Sequence[int]) -> None:
    cut = remove(coupling, units)
    onnx.checker.check_model(cut.model.to_bytes())
    feeds = [f for f in (coupling.probe.feeds, coupling.probe.larger) if f is not None]
    assert removal_error(coupling, units, cut.model, feeds) < EXACT
    whole = open_session(coupling.model, optimize=False).run(feeds[0])[0]
    without = open_session(masked(coupling, units), optimize=False).run(feeds[0])[0]
    assert not np.allclose(whole, without), "the mask hides nothing"


@pytest.mark.parametrize("name", IMAGES)
def test_removal_from_images_is_exact(name: str) -> None:
    middle, shapes = IMAGES[name]
    found = load(IMAGE.format(middle), {"m": (8, 3, 1, 1), "s": (2, 8, 1, 1), **shapes})
    assert found.groups
    assert not found.unknown
    assert not found.failed
    for seed in range(3):
        assert_exact(found, some_units(found, seed))


@pytest.mark.parametrize("name", SEQUENCES)
def test_removal_from_sequences_is_exact(name: str) -> None:
    constants, middle, shapes = SEQUENCES[name]
    found = load(ROWS.format(constants, middle), {"m": (3, 8), "s": (8, 2), **shapes})
    assert found.groups
    assert not found.unknown
    assert not found.failed
    for seed in range(3):
        assert_exact(found, some_units(found, seed))


def test_wide_groups_lose_the_same_channels_of_every_group() -> None:
    found = load(
        IMAGE.format("b = Conv <group = 2> (a, k)"), {"m": (24, 3, 1, 1), "k": (32, 12, 3, 3), "s": (2, 32, 1, 1)}
    )
    assert sorted(g.width for g in found.groups) == [12, 16]
    assert_exact(found, some_units(found, 0))


def test_a_group_norm_loses_whole_groups() -> None:
    text = """net (float[batch, 3, 6, 6] x) => (float[batch, 2, 6, 6] y)
    <int64[3] split = {0, 4, -1}> {
        a = Conv (x, m)
        shape = Shape (a)
        c = Reshape (a, split)
        d = InstanceNormalization (c, g, h)
        e = Reshape (d, shape)
        b = Mul (e, k)
        y = Conv (b, s)
    }"""
    shapes = {"m": (8, 3, 1, 1), "g": (4,), "h": (4,), "k": (8, 1, 1), "s": (2, 8, 1, 1)}
    found = load(text, shapes)
    assert [g.width for g in found.groups] == [4]
    assert_exact(found, some_units(found, 0))


def test_a_loop_carries_channels() -> None:
    body = """b = Loop (trips, go, a)
    <body = l (int64 i, bool c, float[batch, 5, 8] p) => (bool d, float[batch, 5, 8] q)
    { d = Identity (c) r = MatMul (p, k) q = Tanh (r) }>"""
    text = ROWS.format("<int64 trips = {3}, bool go = {1}>", body)
    found = load(text, {"m": (3, 8), "s": (8, 2), "k": (8, 8)})
    assert [g.width for g in found.groups] == [8]
    assert_exact(found, some_units(found, 0))


def test_a_scan_carries_channels() -> None:
    body = """c = Transpose <perm = [1, 0, 2]> (a) z = ReduceSum <keepdims = 0> (c, first)
    e, f = Scan <num_scan_inputs = 1,
    body = l (float[batch, 8] p, float[batch, 8] q) => (float[batch, 8] r, float[batch, 8] u)
    { t = Add (p, q) r = Tanh (t) u = Identity (r) }> (z, c) b = Transpose <perm = [1, 0, 2]> (f)"""
    text = ROWS.format("<int64[1] first = {0}>", body)
    found = load(text, {"m": (3, 8), "s": (8, 2)})
    assert [g.width for g in found.groups] == [8]
    assert_exact(found, some_units(found, 0))


# --- random graphs ------------------------------------------------------------------------------------------


class Builder:
    """A random network on images: every value has 4 x 4 positions, widths vary."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.widths: dict[str, int] = {}

    def node(self, op: str, inputs: list[str], width: int, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        self.widths[name] = width
        return name

    def constant(self, values: Any) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def conv(self, x: str, width: int, group: int = 1, kernel: int = 1) -> str:
        inner = self.widths[x] // group
        values = self.rng.normal(size=(width, inner, kernel, kernel)) / np.sqrt(inner * kernel**2)
        bias = self.constant(self.rng.normal(size=width).astype(np.float32))
        pads = [kernel // 2] * 4
        return self.node("Conv", [x, self.constant(values.astype(np.float32)), bias], width, group=group, pads=pads)

    def step(self, kind: str, x: str, y: str) -> str:
        width = self.widths[x]
        if kind == "conv":
            return self.conv(x, int(self.rng.choice([4, 6, 8, 12])), kernel=3)
        if kind == "depthwise":
            return self.conv(x, width, width, 3)
        if kind == "groups":
            return self.conv(x, width, 2)
        if kind == "add":
            return self.node("Add", [x, y if self.widths[y] == width else self.conv(y, width)], width)
        if kind == "concat":
            return self.node("Concat", [x, y], width + self.widths[y], axis=1)
        if kind == "half":
            bounds = [self.constant(np.array([v])) for v in (width // 2, width, 1)]
            return self.node("Slice", [x, *bounds], width // 2)
        if kind == "shuffle":
            split = self.node("Reshape", [x, self.constant(np.array([0, 2, width // 2, 4, 4]))], 0)
            turned = self.node("Transpose", [split], 0, perm=[0, 2, 1, 3, 4])
            return self.node("Reshape", [turned, self.constant(np.array([0, -1, 4, 4]))], width)
        if kind == "gate":
            gate = self.node("Sigmoid", [self.conv(self.node("GlobalAveragePool", [x], width), width)], width)
            return self.node("Mul", [x, gate], width)
        if kind == "pad":
            return self.node("Pad", [x, self.constant(np.array([0, 1, 0, 0, 0, 1, 0, 0]))], width + 2)
        return self.node(str(self.rng.choice(["Relu", "Tanh", "Neg"])), [x], width)


KINDS = ("conv", "depthwise", "groups", "add", "concat", "half", "shuffle", "gate", "pad", "unary")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 2**16), st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 99)), min_size=2, max_size=9))
def test_removal_from_random_graphs_is_exact(seed: int, steps: list[tuple[str, int]]) -> None:
    build = Builder(seed)
    build.widths["x"] = 3
    values = [build.conv("x", 8)]
    for kind, pick in steps:
        x = values[-1]
        if build.widths[x] % 2 or build.widths[x] > 48:
            values.append(build.conv(x, 8))
            x = values[-1]
        values.append(build.step(kind, x, values[pick % len(values)]))
    y = build.conv(values[-1], 2)
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", c, 4, 4]) for n, c in (("x", 3), (y, 2))]
    graph = helper.make_graph(build.nodes, "random", info[:1], info[1:], build.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found = couple(plain_form(from_proto(model)))
    assert not found.failed
    units = some_units(found, seed)
    cut = remove(found, units)
    feeds = [f for f in (found.probe.feeds, found.probe.larger) if f is not None]
    assert removal_error(found, units, cut.model, feeds) < EXACT
