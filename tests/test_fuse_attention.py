"""fuse-attention makes one operator of an attention core, and only where it computes the same."""

import numpy as np
import onnx
import pytest

from onnxcomp.errors import UsageError
from onnxcomp.graph import Model
from onnxcomp.manager import Context, Pipeline
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto

RNG = np.random.default_rng(3)
HEADS, SIZE, WIDTH = 2, 4, 8
SPLIT = "<int64[4] split = {0, 0, 2, 4}, int64[3] merge = {0, 0, 8}, float eight = {8.0}, float[1] half = {0.5}"
PLAIN = """
    q = Add (bq, xq)  k = Add (xk, bk)
    q1 = Reshape (q, split)  q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
    k1 = Reshape (k, split)  k2 = Transpose <perm = [0, 2, 3, 1]> (k1)
    v1 = Reshape (xv, split)  v2 = Transpose <perm = [0, 2, 1, 3]> (v1)
    s = MatMul (q2, k2)  scaled = Div (s, eight)
    p = Softmax <axis = -1> (scaled)
    y1 = MatMul (p, v2)  y2 = Transpose <perm = [0, 2, 1, 3]> (y1)
    y = Reshape (y2, merge)
"""


def model(body: str = PLAIN, inputs: str = "", outputs: str = "") -> Model:
    proto = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        attention (float[b, s, 8] xq, float[b, t, 8] xk, float[b, t, 8] xv{inputs}) => (float[b, s, 8] y{outputs})
        {SPLIT}> {{ {body} }}
    """)
    for name in ("bq", "bk"):
        bias = RNG.standard_normal(WIDTH).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(bias, name))
    return from_proto(proto)


def fused(one: Model, **feeds: np.ndarray) -> list[str]:
    """Operators after the pass, which must not change the outputs."""
    sizes = {"xq": (3, 5, WIDTH), "xk": (3, 7, WIDTH), "xv": (3, 7, WIDTH)}
    feeds |= {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in sizes.items()}
    expected = open_session(one, optimize=False).run(feeds)
    Pipeline.parse("fuse-attention").run(one, Context())
    for found, value in zip(open_session(one, optimize=False).run(feeds), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)
    return [node.kind for node in one.nodes()]


ONE = ["com.microsoft.MultiHeadAttention"]


def test_the_core_with_its_biases_is_one_node() -> None:
    one = model()
    assert fused(one) == ONE
    (node,) = one.nodes()
    assert node.attrs == {"num_heads": HEADS, "scale": 1 / 8}
    np.testing.assert_array_equal(one.value(node.inputs[3])[2 * WIDTH :], 0)  # the values have no bias


def test_scales_in_front_of_the_scores_multiply() -> None:
    body = PLAIN.replace("MatMul (q2, k2)", "MatMul (q3, k3)").replace(
        "s = MatMul", "q3 = Mul (q2, half)  k3 = Mul (half, k2)  s = MatMul"
    )
    one = model(body)
    assert fused(one) == ONE
    assert one.graph.nodes[0].attrs["scale"] == 0.25 / 8


def test_a_mask_that_varies_over_all_scores_is_taken_over() -> None:
    body = PLAIN.replace("Softmax <axis = -1> (scaled)", "Softmax (masked)").replace(
        "p = ", "masked = Add (scaled, mask)  p = "
    )
    mask = np.where(RNG.random((3, 1, 5, 7)) < 0.5, 0, -1e4).astype(np.float32)
    assert fused(model(body, ", float[b, 1, s, t] mask"), mask=mask) == ONE
    # One that broadcasts over the queries as well does not fit the operator.
    assert fused(model(body, ", float[b, 1, 1, t] mask"), mask=mask[:, :, :1]) != ONE
    assert fused(model(body, ", float[b, 1, s, u] mask"), mask=mask) != ONE


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("k2 = Transpose <perm = [0, 2, 3, 1]> (k1)", "k2 = Transpose <perm = [0, 2, 3, 1]> (q1)"),  # read twice
        ("Softmax <axis = -1>", "Softmax <axis = 1>"),
        ("MatMul (p, v2)", "MatMul (p, v3)"),
        ("Reshape (q, split)", "Reshape (q, dynamic)"),
    ],
)
def test_what_is_something_else_stays(old: str, new: str) -> None:
    body = PLAIN.replace(old, new)
    feeds = {}
    if "v3" in new:
        body = body.replace("y1 =", "v3 = Mul (v2, half)  y1 =")
    if "(q1)" in new:  # self-attention of the queries alone
        body = body.replace("k = Add (xk, bk)", "").replace("k1 = Reshape (k, split)", "")
        body = body.replace("Reshape (xv, split)", "Reshape (xq, split)")
    inputs = ", int64[4] dynamic" if "dynamic" in new else ""
    if inputs:
        feeds["dynamic"] = np.asarray([3, 5, HEADS, SIZE])
    assert "com.microsoft.MultiHeadAttention" not in fused(model(body, inputs), **feeds)


@pytest.mark.parametrize("name", ["p", "scaled", "y2", "k2", "q"])
def test_a_core_whose_inside_is_an_output_stays(name: str) -> None:
    rank = {"q": "b, s, 8", "y2": "b, s, 2, 4"}.get(name, "b, 2, u, w")
    found = fused(model(outputs=f", float[{rank}] {name}"))
    assert ("com.microsoft.MultiHeadAttention" in found) == (name == "q")  # the bias is outside then


def test_past_the_limit_nothing_changes() -> None:
    one = model()
    before = one.to_bytes()
    Pipeline.parse("fuse-attention").run(one, Context(limit=0))
    assert one.to_bytes() == before


def test_nothing_is_made_that_tensorrt_does_not_know() -> None:
    one, ctx = model(), Context(target="tensorrt")
    Pipeline.parse("fuse-attention").run(one, ctx)
    assert "Softmax" in [n.kind for n in one.nodes()]
    assert "TensorRT" in ctx.refusals[0].reason


def test_it_comes_last() -> None:
    with pytest.raises(UsageError, match="must come after 'quantize'"):
        Pipeline.parse("fuse-attention,quantize")
