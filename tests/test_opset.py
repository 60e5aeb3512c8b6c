"""Upgraded models compute the same bits in ONNX Runtime, and what cannot be upgraded is refused unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.graph import Model
from onnxcomp.opset import _WIDENED, NEWEST, upgrade
from onnxcomp.opset_adapters import ADAPTERS
from onnxcomp.runtime import Session, open_session
from onnxcomp.serde import from_proto

PACKAGED = Path(onnx.__file__).parent / "backend/test/data"
ZOO = Path("/work/shared/zoo")
TARGETS = (13, 21, NEWEST)

# Steps that are refused: they change what an operator computes, and no known exporter writes the old form.
UNDECIDED = {
    ("GlobalLpPool", 2), ("LpPool", 2), ("Split", 2), ("Tile", 6), ("Scan", 9), ("GroupNormalization", 21),
}  # fmt: skip


def parse(text: str, opset: int, functions: str = "") -> onnx.ModelProto:
    """A model whose IR is as old as its opset."""
    ir = {6: 3, 7: 3, 8: 3, 9: 4, 10: 5, 11: 6, 12: 7, 13: 7}.get(opset, 8)
    imports = f'"" : {opset}' + (', "local" : 1' if functions else "")
    return onnx.parser.parse_model(f"<ir_version: {ir}, opset_import: [{imports}]> agraph {text} {functions}")


def upgraded(proto: onnx.ModelProto, target: int) -> tuple[Model, list[str]]:
    model = from_proto(proto)
    notes = upgrade(model, target)
    return model, notes


def as_written(model: Any) -> Session:
    """A session that runs the model as it is, so that equal graphs give equal bits."""
    return open_session(model, optimize=False, config={"session.disable_prepacking": "1"})


def random_feeds(session: Session, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    feeds: dict[str, Any] = {}
    for spec in session.inputs:
        assert spec.dtype is not None
        shape = [d if isinstance(d, int) else 3 for d in spec.shape or ()]
        if spec.dtype.kind == "f":
            feeds[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
        else:
            feeds[spec.name] = rng.integers(0, 2, shape).astype(spec.dtype)
    return feeds


def assert_same_bits(proto: onnx.ModelProto, target: int) -> list[str]:
    model, notes = upgraded(proto, target)
    assert model.opset == max(target, proto.opset_import[0].version)
    onnx.checker.check_model(model.to_bytes(), full_check=True)
    before, after = as_written(proto), as_written(model)
    feeds = random_feeds(before)
    for old, new in zip(before.run(feeds), after.run(feeds), strict=True):
        assert old.dtype == new.dtype
        np.testing.assert_array_equal(old, new)
    return notes


# (the operator adapted, its opset, graph)
ADAPTED = {
    "squeeze": ("Squeeze", 11, "(float[1,3,1,4] x) => (float[N,M] y) { y = Squeeze<axes = [0, 2]>(x) }"),
    "squeeze all": ("", 11, "(float[1,3,1,4] x) => (float[N,M] y) { y = Squeeze(x) }"),
    "unsqueeze": ("Unsqueeze", 9, "(float[3,4] x) => (float[A,B,C,D] y) { y = Unsqueeze<axes = [3, 0]>(x) }"),
    "reduce sum": (
        "ReduceSum", 9,
        "(float[3,4] x) => (float[M] y) { y = ReduceSum<axes = [0], keepdims = 0>(x) }",
    ),
    "reduce all": ("", 11, "(float[3,4] x) => (float[A,B] y) { y = ReduceSum(x) }"),
    "split": (
        "Split", 11,
        "(float[2,6] x) => (float[A,B] y, float[A,C] z) { y, z = Split<axis = 1, split = [1, 5]>(x) }",
    ),
    "clip": ("Clip", 7, "(float[3,4] x) => (float[3,4] y) { y = Clip<min = -0.3, max = 0.4>(x) }"),
    "clip below": ("Clip", 7, "(float[3,4] x) => (float[3,4] y) { y = Clip<min = 0.1>(x) }"),
    "clip above": ("Clip", 7, "(float[3,4] x) => (float[3,4] y) { y = Clip<max = 0.1>(x) }"),
    "pad": ("Pad", 7, "(float[2,3] x) => (float[A,B] y) { y = Pad<pads = [0, 1, 2, 0], value = 1.5>(x) }"),
    "pad reflect": (
        "Pad", 7,
        '(float[3,3] x) => (float[A,B] y) { y = Pad<mode = "reflect", pads = [0, 1, 2, 0]>(x) }',
    ),
    "crop by pad": ("Pad", 7, "(float[3,3] x) => (float[A,B] y) { y = Pad<pads = [0, -1, 0, 1]>(x) }"),
    "slice": (
        "Slice", 7,
        "(float[4,5] x) => (float[A,B] y) { y = Slice<axes = [1], starts = [-4], ends = [99]>(x) }",
    ),
    "slice without axes": (
        "Slice", 7,
        "(float[4,5] x) => (float[A,B] y) { y = Slice<starts = [1, 0], ends = [3, -1]>(x) }",
    ),
    "dropout": ("Dropout", 7, "(float[4,5] x) => (float[4,5] y) { y = Dropout<ratio = 0.4>(x) }"),
    "top k": (
        "TopK", 7,
        "(float[4,5] x) => (float[A,B] y, int64[A,B] i) { y, i = TopK<axis = 1, k = 2>(x) }",
    ),
    "upsample 7": (
        "Upsample", 7,
        '(float[1,2,3,4] x) => (float[A,B,C,D] y) { y = Upsample<scales = [1.0, 1.0, 2.0, 1.7]>(x) }',
    ),
    "upsample 7 linear": (
        "Upsample", 7,
        '(float[1,2,3,4] x) => (float[A,B,C,D] y) '
        '{ y = Upsample<mode = "linear", scales = [1.0, 1.0, 2.0, 1.7]>(x) }',
    ),
    "upsample 9": (
        "Upsample", 9,
        "(float[1,2,3,4] x) => (float[A,B,C,D] y) <float[4] s = {1.0, 1.0, 2.5, 3.0}> { y = Upsample(x, s) }",
    ),
    "upsample 9, scales at run time": (
        "Upsample", 9,
        "(float[1,2,3,4] x, float[4] r) => (float[A,B,C,D] y) "
        "{ z = Sub(r, r) e = Exp(z) s = Add(e, e) y = Upsample(x, e) }",
    ),
    "resize 10 enlarges": (
        "Resize", 10, "(float[1,2,5,7] x) => (float[A,B,C,D] y) <float[4] s = {1.0, 1.0, 1.7, 3.0}> "
        "{ y = Resize(x, s) }",
    ),
    "resize 10 reduces": (
        "Resize", 10, "(float[1,2,9,7] x) => (float[A,B,C,D] y) <float[4] s = {1.0, 1.0, 0.6, 0.5}> "
        "{ y = Resize(x, s) }",
    ),
    "resize 10 linear, both": (
        "Resize", 10,
        '(float[1,2,9,7] x) => (float[A,B,C,D] y) <float[4] s = {1.0, 1.0, 0.6, 1.5}> '
        '{ y = Resize<mode = "linear">(x, s) }',
    ),
    "resize 11 with empty scales": (
        "Resize", 11,
        "(float[1,2,3,4] x) => (float[A,B,C,D] y) <float[0] e = {}, int64[4] n = {1, 2, 6, 5}> "
        "{ y = Resize(x, e, e, n) }",
    ),
    "batch norm with unused statistics": (
        "BatchNormalization", 7,
        "(float[2,2,3] x) => (float[2,2,3] y) <float[2] s = {1.5, 0.7}, float[2] b = {0.1, -0.2}, "
        "float[2] m = {0.3, 0.4}, float[2] v = {1.1, 0.9}> "
        "{ y = BatchNormalization<spatial = 1>(x, s, b, m, v) }",
    ),
    "softmax on the last axis": ("Softmax", 11, "(float[2,3] x) => (float[2,3] y) { y = Softmax(x) }"),
    "softmax over trailing ones": (
        "Softmax", 7,
        "(float[2,5,1,1] x) => (float[2,5,1,1] y) { y = Softmax(x) }",
    ),
    "softmax over two axes": ("Softmax", 11, "(float[2,3,4] x) => (float[2,3,4] y) { y = Softmax(x) }"),
    "softmax over a negative axis": (
        "Softmax", 11,
        "(float[2,3,4] x) => (float[2,3,4] y) { y = Softmax<axis = -2>(x) }",
    ),
    "softmax of unknown size": (
        "Softmax", 11,
        "(float[N,M,K] x) => (float[N,M,K] y) { y = Softmax<axis = 1>(x) }",
    ),
    "softmax over everything": (
        "Softmax", 11,
        "(float[2,3,4] x) => (float[2,3,4] y) { y = Softmax<axis = 0>(x) }",
    ),
    "log softmax": ("LogSoftmax", 9, "(float[2,3,4] x) => (float[2,3,4] y) { y = LogSoftmax<axis = 1>(x) }"),
    "hardmax": ("Hardmax", 9, "(float[2,3,4] x) => (float[2,3,4] y) { y = Hardmax<axis = 1>(x) }"),
    "scatter": (
        "Scatter", 9,
        "(float[3,3] x, float[2,3] u) => (float[3,3] y) <int64[2,3] i = {1, 0, 2, 0, 2, 1}> "
        "{ y = Scatter<axis = 0>(x, i, u) }",
    ),
    "affine": ("Affine", 7, "(float[2,3] x) => (float[2,3] y) { y = Affine<alpha = 0.3, beta = 0.2>(x) }"),
    "image scaler": (
        "ImageScaler", 7,
        "(float[1,2,3,3] x) => (float[1,2,3,3] y) { y = ImageScaler<scale = 0.7, bias = [0.1, -0.2]>(x) }",
    ),
    "scale": ("Scale", 8, "(float[2,3] x) => (float[2,3] y) { y = Scale<scale = 0.3>(x) }"),
    "crop": ("Crop", 7, "(float[1,1,6,7] x) => (float[A,B,C,D] y) { y = Crop<border = [1, 2, 3, 0]>(x) }"),
    "crop to a size": (
        "Crop", 7, "(float[1,1,6,7] x) => (float[A,B,C,D] y) "
        "{ y = Crop<border = [1, 2, 0, 0], scale = [3, 4]>(x) }",
    ),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", ADAPTED)
def test_an_adapted_operator_computes_the_same_bits(case: str, target: int) -> None:
    op, opset, text = ADAPTED[case]
    notes = assert_same_bits(parse(text, opset), target)
    assert any(note.startswith(op) for note in notes) if op else not notes


# What only the later targets adapt: (operator, opset, graph).
ADAPTED_LATER = {
    "reduce mean": ("ReduceMean", 13, "(float[3,4] x) => (float[3,M] y) { y = ReduceMean<axes = [-1]>(x) }"),
    "reduce max in every axis": ("", 13, "(float[3,4] x) => (float y) { y = ReduceMax<keepdims = 0>(x) }"),
    "split without sizes": (
        "Split", 13,
        "(float[2,6] x) => (float[A,B] y, float[A,B] z) { y, z = Split<axis = 1>(x) }",
    ),
    "dft": ("DFT", 17, "(float[1,6,1] x) => (float[A,B,C] y) { y = DFT(x) }"),
    "grid sample": (
        "GridSample", 16,
        '(float[1,1,4,4] x, float[1,3,3,2] g) => (float[1,1,3,3] y) '
        '{ y = GridSample<mode = "bilinear">(x, g) }',
    ),
    "roi align": (
        "RoiAlign", 10,
        "(float[1,2,7,7] x) => (float[A,B,C,D] y) <float[1,4] r = {1.0, 1.5, 5.0, 6.0}, int64[1] b = {0}> "
        "{ y = RoiAlign<output_height = 3, output_width = 3>(x, r, b) }",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTED_LATER)
def test_an_operator_that_changed_after_13_computes_the_same_bits(case: str) -> None:
    op, opset, text = ADAPTED_LATER[case]
    notes = assert_same_bits(parse(text, opset), 21)  # ONNX Runtime has no RoiAlign 22
    assert any(note.startswith(op) for note in notes) if op else not notes


def test_a_softmax_of_a_known_rank_stays_one_node_where_no_size_is_known() -> None:
    proto = parse("(float[2,3,4] x, int64[3] s) => (float y) { v = Reshape(x, s)  y = Softmax<axis = 2>(v) }", 11)
    model, _ = upgraded(proto, 13)
    assert [node.op for node in model.graph.nodes] == ["Reshape", "Softmax"]


def test_average_pooling_differs_in_the_last_bit_at_most() -> None:
    attributes = "kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], ceil_mode = 1"
    proto = parse(f"(float[1,2,8,8] x) => (float[A,B,C,D] y) {{ y = AveragePool<{attributes}>(x) }}", 11)
    model, _ = upgraded(proto, 21)
    before, after = as_written(proto), as_written(model)
    feeds = random_feeds(before)
    np.testing.assert_allclose(before.run(feeds)[0], after.run(feeds)[0], rtol=0, atol=1.2e-7)


@pytest.mark.parametrize("op", ["ScaledTanh", "ParametricSoftplus"])
def test_a_legacy_activation_becomes_standard_operators(op: str) -> None:
    # The kernels of ONNX Runtime for Tanh and Softplus round differently from those of the legacy operators.
    proto = parse(f"(float[4,9] x) => (float[4,9] y) {{ y = {op}<alpha = 0.3, beta = 1.7>(x) }}", 9)
    model, notes = upgraded(proto, 13)
    assert notes == [f"{op} replaced by standard operators: 1 node"]
    before, after = as_written(proto), as_written(model)
    feeds = random_feeds(before)
    np.testing.assert_allclose(before.run(feeds)[0], after.run(feeds)[0], rtol=1e-6, atol=1e-7)


def reference(model: Model, feeds: dict[str, Any]) -> list[Any]:
    return as_written(model).run(feeds)


@pytest.mark.parametrize(
    ("b_shape", "axis", "aligned"),
    [((3,), 1, (3, 1)), ((2, 3), 0, (2, 3, 1)), ((4,), 2, (4,)), ((1,), 1, (1,)), ((2,), 0, (2, 1, 1))],
)
def test_broadcasting_along_an_axis_before_opset_7(
    b_shape: tuple[int, ...], axis: int, aligned: tuple[int, ...]
) -> None:
    dims = ",".join(map(str, b_shape))
    inputs = f"float[2,3,4] a, float[{dims}] b"
    text = f"({inputs}) => (float[2,3,4] y) {{ y = Sub<axis = {axis}, broadcast = 1>(a, b) }}"
    model, _ = upgraded(parse(text, 6), 13)
    session = as_written(model)
    feeds = random_feeds(session)
    np.testing.assert_array_equal(session.run(feeds)[0], feeds["a"] - feeds["b"].reshape(aligned))


def test_prelu_with_a_slope_per_channel_before_opset_7() -> None:
    text = "(float[2,3,4,4] x) => (float[2,3,4,4] y) <float[3] s = {0.1, 0.2, 0.3}> { y = PRelu(x, s) }"
    model, _ = upgraded(parse(text, 6), 13)
    session = as_written(model)
    x = random_feeds(session)["x"]
    slope = np.array([0.1, 0.2, 0.3], np.float32).reshape(3, 1, 1)
    np.testing.assert_array_equal(session.run({"x": x})[0], np.where(x < 0, x * slope, x))


def test_a_cast_to_a_named_type_and_a_reshape_attribute_become_modern() -> None:
    model, _ = upgraded(parse('(float[2,3] x) => (int32[2,3] y) { y = Cast<to = "INT32">(x) }', 5), 13)
    assert reference(model, {"x": np.full((2, 3), 2.5, np.float32)})[0].tolist() == [[2, 2, 2], [2, 2, 2]]
    model, _ = upgraded(parse("(float[2,3] x) => (float[A,B] y) { y = Reshape<shape = [3, -1]>(x) }", 4), 13)
    assert reference(model, {"x": np.zeros((2, 3), np.float32)})[0].shape == (3, 2)


def test_nodes_in_subgraphs_are_adapted() -> None:
    proto = parse(
        """(bool c, float[1,3] x) => (float[N] y) {
            y = If(c) <
                then_branch = yes () => (float[N] p) { p = Squeeze<axes = [0]>(x) },
                else_branch = no () => (float[N] q) { r = Relu(x)  q = Squeeze<axes = [0]>(r) }
            >
        }""",
        11,
    )
    assert assert_same_bits(proto, 21) == ["Squeeze adapted to version 13: 2 nodes"]


def test_function_bodies_and_their_imports_are_adapted() -> None:
    functions = """
    <domain: "local", opset_import: ["" : 11]>
    pick (v) => (w) {
        s = Softmax<axis = 1>(v)
        t = ReduceSum<axes = [0], keepdims = 0>(s)
        w = Unsqueeze<axes = [0]>(t)
    }
    """
    proto = parse("(float[2,3,4] x) => (float[A,B,C] y) { y = local.pick(x) }", 11, functions)
    proto.ir_version = 8
    assert_same_bits(proto, 13)
    assert_same_bits(proto, 21)
    model, _ = upgraded(proto, 21)
    assert [o.version for o in model.functions[0].header.opset_import] == [21]


def test_an_attribute_that_the_caller_of_a_function_sets_is_refused() -> None:
    functions = """
    <domain: "local", opset_import: ["" : 11]>
    drop <axes> (v) => (w) { w = Squeeze<axes: ints = @axes>(v) }
    """
    proto = parse("(float[1,3] x) => (float[N] y) { y = local.drop<axes = [0]>(x) }", 11, functions)
    proto.ir_version = 8
    with pytest.raises(ModelError, match=r"Squeeze.*'axes' is set by the caller"):
        upgraded(proto, 13)


REFUSED = {
    "statistics read": (
        7, "normalizes|statistics",
        "(float[2,2,3] x, float[2] s) => (float[2,2,3] y, float[2] m) "
        "{ y, m, v, p, q = BatchNormalization(x, s, s, s, s) }",
    ),
    "spatial": (
        7, "spatial=0",
        "(float[2,2] x, float[2] s) => (float[2,2] y) { y = BatchNormalization<spatial = 0>(x, s, s, s, s) }",
    ),
    "training dropout": (6, "training mode", "(float[2] x) => (float[2] y) { y = Dropout(x) }"),
    "mask read": (7, "mask", "(float[2] x) => (float[2] y, float[2] m) { y, m = Dropout(x) }"),
    "mixed nearest": (
        10, "enlarges one axis",
        "(float[1,2,9,7] x) => (float[A,B,C,D] y) <float[4] s = {1.0, 1.0, 0.6, 1.5}> { y = Resize(x, s) }",
    ),
    "nearest at run time": (
        10, "not constant", "(float[1,2,9,7] x, float[4] s) => (float[A,B,C,D] y) { y = Resize(x, s) }",
    ),
    "abolished coordinates": (
        11, "tf_half_pixel_for_nn",
        "(float[1,2,3,4] x) => (float[A,B,C,D] y) <float[0] r = {}, float[4] s = {1.0, 1.0, 2.0, 2.0}> "
        '{ y = Resize<coordinate_transformation_mode = "tf_half_pixel_for_nn">(x, r, s) }',
    ),
    "unknown rank": (
        6, "rank",
        "(float[2,3] x, float[2] b) => (float[A] y) { u = Unheard(x)  "
        "y = Add<axis = 0, broadcast = 1>(u, b) }",
    ),
    "malformed": (5, "does not fit", "(float[2,3] x) => (float[2,3] y) { y = Cast<to = 1>(x) }"),
    "no adapter": (5, "no equivalent", "(float[2] x, float t) => (float[A] y) { y = Tile(x, t, t) }"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_node_and_reason_and_leaves_the_model_unchanged(case: str) -> None:
    opset, reason, text = REFUSED[case]
    # The first node could be upgraded: nothing may be left of that.
    for start in (") {", "> {"):
        text = text.replace(start, f"{start} squeezed = Squeeze<axes = [0]>(x)")
    model = from_proto(parse(text, opset))
    before = model.to_bytes()
    with pytest.raises(ModelError, match=rf"node '.*' \(\w+\) in graph 'agraph' .*({reason})"):
        upgrade(model, 21)
    assert model.to_bytes() == before


def test_a_target_that_the_tables_do_not_cover_is_refused() -> None:
    with pytest.raises(UsageError, match=f"highest is {NEWEST}"):
        upgrade(from_proto(parse("(float[2] x) => (float[2] y) { y = Relu(x) }", 13)), NEWEST + 1)


def test_a_model_of_the_target_or_above_stays_as_it_is() -> None:
    model = from_proto(parse("(float[2] x) => (float[2] y) { y = Relu(x) }", 17))
    before = model.to_bytes()
    assert upgrade(model, 13) == []
    assert upgrade(model, 17) == []
    assert model.to_bytes() == before


def test_operators_without_a_schema_and_other_domains_stay_as_they_are() -> None:
    nodes = "u = Unheard<axes = [0]>(x)  y = com.example.Squeeze<axes = [0]>(u)"
    proto = parse(f"(float[1,3] x) => (float[A] y) {{ {nodes} }}", 11)
    proto.opset_import.add(domain="com.example", version=1)
    model, notes = upgraded(proto, 21)
    assert notes == []
    result = onnx.load_from_string(model.to_bytes())
    assert list(result.graph.node) == list(proto.graph.node)
    assert {o.domain: o.version for o in result.opset_import} == {"": 21, "com.example": 1}


def test_the_ir_version_follows_and_the_required_inputs_stay() -> None:
    proto = parse("(float[2] x, float[2] w) => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Mul(x, w) }", 7)
    model, _ = upgraded(proto, 21)
    assert model.header.ir_version == 10
    assert [i.name for i in as_written(model).inputs] == ["x"]


def test_the_other_name_of_the_standard_domain_is_upgraded_too() -> None:
    proto = parse("(float[1,3] x) => (float[N] y) { y = Squeeze<axes = [0]>(x) }", 11)
    proto.opset_import[0].domain = "ai.onnx"
    model, _ = upgraded(proto, 13)
    assert [(o.domain, o.version) for o in model.header.opset_import] == [("ai.onnx", 13)]


def test_every_change_of_a_standard_operator_is_decided() -> None:
    known = {(op, version) for version, ops in _WIDENED.items() for op in ops}
    assert not known & set(ADAPTERS)
    changes = set()
    versions: dict[str, list[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            versions.setdefault(schema.name, []).append(schema.since_version)
    for op, found in versions.items():
        changes.update((op, v) for v in sorted(found)[1:] if v <= NEWEST)
    assert changes - known - set(ADAPTERS) == UNDECIDED
    assert not (known | set(ADAPTERS)) - {(op, v) for op, found in versions.items() for v in found}


def packaged() -> list[str]:
    kinds = ("pytorch-converted", "pytorch-operator", "simple")
    names = [path.parent for kind in kinds for path in PACKAGED.glob(f"{kind}/*/model.onnx")]
    # Gradient has no kernel in ONNX Runtime, and StringNormalizer needs a locale that a machine may lack.
    left_out = ("test_gradient", "test_strnorm")
    return sorted(str(n.relative_to(PACKAGED)) for n in names if not n.name.startswith(left_out))


def stored(folder: Path, kind: str) -> list[Any]:
    paths = [folder / f"{kind}_{index}.pb" for index in range(len(list(folder.glob(f"{kind}_*.pb"))))]
    return [onnx.numpy_helper.to_array(onnx.TensorProto.FromString(p.read_bytes())) for p in paths]


@pytest.mark.parametrize("name", packaged())
def test_old_models_of_the_onnx_package_give_their_stored_outputs(name: str) -> None:
    proto = onnx.load(PACKAGED / name / "model.onnx")
    folder = PACKAGED / name / "test_data_set_0"
    values, expected = stored(folder, "input"), stored(folder, "output")
    for target in (13, 21):
        model, _ = upgraded(proto, target)
        session = as_written(model)
        feeds = dict(zip([i.name for i in session.inputs], values, strict=True))
        for found, wanted in zip(session.run(feeds), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6)


REAL = [
    "mnist_cntk", "squeezenet_winml_fp32", "candy", "nnsplit_en", "ppocr_cls",
    "yunet_n_dynamic", "gtcrn_simple",
]  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_models_compute_the_same_bits(name: str) -> None:
    path = ZOO / f"models/{name}.onnx"
    if not path.exists():
        pytest.skip("the zoo is not here")
    proto = onnx.load(path)
    before = as_written(proto)
    data = ZOO / f"feeds/{name}.calib.npz"
    if data.exists():
        with np.load(data) as arrays:
            feeds = {s.name: arrays[s.name][:1] for s in before.inputs}
    else:
        feeds = random_feeds(before)
    expected = before.run(feeds)
    for target in (13, 21):
        model, _ = upgraded(proto, target)
        for old, new in zip(expected, as_written(model).run(feeds), strict=True):
            np.testing.assert_array_equal(old, new)
