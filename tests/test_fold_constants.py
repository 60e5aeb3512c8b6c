"""fold-constants: what is computed, what stays, and what shapes are known."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxcomp.manager import Context, Pipeline
from onnxcomp.passes.shape_values import ShapeValues
from onnxcomp.serde import from_proto
from onnxcomp.shapes import infer
from tests import hostile
from tests.conformance import graphs


def folded(body, *, spec="fold-constants", opset=17, **weights):
    model = from_proto(hostile.parse(body, opset=opset, **weights))
    Pipeline.parse(spec).run(model, Context())
    return onnx.ModelProto.FromString(model.to_bytes())


def ops(proto):
    return " ".join(sorted(n.op_type for g in graphs(proto) for n in g.node))


def constants(proto):
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def test_a_constant_subgraph_becomes_one_initializer():
    proto = folded(
        "g (float[N,2] x) => (float[N,2] y) { a = Exp(k) b = Mul(a, k) c = Add(a, b) y = Mul(x, c) }",
        k=hostile.floats(2),
    )

    (value,) = constants(proto).values()
    assert ops(proto) == "Mul"
    assert value.dtype == np.float32


@pytest.mark.parametrize(
    ("attribute", "dtype"), [("value_float=2.0", "f4"), ("value_int=2", "i8"), ("value_floats=[1.0]", "f4")]
)
def test_constant_attributes_have_the_type_of_the_specification(attribute, dtype):
    proto = folded(
        f"g (float[N] x) => (float[N] y) {{ k = Constant<{attribute}>() a = Neg(k) b = Cast<to=1>(a) y ="
        f" Mul(x, b) }}",
        spec="cleanup",
    )

    assert [v.dtype for v in constants(proto).values()] == [np.dtype(dtype)]


def test_what_grows_beyond_the_budget_stays_a_node():
    body = (
        "g (float[N,64] x) => (float[N,64] y) { a = Exp(k) b = Tile(a, r) c = ReduceSum<keepdims=0>(b) y"
        " = Mul(x, c) }"
    )
    assert ops(folded(body, k=hostile.floats(1, 64), r=[200, 1])) == "Mul"

    body = "g (float[N,64] x) => (float[N,64] y) { a = Exp(k) b = Tile(a, r) y = Add(x, b) }"
    assert ops(folded(body, k=hostile.floats(1, 64), r=[200, 1])) == "Add Tile"
    assert ops(folded(body, spec="fold-constants:growth=100000", k=hostile.floats(1, 64), r=[200, 1])) == "Add"


def test_a_huge_intermediate_is_never_computed():
    body = "g (float[N] x) => (float[N] y) { a = ConstantOfShape(s) b = ReduceMax<keepdims=0>(a) y = Add(x, b) }"

    assert ops(folded(body, s=[1 << 20, 1 << 20])) == "Add ConstantOfShape ReduceMax"


def test_quantized_weights_stay_quantized():
    assert ops(folded("g (float[N] x) => (float[N] y) { w = DequantizeLinear(q, s) v = Neg(w) y = Mul(x, v) }",
                      q=np.int8([3]), s=np.float32(0.1))) == "DequantizeLinear Mul Neg"  # fmt: skip


def test_random_numbers_and_what_depends_on_them_stay():
    assert ops(
        folded(
            "g (float[2] x) => (float[2] y) { r = RandomUniformLike(k) a = Exp(r) y = Mul(x, a)"
            " }", k=hostile.floats(2)
        )
    ) == ("Exp Mul RandomUniformLike")


def test_a_node_that_the_runtime_cannot_compute_does_not_spoil_the_others():
    body = """g (float[N] x, float[2] z) => (float[N] y, float[2] v) { a = Reshape(k, bad) b = Add(z, a)
    v = Identity(b) c = Exp(j) y = Mul(x, c) }"""

    assert ops(folded(body, k=hostile.floats(2), bad=[7], j=np.float32(1))) == "Add Identity Mul Reshape"


@pytest.mark.parametrize(
    ("nodes", "entries"),
    [
        ("v = Shape(x)", ["N", 3, "M"]),
        ("v = Shape<start=1>(x)", [3, "M"]),
        ("v = Shape<start=-1>(x)", ["M"]),
        ("v = Shape<start=-9, end=9>(x)", ["N", 3, "M"]),
        ("s = Shape(x) v = Gather(s, i2)", ["M"]),
        ("s = Shape(x) v = Gather(s, m)", ["M"]),
        ("s = Shape(x) v = Slice(s, one, two)", [3]),
        ("s = Shape(x) v = Slice(s, m, far, zero, m)", ["M", 3, "N"]),
        ("s = Shape(x) v = Concat<axis=0>(s, two)", ["N", 3, "M", 2]),
        ("s = Shape(x) v = Mul(s, two)", ["(2 * N)", 6, "(2 * M)"]),
        ("s = Shape(x) v = Mul(two, s)", ["(2 * N)", 6, "(2 * M)"]),
        ("s = Shape(x) v = Mul(s, one)", ["N", 3, "M"]),
        ("s = Shape(x) v = Sub(s, s)", [0, 0, 0]),
        ("s = Shape(x) v = Div(s, two)", ["(N / 2)", 1, "(M / 2)"]),
        ("v = Div(k, two)", [-3]),
        ("s = Shape(x) v = Equal(s, m)", [0, 0, 0]),
        ("s = Shape(x) v = Equal(s, s)", [1, 1, 1]),
        ("s = Shape(x) v = Equal(s, two)", [None, 0, None]),
        ("s = Shape(x) e = Equal(s, m) v = Where(e, one, s)", ["N", 3, "M"]),
        ("s = Shape(x) e = Equal(s, two) v = Where(e, one, s)", [None, 3, None]),
        ("v = Range(z0, z5, z2)", [0, 2, 4]),
        ("s = Shape(x) v = ReduceProd<keepdims=0>(s, zero)", ["((3 * N) * M)"]),
        ("v = ConstantOfShape<value=int64[1] {7}>(two)", [7, 7]),
        ("s = Shape(x) c = Cast<to=6>(s) v = Cast<to=7>(c)", ["N", 3, "M"]),
        ("s = Shape(x) g = Gather(s, z0) v = Unsqueeze(g, zero)", ["N"]),
        ("s = Shape(x) v = Max(s, one)", [None, 3, None]),
    ],
)
def test_shape_arithmetic_is_known_in_part(nodes, entries):
    weights = {
        "one": [1], "two": [2], "zero": [0], "m": [-1], "far": [-99], "i2": [2], "k": [-7],
        "z0": np.int64(0), "z5": np.int64(5), "z2": np.int64(2),
    }  # fmt: skip
    model = from_proto(hostile.parse(f"g (float[N,3,M] x) => (int64[K] y) {{ {nodes} y = Identity(v) }}", **weights))

    values = ShapeValues(model, model.graph, infer(model))

    assert values[model.graph.nodes[-1].inputs[0]] == entries


def test_equal_symbolic_shapes_are_computed_once():
    body = """g (float[N,S,4] x, float[N,S,4] z) => (float[N,S,2,2] y, float[N,S,2,2] v) { s = Shape(x)
    n = Slice(s, zero, two) c = Concat<axis=0>(n, tail) y = Reshape(x, c) t = Shape(z) m = Slice(t, zero, two)
    d = Concat<axis=0>(m, tail) v = Reshape(z, d) }"""

    assert ops(folded(body, zero=[0], two=[2], tail=[2, 2])) == "Reshape Reshape"


def test_a_target_with_two_unknown_dimensions_stays():
    body = """g (float[N,M] x) => (float[A,B,C] y) { s = Shape(x) h = Div(s, two)
    c = Concat<axis=0>(h, four) y = Reshape(x, c) }"""

    assert "Reshape" in ops(folded(body, two=[2], four=[4]))
    assert "Shape" in ops(folded(body, two=[2], four=[4])).split()


def test_a_dimension_comes_from_the_input_not_from_deep_in_the_graph():
    proto = folded(
        "g (float[N,4] x) => (int64 y) { a = Transpose<perm=[1,0]>(x) b = Exp(a) s = Shape(b) y = Gather(s, i) }",
        i=np.int64(1),
    )

    assert ops(proto) == "Gather Shape"
    assert proto.graph.node[0].input[0] == "x"


def test_a_wrong_declared_shape_is_not_believed():
    proto = hostile.CASES["stale_value_info"]()
    model = from_proto(proto)

    assert infer(model)[model.graph.nodes[0].outputs[0]].shape == ("N", 3)


def test_values_of_functions_are_not_mixed_up_with_those_of_the_graph():
    model = from_proto(hostile.CASES["function_reuses_names"]())
    inner = model.functions[0].body.nodes[0].inputs[0]

    assert inner.name == "x"
    assert infer(model)[inner].shape is None


def test_names_in_two_branches_are_told_apart():
    model = from_proto(hostile.CASES["branches_reuse_names"]())
    shapes = infer(model)

    found = [n.outputs[0] for s in model.scopes() for n in s.nodes if n.outputs[0].name == "t"]
    assert len(found) == 4
    assert all(shapes[t].shape == (2,) for t in found)


def test_the_branch_that_is_taken_keeps_the_names_of_outputs():
    proto = folded(TWO_BRANCHES, spec="fold-constants,cleanup", flag=np.bool_(False))

    assert [v.name for v in proto.graph.output] == ["y", "z"]
    assert ops(proto) == "Abs Identity"


TWO_BRANCHES = """g (float[2] x) => (float[2] y, float[2] z) { y, z = If (flag)
    <then_branch = t () => (float[2] a, float[2] b)
    { a = Exp(x) b = Identity(a) }, else_branch = e () => (float[2] a, float[2] b) { a = Abs(x) b = Identity(x) }> }"""


def test_a_run_on_its_own_result_does_nothing():
    model = from_proto(hostile.CASES["reshape_of_a_dynamic_batch"]())
    passes = Pipeline.parse("fold-constants")
    passes.run(model, Context())
    again = Context()

    passes.run(model, again)

    assert again.rewrites == []


@pytest.mark.parametrize(("op", "rank"), [("Reshape", 3), ("local.Reshape", None)])
def test_the_number_of_sizes_is_the_rank_of_a_standard_reshape_only(op, rank):
    header = '<ir_version: 8, opset_import: ["" : 17, "local" : 1]>'
    body = f"g (float[N] x, int64[3] s) => (float y) {{ y = {op}(x, s) }}"
    model = from_proto(onnx.parser.parse_model(f"{header} {body}"))

    assert infer(model)[model.graph.outputs[0]].rank == rank
