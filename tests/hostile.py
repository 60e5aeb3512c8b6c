"""Small graphs that optimizers get wrong: `CASES[name]()` gives the model, `feeds(model)` inputs for it.

Many of them broke OnnxSlim, onnxsim, onnxoptimizer or onnxscript in 2026: an input was removed, a random number
frozen, a training-mode normalization folded, a model made larger or invalid.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CASES: dict[str, Callable[[], onnx.ModelProto]] = {}
BN = "BatchNormalization(c, scale, bias, mean, var)"


def case(build: Callable[[], onnx.ModelProto]) -> Callable[[], onnx.ModelProto]:
    CASES[build.__name__] = build
    return build


def text(name: str, body: str, *, opset: int = 17, ir: int = 10, **weights: Any) -> None:
    """A case from the text of its graph, with arrays as initializers."""
    CASES[name] = lambda: parse(body, opset=opset, ir=ir, **weights)


def parse(body: str, *, opset: int = 17, ir: int = 10, **weights: Any) -> onnx.ModelProto:
    head = f'<ir_version: {ir}, opset_import: ["" : {opset}, "local" : 1, "com.microsoft" : 1]>'
    proto = onnx.parser.parse_model(head + body)
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items())
    return proto


def floats(*shape: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def statistics(channels: int, suffix: str = "", dtype: Any = np.float32) -> dict[str, Any]:
    """Parameters of a batch normalization."""
    found = {k: floats(channels + i, dtype=dtype)[:channels] for i, k in enumerate(("scale", "bias", "mean", "var"))}
    found["var"] = np.abs(found["var"]) + dtype(0.5)
    return {k + suffix: v for k, v in found.items()}


def feeds(proto: onnx.ModelProto) -> dict[str, Any]:
    """Inputs for the model; a symbolic dimension is 2 unless its name is a number of its own ("S5" is 5)."""
    random, found = np.random.default_rng(1), {}
    given = {i.name for i in proto.graph.initializer}
    for value in proto.graph.input:
        if value.name in given:
            continue
        kind = value.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else int(d.dim_param[1:] or 2) for d in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if kind.elem_type == TensorProto.BOOL:
            found[value.name] = np.ones(shape, bool)
        elif kind.elem_type == TensorProto.STRING:
            found[value.name] = np.full(shape, "word", object)
        elif dtype.kind in "iu":
            found[value.name] = random.integers(0, 3, shape).astype(dtype)
        else:
            found[value.name] = random.standard_normal(shape).astype(dtype)
    return found


# --- batch normalization and arithmetic ------------------------------------------------------------------------

CONV = "g (float[N,3,8,8] x) => (float[N,4,6,6] y) { c = Conv(x, w) y = %s }"
W = floats(4, 3, 3, 3)
text("conv_bn", CONV % BN, w=W, **statistics(4))
text("conv_of_doubles_bn", CONV.replace("float", "double") % BN, w=W.astype(float), **statistics(4, dtype=np.float64))
text(
    "conv_of_halves_bn",
    CONV.replace("float", "float16") % BN,
    w=W.astype(np.float16),
    **statistics(4, dtype=np.float16),
)
text("conv_bn_with_a_variance_near_zero", CONV % BN, w=W, **{**statistics(4), "var": np.float32([0, 1e-12, 1, 2])})
text("conv_bn_where_one_scale_is_zero", CONV % BN, w=W, **{**statistics(4), "scale": np.float32([0, 1, -1, 2])})
text(
    "conv_value_is_also_an_output",
    f"g (float[N,3,8,8] x) => (float[N,4,6,6] y, float[N,4,6,6] c) {{ c = Conv(x, w) y = {BN}"
    f" }}", w=W, **statistics(4),
)  # fmt: skip
text(
    "two_convs_share_a_weight",
    f"""g (float[N,3,8,8] x) => (float[N,4,6,6] y, float[N,4,6,6] z) {{ c = Conv(x, w) y = {BN} d = Conv(x, w)
    z = BatchNormalization(d, scale2, bias2, mean2, var2) }}""", w=W, **statistics(4), **statistics(4, "2"),
)  # fmt: skip
text(
    "grouped_transposed_conv_bn",
    f"g (float[N,4,8,8] x) => (float[N,6,10,10] y) {{ c = ConvTranspose<group=2>(x, w) y = {BN} }}",
    w=floats(4, 3, 3, 3), **statistics(6),
)  # fmt: skip
text(
    "bn_in_training_mode",
    """g (float[2,3,8,8] x) => (float[2,4,6,6] y) { c = Conv(x, w)
    y, m, v = BatchNormalization<training_mode=1>(c, scale, bias, mean, var) }""", w=W, **statistics(4),
)  # fmt: skip
text(
    "bn_scale_is_an_input",
    f"g (float[N,3,8,8] x, float[4] scale) => (float[N,4,6,6] y) {{ c = Conv(x, w) y = {BN} }}",
    w=W, **{k: v for k, v in statistics(4).items() if k != "scale"},
)  # fmt: skip
text(
    "bn_behind_a_matmul_normalizes_another_axis",
    "g (float[2,4,3] x) => (float[2,4,4] y) { c = MatMul(x, w) y = BatchNormalization(c, scale, zero, zero, var) }",
    w=floats(3, 4), zero=np.zeros(4, np.float32), **{k: v for k, v in statistics(4).items() if k in ("scale", "var")},
)  # fmt: skip
text(
    "gemm_bn", f"g (float[N,3] x) => (float[N,4] y) {{ c = Gemm<alpha=0.5, beta=2.0, transB=1>(x, w, b) y = {BN} }}",
    w=floats(4, 3), b=floats(4), **statistics(4),
)  # fmt: skip
text(
    "bn_before_a_padded_conv",
    "g (float[N,3,8,8] c) => (float[N,4,8,8] y) { d = BatchNormalization(c, scale, bias, mean, var)"
    " y = Conv<pads=[1,1,1,1]>(d, w) }", w=W, **statistics(3),
)  # fmt: skip
text(
    "bn_before_a_conv",
    "g (float[N,3,8,8] c) => (float[N,4,6,6] y) { d = BatchNormalization(c, scale, bias, mean, var) y = Conv(d, w) }",
    w=W, **statistics(3),
)  # fmt: skip
text(
    "bn_before_a_conv_of_a_branch",
    """g (float[1,3,8,8] c, bool flag) => (float[1,4,6,6] y) { d = BatchNormalization(c, scale, bias, mean, var)
    y = If (flag) <then_branch = t () => (float[1,4,6,6] a) { a = Conv(d, w) },
    else_branch = e () => (float[1,4,6,6] b) { b = Expand(one, shape) }> }""",
    w=W, one=np.float32(1), shape=[1, 4, 6, 6], **statistics(3),
)  # fmt: skip
text(
    "pad_before_a_conv_of_a_branch",
    """g (float[1,3,8,8] c, bool flag) => (float[1,4,8,8] y) { d = Pad(c, pads)
    y = If (flag) <then_branch = t () => (float[1,4,8,8] a) { a = Conv(d, w) },
    else_branch = e () => (float[1,4,8,8] b) { b = Expand(one, shape) }> }""",
    w=W, one=np.float32(1), shape=[1, 4, 8, 8], pads=[0, 0, 1, 1, 0, 0, 1, 1],
)  # fmt: skip
text("negative_pad_conv", "g (float[1,3,8,8] x) => (float[1,4,4,4] y) { p = Pad(x, pads) y = Conv(p, w) }",
     w=W, pads=[0, 0, -1, -1, 0, 0, -1, -1])  # fmt: skip
text("pad_before_a_conv_that_pads_itself",
     'g (float[1,3,8,8] x) => (float[1,4,10,10] y) { p = Pad(x, pads) y = Conv<auto_pad="SAME_UPPER">(p, w) }',
     w=W, pads=[0, 0, 1, 1, 0, 0, 1, 1])  # fmt: skip
text("pad_with_ones_conv", "g (float[1,3,8,8] x) => (float[1,4,8,8] y) { p = Pad(x, pads, one) y = Conv(p, w) }",
     w=W, pads=[0, 0, 1, 1, 0, 0, 1, 1], one=np.float32(1))  # fmt: skip
text("arithmetic_broadcasts_to_more_channels",
     "g (float[1,3,8,8] x) => (float[1,4,6,6] y) { c = Conv(x, w) y = Mul(c, k)"
     " }", w=floats(1, 3, 3, 3), k=floats(4, 1, 1))  # fmt: skip
text("arithmetic_broadcasts_along_the_width",
     "g (float[1,3,8,8] x) => (float[1,4,6,6] y) { c = Conv(x, w) y = Add(c, k) }", w=W, k=floats(6))  # fmt: skip
text("arithmetic_adds_an_axis",
     "g (float[1,3,8,8] x) => (float[2,1,4,6,6] y) { c = Conv(x, w) y = Add(c, k)"
     " }", w=W, k=floats(2, 1, 4, 1, 1))  # fmt: skip
text(
    "division_by_a_conv",
    "g (float[1,3,8,8] x) => (float[1,4,6,6] y) { c = Conv(x, w) y = Div(k, c) }",
    w=W,
    k=floats(4, 1, 1),
)
text("conv_chain_of_arithmetic", """g (float[1,3,8,8] x) => (float[1,4,6,6] y)
     { c = Conv(x, w) d = Mul(c, k) e = Sub(k, d) f = Div(e, k) y = Add(f, k) }""", w=W, k=floats(4, 1, 1))  # fmt: skip
text(
    "the_value_is_used_twice_in_one_node",
    "g (float[1,3,8,8] x) => (float[1,4,6,6] y) { c = Conv(x, w) y = Mul(c, c) }",
    w=W,
)
text(
    "matmul_of_a_vector_add",
    "g (float[4] x) => (float[3] y) { c = MatMul(x, w) y = Add(c, b) }",
    w=floats(4, 3),
    b=floats(3),
)
text(
    "matmul_of_a_matrix_add",
    "g (float[N,4] x) => (float[N,3] y) { c = MatMul(x, w) y = Add(b, c) }",
    w=floats(4, 3),
    b=floats(1, 3),
)
text(
    "matmul_add_grows",
    "g (float[1,4] x) => (float[2,3] y) { c = MatMul(x, w) y = Add(b, c) }",
    w=floats(4, 3),
    b=floats(2, 3),
)
text(
    "batched_matmul_add",
    "g (float[2,N,4] x) => (float[2,N,3] y) { c = MatMul(x, w) y = Add(c, b) }",
    w=floats(4, 3),
    b=floats(3),
)
text(
    "relu_clip",
    "g (float[N] x) => (float[N] y) { a = Relu(x) y = Clip(a, low, high) }",
    low=np.float32(-1),
    high=np.float32(0.5),
)

# --- constants -------------------------------------------------------------------------------------------------

text(
    "expand_to_a_megabyte",
    "g (float[512,512] x) => (float[512,512] y) { e = Expand(k, s) y = Add(x, e) }",
    k=floats(1, 512),
    s=[512, 512],
)
text("small_part_of_a_large_constant", """g (float[4] x) => (float[4] y)
     { k = Mul(a, a) e = Expand(k, s) r = ReduceSum<keepdims=0>(e, axes) y = Add(x, r) }""", a=floats(1, 4),
        s=[20000, 4], axes=[0])  # fmt: skip
text("quantized_weight", "g (float[N,3,8,8] x) => (float[N,4,6,6] y) { w = DequantizeLinear(q,"
     " s, z) y = Conv(x, w) }",
     q=(W * 50).astype(np.int8), s=np.float32(0.02), z=np.int8(0))  # fmt: skip
text("constant_float_attribute", "g (float[N] x) => (float[N] y) { k = Constant<value_float=2.0>() y = Mul(x, k) }")
text(
    "constant_int_attributes",
    "g (float[N,4] x) => (float[N,4] y) { k = Constant<value_ints=[0,-1]>() y = Reshape(x, k) }",
)
text(
    "constant_string_attribute",
    'g (string[N] x) => (bool[N] y) { k = Constant<value_string="word">() y = Equal(x, k) }',
    opset=19,
)
text(
    "empty_axes",
    "g (float[N,4] x) => (float[N,4] y) { y = ReduceSum<noop_with_empty_axes=1>(x, k) }",
    k=np.zeros(0, np.int64),
)
text(
    "zero_sized_constant",
    "g (float[N] x) => (float[N] y) { k = Relu(e) y = Concat<axis=0>(x, k) }",
    e=np.zeros(0, np.float32),
)
text("zero_sized_input", "g (float[0,4] x) => (float[4,0] y) { a = Relu(x) y ="
     " Reshape<allowzero=1>(a, s) }", s=[4, 0])
text("random_numbers", """g (float[2,2] x) => (float[2,2] y) { r = RandomNormal<shape=[2,2]>() s =
        RandomNormal<shape=[2,2]>()
     d = Sub(r, s) y = Add(x, d) }""")  # fmt: skip
text("dropout_in_training_mode", "g (float[N] x) => (float[N] y) { a = Dropout(x, r, t) b = Dropout(x,"
     " r, t) y = Sub(a, b) }",
     r=np.float32(0.5), t=np.bool_(True))  # fmt: skip
text("constant_condition", """g (float[4,4] x) => (float[4,4] y) { h = Relu(x) y = If (flag)
     <then_branch = t () => (float[4,4] a) { a = MatMul(h, w) }, else_branch = e () => (float[4,4] a) { a = Add(h,
        w) }> }""",
     w=floats(4, 4), flag=np.bool_(True))  # fmt: skip
text("constant_condition_of_nested_ifs", """g (float[4] x, bool c) => (float[4] y, float[4] z) { y, z = If (flag)
     <then_branch = t () => (float[4] a, float[4] b) { b = Identity(x)
        a = If (flag) <then_branch = u () => (float[4] p) { t1 = Relu(x) p = Neg(t1) }, else_branch = v () =>
        (float[4] p) { p = Abs(x) }> },
     else_branch = e () => (float[4] a, float[4] b) { b = If (c) <then_branch = q () => (float[4] p) { p = Neg(x) },
        else_branch = r () => (float[4] p) { p = Abs(x) }> a = Abs(x) }> }""", flag=np.bool_(True))  # fmt: skip
text("shape_with_start", "g (float[2,3,4] x) => (int64[2] y) { y = Shape<start=1>(x) }")
text("reshape_of_a_dynamic_batch", """g (float[N,3,4] x) => (float[N,12] y) { s = Shape(x) n = Gather(s, i) u =
        Unsqueeze(n, ax)
     t = Concat<axis=0>(u, m) y = Reshape(x, t) }""", i=np.int64(0), ax=[0], m=[-1])  # fmt: skip
text("expand_to_its_own_shape", """g (float[N,S5] x) => (float[N,S5] y) { s = Shape(x) o =
        ConstantOfShape<value=int64[1]{-1}>(two)
     e = Equal(s, o) k = Where(e, ones, s) a = Expand(x, k) y = Relu(a) }""", two=[2], ones=[1, 1])  # fmt: skip
text(
    "expand_that_broadcasts",
    """g (float[N,1] x, float[N,S5] z) => (float[N,S5] y) { s = Shape(z) a = Expand(x, s) y = Relu(a) }""",
)
text("dimension_of_a_deep_value", """g (float[N,4] x, float[M3] z) => (float[N] y) { a = Transpose<perm=[1,0]>(x) s
        = Shape(a)
     n = Slice(s, one, two) k = ConstantOfShape<value=float[1]{2.0}>(n) y = Relu(k) }""", one=[1], two=[2])  # fmt: skip
text(
    "gather_with_a_negative_index",
    "g (float[N,S5,4] x) => (int64 y) { s = Shape(x) a = Gather(s, i) y = Mul(a, a) }",
    i=np.int64(-1),
)

# --- neutral nodes and pairs -----------------------------------------------------------------------------------

text("unused_input", "g (float[N] x, float[N] mask) => (float[N] y) { y = Relu(x) }")
text("identity_from_input_to_output", "g (float[N] x) => (float[N] y, float[N] z) { y = Identity(x) z = Relu(x) }")
text("identity_of_a_value_with_two_roles", "g (float[N] x) => (float[N] y, float[N] z) { y = Relu(x) z ="
     " Identity(y) }")
text(
    "identity_of_a_weight_is_an_output",
    "g (float[N] x) => (float[2] y, float[2] z) { y = Identity(w) z = Identity(w) }",
    w=floats(2),
)
text("one_output_twice", "g (float[N] x) => (float[N] y, float[N] z) { a = Identity(x) y = Relu(a) z = Relu(x) }")
text("equal_nodes_are_outputs", "g (float[N] x) => (float[N] y, float[N] z) { y = Relu(x) z = Relu(x) }")
text("scalar_one_adds_an_axis", "g (float x) => (float[1] y) { y = Mul(x, one) }", one=np.ones(1, np.float32))
text("ones_broadcast", "g (float[1,4] x) => (float[3,4] y) { y = Mul(x, ones) }", ones=np.ones((3, 4), np.float32))
text("negative_zero_is_not_neutral", "g (float[N] x) => (float[N] y, float[N] z) { a = Mul(x, zero) y ="
     " Sub(a, minus) z = Add(a, zero) }",
     zero=np.float32(0), minus=np.float32(-0.0))  # fmt: skip
text("cast_chain_that_rounds", "g (float[N] x) => (float[N] y) { a = Cast<to=7>(x) y = Cast<to=1>(a) }")
text(
    "cast_chain_that_widens",
    "g (float[N] x) => (float[N] y, int32[N] z) { a = Cast<to=11>(x) y = Cast<to=1>(a) b = Cast<to=6>(x)"
    " c = Cast<to=7>(b) z = Cast<to=6>(c) }",
)
text(
    "transpose_chain",
    "g (float[2,3,4] x) => (float[4,2,3] y, float[2,3,4] z) { a = Transpose<perm=[1,2,0]>(x) y ="
    " Transpose<perm=[1,2,0]>(a) z = Transpose<perm=[2,0,1]>(a) }",
)
text("transpose_without_perm", "g (float[2,3,4] x) => (float[2,3,4] y) { a = Transpose(x) y = Transpose(a) }")
text(
    "transpose_of_ones",
    "g (float[1,33,1,8] x) => (float[33,8] y) { a = Transpose<perm=[1,0,2,3]>(x) y = Reshape(a, s) }",
    s=[33, 8],
)
text("squeeze_unsqueeze", """g (float[1,N,1] x) => (float[1,N,1] y, float[N] z) { a = Squeeze(x, ax) b =
        Unsqueeze(a, neg) y = Relu(b)
     c = Unsqueeze(a, ax) z = Squeeze(c, neg) }""", ax=[0, 2], neg=[-1, -3])  # fmt: skip
text(
    "unsqueeze_chain",
    "g (float[2,3] x) => (float[1,2,1,3,1] y) { a = Unsqueeze(x, p) y = Unsqueeze(a, q) }",
    p=[1, 3],
    q=[0],
)
text(
    "squeeze_chain", "g (float[1,2,1,3,1] x) => (float[2,3] y) { a = Squeeze(x, p) y = Squeeze(a, q) }", p=[0, 4], q=[1]
)
text(
    "reshape_that_copies_dimensions",
    "g (float[2,6] x) => (float[3,4] y) { a = Reshape(x, p) y = Reshape(a, q) }",
    p=[3, 4],
    q=[0, 4],
)
text(
    "concat_of_concat",
    "g (float[N,2] x) => (float[N,8] y, float[N,4] z) { z = Concat<axis=1>(x, x) y = Concat<axis=1>(z, z) }",
)
text("concat_in_a_concat", "g (float[N,2] x) => (float[N,5] y) { a = Concat<axis=1>(x, x) b ="
     " Relu(x) c = Concat<axis=-1>(a, k) d = Concat<axis=1>(a, k) y = Identity(d) }"
     .replace("c = Concat<axis=-1>(a, k) ", ""), k=np.ones((2, 1), np.float32))  # fmt: skip
text("slices_of_two_axes", "g (float[8,8] x) => (float[4,2] y) { a = Slice(x, one, five, zero) y"
     " = Slice(a, one, five, axis, step) }",
     one=[1], five=[5], zero=[0], axis=[-1], step=[2])  # fmt: skip
text("slice_backwards", "g (float[4] x) => (float[4] y) { y = Slice(x, s, e, a, m) }", s=[-1], e=[-9], a=[0], m=[-1])
text("pad_that_shifts", "g (float[4] x) => (float[4] y) { y = Pad(x, p) }", p=[1, -1])
text(
    "resize_to_the_same_size",
    'g (float[1,1,4,4] x) => (float[1,1,4,4] y) { y = Resize<mode="nearest">(x, , s) }',
    s=np.ones(4, np.float32),
)
text("where_that_broadcasts", "g (float[1,4] x) => (float[3,4] y) { y = Where(c, x, x) }", c=np.ones((3, 1), bool))
text("recurrent_state_of_zeros", """g (float[3,N,4] x) => (float[3,1,N,5] y) { s = Shape(x) n = Gather(s, i) t =
        Concat<axis=0>(one, n, five)
     h = ConstantOfShape(t) y, yh, yc = LSTM<hidden_size=5>(x, w, r, , , h, h) }""",
     i=[1], one=[1], five=[5], w=floats(1, 20, 4), r=floats(1, 20, 5))  # fmt: skip
text("cast_like", "g (float[N] x, float[N] k) => (float[N] y) { a = CastLike(x, k) y = Relu(a) }")
text(
    "sequence_of_tensors",
    "g (float[N] x) => (float[N] y) { s = SequenceConstruct(x, x) a = SequenceAt(s, i) y = Relu(a) }",
    i=np.int64(1),
)
text(
    "optional_inputs_are_empty",
    "g (float[N] x) => (float[N] y) { a = Clip(x, , high) y = Clip(a, low) }",
    low=np.float32(0),
    high=np.float32(1),
)
text(
    "strings",
    "g (string[N] x) => (string[M4] y) { a = Identity(x) y = Concat<axis=0>(a, k) }",
    k=np.array(["a", "ü"], object),
)
text(
    "duplicate_weights",
    "g (float[N,64] x) => (float[N,64] y) { a = MatMul(x, w) y = MatMul(a, v) }",
    w=floats(64, 64),
    v=floats(64, 64),
)
text(
    "weights_of_equal_bytes_and_other_types",
    "g (float[N] x) => (float[N] y) { a = Add(x, k) b = Cast<to=1>(j) y = Mul(a, b) }",
    k=np.float32(0),
    j=np.int32(0),
)
text(
    "infinities",
    "g (float[N] x) => (float[N] y, float[N] z) { y = Mul(x, i) z = Add(x, n) }",
    i=np.float32(np.inf),
    n=np.float32(np.nan),
)

# --- scopes ----------------------------------------------------------------------------------------------------

text("branches_capture_a_weight", """g (float[4,4] x, bool flag) => (float[4,4] y) { h = Relu(x) y = If (flag)
     <then_branch = t () => (float[4,4] a) { a = MatMul(h, w) }, else_branch = e () => (float[4,4] b) { b = Add(h,
        w) }> }""", w=floats(4, 4))  # fmt: skip
text("branch_repeats_outer_work", """g (float[4] x, bool flag) => (float[4] y) { h = Relu(x) z = Neg(h) y = If (flag)
     <then_branch = t () => (float[4] a) { p = Relu(x) q = Relu(x) a = Add(p, q) }, else_branch = e () => (float[4]
        b) { b = Add(z, h) }> }""")  # fmt: skip
text("branch_returns_an_outer_value", """g (float[4] x, bool flag) => (float[4] y) { h = Relu(x) y = If (flag)
     <then_branch = t () => (float[4] a) { a = Identity(h) }, else_branch = e () => (float[4] b) { b = Identity(x)
        }> }""")  # fmt: skip
text("unused_output_of_an_if", """g (float[4] x, bool flag) => (float[4] y) { y, z = If (flag)
     <then_branch = t () => (float[4] a, float[4] c) { a = Neg(x) c = Exp(x) }, else_branch = e () => (float[4] b,
        float[4] d) { b = Abs(x) d = Exp(x) }> }""")  # fmt: skip
text("loop_with_a_capture", """g (float[4] x, int64 n, bool go) => (float[4] y, float[K2,4] z) { h = Relu(x) k =
        Identity(h) y, z = Loop (n, go, x)
     <body = b (int64 i, bool c, float[4] s) => (bool c2, float[4] s2, float[4] o) { c2 = Identity(c) t = Add(s, k)
        s2 = Mul(t, one) o = Identity(s2) }> }""", one=np.float32(1))  # fmt: skip
text("scan_with_a_capture", """g (float[3,4] x, float[4] s) => (float[4] y, float[3,4] z) { k = Identity(w) y, z =
        Scan <num_scan_inputs=1,
     body = b (float[4] a, float[4] i) => (float[4] a2, float[4] o) { t = Add(a, i) a2 = Mul(t, k) o = Identity(a2)
        }> (s, x) }""", w=floats(4))  # fmt: skip
text("unused_output_of_a_loop", """g (float[4] x, int64 n, bool go) => (float[4] y) { y, z, v = Loop (n, go, x)
     <body = b (int64 i, bool c, float[4] s) => (bool c2, float[4] s2, float[4] o, float[4] p) { c2 = Identity(c)
     s2 = Neg(s) o = Exp(s) p = Log(s) }> }""")  # fmt: skip
text("unused_output_of_a_scan", """g (float[3,4] x, float[4] s) => (float[4] y, float[3,4] v) {
     y, z, v = Scan <num_scan_inputs=1, body = b (float[4] a, float[4] i) => (float[4] a2, float[4] o, float[4] p)
     { a2 = Add(a, i) o = Exp(i) p = Neg(i) }> (s, x) }""")  # fmt: skip
text("random_in_a_branch", """g (float[4] x, bool flag) => (float[4] y) { r = RandomNormal<shape=[4]>() y = If (flag)
     <then_branch = t () => (float[4] a) { s = RandomNormal<shape=[4]>() a = Add(x, s) }, else_branch = e () =>
        (float[4] b) { b = Add(x, r) }> }""")  # fmt: skip

FUNCTION = """<domain: "local", opset_import: ["" : 17, "local" : 1]> """


def with_function(name: str, body: str, function: str, **weights: Any) -> None:
    CASES[name] = lambda: parse(body + FUNCTION + function, **weights)


with_function(
    "local_function",
    "g (float[N] x) => (float[N] y) { y = local.F(x) }",
    "F (a) => (b) { t = Relu(a) u = Identity(t) b = Identity(u) }",
)
with_function("function_with_constants", "g (float[N] x) => (float[N] y) { y = local.F(x) }", """F (a) => (b) { k =
        Constant<value_float=2.0>()
    j = Constant<value=float {3.0}>() m = Mul(k, j) i = Identity(m) b = Mul(a, i) }""")  # fmt: skip
with_function(
    "function_with_an_attribute",
    "g (float[N] x) => (float[M4] y) { y = local.F<axis=0>(x) }",
    "F <axis> (a) => (b) { t = Identity(a) b = Concat<axis: int = @axis>(t, a) }",
)
with_function(
    "function_draws_random_numbers",
    "g (float[2] x) => (float[2] y) { a = local.F(x) b = local.F(x) d = Sub(a, b) y = Add(x, d) }",
    "F (a) => (b) { r = RandomNormalLike(a) b = Add(a, r) }",
)
with_function(
    "function_is_called_twice",
    "g (float[N] x) => (float[N] y) { a = local.F(x) b = local.F(x) y = Add(a, b) }",
    "F (a) => (b) { b = Exp(a) }",
)
with_function("function_is_not_called", "g (float[N] x) => (float[N] y) { y = Relu(x) }", "F (a) => (b) { b = Exp(a) }")
with_function(
    "function_reuses_names",
    "g (float[N] x, float[2,2] t) => (float[N] y, float[2,2] z) { y = local.F(x) z = Relu(t) }",
    "F (x) => (y) { t = Cast<to=7>(x) z = Cast<to=1>(t) y = Identity(z) }",
)
with_function("function_with_a_branch", "g (float[N] x, bool flag) => (float[N] y) { y = local.F(x, flag) }", """F
        (a, c) => (b) { k = Constant<value_float=2.0>()
    b = If (c) <then_branch = t () => (p) { q = Identity(k) p = Mul(a, q) }, else_branch = e () => (p) { p =
        Identity(a) }> }""")  # fmt: skip


@case
def overridable_weight() -> onnx.ModelProto:
    proto = CASES["conv_bn"]()
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3, 3, 3]))
    return proto


@case
def overridable_constants_are_not_folded() -> onnx.ModelProto:
    proto = parse(
        "g (float[N] x) => (float[N] y) { c = Add(a, b) d = Mul(x, a) y = Mul(d, c)"
        " }", a=np.float32(1), b=np.float32(2)
    )
    proto.graph.input.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, []))
    return proto


@case
def inputs_list_the_weights_as_before_ir_4() -> onnx.ModelProto:
    proto = CASES["conv_bn"]()
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return proto


@case
def weight_is_an_output() -> onnx.ModelProto:
    proto = parse(
        "g (float[N] x) => (float[N] y, float[2] w) { a = Add(x, w) y = Mul(a, v) }", w=floats(2), v=floats(2)
    )
    return proto


@case
def input_is_an_output() -> onnx.ModelProto:
    return parse("g (float[N] x) => (float[N] x, float[N] y) { a = Identity(x) y = Relu(a) }")


@case
def outputs_are_in_another_order_than_the_nodes() -> onnx.ModelProto:
    return parse("g (float[N] x) => (float[N] c, float[N] a, float[N] b) { a = Relu(x) b = Identity(a) c = Neg(b) }")


@case
def branch_hides_a_weight() -> onnx.ModelProto:
    """The branch has a weight of the same name; outside, a copy of the outer one is what the branch reads."""
    proto = parse(
        """g (float[2] x, bool flag) => (float[2] y) { k = Identity(w) y = If (flag)
        <then_branch = t () => (float[2] a) { p = Add(x, w) a = Mul(p, k) }, else_branch = e () => (float[2] b) { b
        = Add(x, k) }> }""",
        w=floats(2),
    )
    branch = next(a.g for n in proto.graph.node for a in n.attribute if a.name == "then_branch")
    branch.initializer.append(numpy_helper.from_array(np.float32([7, 8]), "w"))
    return proto


@case
def branches_hold_the_same_weight() -> onnx.ModelProto:
    proto = parse(
        """g (float[2,32] x, bool flag) => (float[2,32] y) { y = If (flag) <then_branch = t () => (float[2,32] a) {
        a = MatMul(x, w) },
        else_branch = e () => (float[2,32] b) { p = MatMul(x, v) b = Neg(p) }> }"""
    )
    for attribute, name in zip(proto.graph.node[0].attribute, "wv", strict=True):
        attribute.g.initializer.append(numpy_helper.from_array(floats(32, 32), name))
    return proto


@case
def branches_reuse_names() -> onnx.ModelProto:
    """Both branches, and after the first is taken the main graph, compute a value named t."""
    return parse(
        """g (float[2] x, bool c) => (float[2] y, float[2] z) { y = If (flag) <then_branch = p () => (float[2] a) {
        t = Relu(x) a = Exp(t) },
        else_branch = q () => (float[2] a) { t = Neg(x) a = Abs(t) }> z = If (c) <then_branch = r () => (float[2]
        a) { t = Abs(x) a = Exp(t) },
        else_branch = s () => (float[2] a) { t = Exp(x) a = Neg(t) }> }""",
        flag=np.bool_(True),
    )


@case
def names_with_odd_characters() -> onnx.ModelProto:
    names = ["a b", "x:0", "/é/∆", "'\"", "..\\n", "%s{}", "None"]
    nodes = [
        helper.make_node("Identity" if i % 2 else "Relu", [a], [b], name=a)
        for i, (a, b) in enumerate(itertools.pairwise(names))
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N"]) for n in (names[0], names[-1])]
    return helper.make_model(
        helper.make_graph(nodes, "\t", values[:1], values[1:]),
        ir_version=10,
        opset_imports=[helper.make_opsetid("ai.onnx", 17)],
    )


@case
def sparse_weight() -> onnx.ModelProto:
    proto = parse("g (float[N,4] x) => (float[N,4] y) { y = MatMul(x, w) }")
    sparse = proto.graph.sparse_initializer.add(dims=[4, 4])
    sparse.values.CopyFrom(helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0]))
    sparse.indices.CopyFrom(helper.make_tensor("", TensorProto.INT64, [2], [0, 5]))
    return proto


@case
def output_without_a_shape() -> onnx.ModelProto:
    proto = CASES["conv_bn"]()
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return proto


@case
def output_with_a_wrong_shape() -> onnx.ModelProto:
    """The declared shape of an output is only a hint; here it would make a Reshape look neutral."""
    proto = parse(
        "g (float[N,6] x) => (float[N,6] y, float[N] z) { y = Reshape(x, s) a = Reshape(y, t) z ="
        " ReduceSum<keepdims=0>(a, axes) }",
        s=[0, 2, 3],
        t=[0, -1],
        axes=[1],
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return proto


@case
def stale_value_info() -> onnx.ModelProto:
    proto = parse(
        "g (float[N,6] x) => (float[N] y) { a = Slice(x, s, e, ax) b = Reshape(a, t) y ="
        " ReduceSum<keepdims=0>(b, ax) }",
        s=[0],
        e=[3],
        ax=[1],
        t=[0, 3],
    )
    proto.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, ["N", 6]))
    return proto
