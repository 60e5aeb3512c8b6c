"""Malformed, hostile and merely odd model files, each with what is expected of it.

`CASES` maps a name to a `Case`: `build(folder)` writes the files and returns the model's path; `error` is a
pattern of the message of the ModelError that has to follow, None where the model has to be accepted; `note`
is a pattern of a remark that has to come with the acceptance.
"""

import gzip
import io
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, parser

Build = Callable[[Path], Path]


@dataclass(frozen=True)
class Case:
    build: Build
    error: str | None
    note: str | None = None
    allow_symlinks: bool = False


CASES: dict[str, Case] = {}


def case(
    error: str | None = None, note: str | None = None, allow_symlinks: bool = False
) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        CASES[build.__name__.removeprefix("_")] = Case(build, error, note, allow_symlinks)
        return build

    return register


def proto_case(
    name: str, make: Callable[[], onnx.ModelProto | bytes], error: str | None, note: str | None = None
) -> None:
    CASES[name] = Case(lambda folder: write(folder, make()), error, note)


def write(folder: Path, content: onnx.ModelProto | bytes) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    return path


def parse(text: str, head: str = 'ir_version: 10, opset_import: ["" : 17]') -> onnx.ModelProto:
    return parser.parse_model(f"<{head}>\n{text}")


RELU = "g (float[1] x) => (float[1] y) { y = Relu(x) }"


def good() -> onnx.ModelProto:
    """A small model with a weight large enough to be cut out, a small one, and a subgraph."""
    model = parse(
        """g (float[4, 32] x, bool c) => (float[4, 32] y)
        <float[32] b = {BIAS}> {
            h = MatMul(x, w)
            y = If (c) <
                then_branch = t () => (float[4, 32] t_out) { t_out = Add(h, b) },
                else_branch = e () => (float[4, 32] e_out) {
                    k = Constant <value_ints = [4, 32]> ()
                    e_out = Reshape(h, k)
                }
            >
        }""".replace("BIAS", ", ".join(["0.5"] * 32))
    )
    weight = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return model


def with_tensor(tensor: TensorProto, elements: str = "float") -> onnx.ModelProto:
    model = parse(f"g () => ({elements}[N] y) {{ y = Identity(W) }}")
    model.graph.initializer.append(tensor)
    return model


def tensor(data_type: int, dims: Sequence[int], **fields: Any) -> TensorProto:
    return TensorProto(name="W", data_type=data_type, dims=list(dims), **fields)


# --- external data --------------------------------------------------------------------------------


def external(location: str | bytes, dims: Sequence[int] = (4, 4), **entries: object) -> onnx.ModelProto:
    """A model with a 64-byte float weight at `location`."""
    weight = tensor(TensorProto.FLOAT, dims, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        weight.external_data.add(key=key, value=value if isinstance(value, (str, bytes)) else str(value))
    return with_tensor(weight)


def external_case(
    name: str, location: str, error: str | None, data: bytes | None = None, **entries: object
) -> None:
    def build(folder: Path) -> Path:
        if data is not None:
            (folder / "w.bin").write_bytes(data)
        return write(folder, external(location, **entries))

    CASES[name] = Case(build, error)


external_case("external_parent_folder", "../secret.bin", r"'\.\.'", offset=0, length=64)
external_case("external_inner_parent_folder", "a/../../secret.bin", r"'\.\.'", offset=0, length=64)
external_case("external_absolute", "/etc/hostname", "absolute", offset=0, length=64)
external_case("external_drive", "C:w.bin", "absolute", offset=0, length=64)
external_case("external_backslash", "..\\w.bin", "backslash", offset=0, length=64)
external_case("external_unc", "\\\\server\\w.bin", "backslash", offset=0, length=64)
external_case("external_nul", "w.bin\0.png", "NUL", offset=0, length=64)
external_case("external_reserved_location", "\0", "reserved location", offset=0, length=64)
external_case("external_empty_location", "", "empty", offset=0, length=64)
external_case("external_missing", "nope.bin", "no such file", offset=0, length=64)
external_case("external_is_the_model", "m.onnx", "the model file itself", offset=0, length=64)
external_case("external_longer_than_file", "w.bin", "need 64 bytes", bytes(64), offset=0, length=1 << 40)
external_case(
    "external_outside_of_file", "w.bin", "outside of the file of 32", bytes(32), offset=0, length=64
)
external_case("external_offset_outside_of_file", "w.bin", "outside", bytes(64), offset=1 << 60, length=64)
external_case("external_negative_offset", "w.bin", "offset '-8'", bytes(64), offset=-8, length=64)
external_case("external_offset_no_number", "w.bin", "offset '1_0'", bytes(64), offset="1_0", length=64)
external_case("external_length_short", "w.bin", "length is 16", bytes(64), offset=0, length=16)
external_case("external_length_long", "w.bin", "length is 128", bytes(128), offset=0, length=128)
external_case(
    "external_checksum_no_sha1", "w.bin", "not a SHA-1", bytes(64), offset=0, length=64, checksum="deadbeef"
)
external_case("external_unknown_key", "w.bin", "__class__", bytes(64), offset=0, length=64, __class__="x")
external_case("external_without_offset_and_length", "w.bin", None, bytes(64))
external_case("external_basepath", "w.bin", None, bytes(64), offset=0, length=64, basepath="/tmp")
external_case("external_in_the_folder", "./w.bin", None, bytes(80), offset=16, length=64)


@case("symbolic link")
def _external_symlink(folder: Path) -> Path:
    (folder / "real.bin").write_bytes(bytes(64))
    (folder / "w.bin").symlink_to("real.bin")
    return write(folder, external("w.bin"))


@case("symbolic link")
def _external_symlinked_folder(folder: Path) -> Path:
    (folder / "real").mkdir()
    (folder / "real" / "w.bin").write_bytes(bytes(64))
    (folder / "sub").symlink_to("real")
    return write(folder, external("sub/w.bin"))


def _hub_cache(folder: Path) -> Path:
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "model").write_bytes(external("w.bin").SerializeToString())
    (blobs / "data").write_bytes(bytes(64))
    (snapshot / "m.onnx").symlink_to("../../blobs/model")
    (snapshot / "w.bin").symlink_to("../../blobs/data")
    return snapshot / "m.onnx"


CASES["hub_cache_strict"] = Case(_hub_cache, "symbolic link")
CASES["hub_cache_allowed"] = Case(_hub_cache, None, "through a symbolic link", allow_symlinks=True)


@case(note="2 hard links")
def _external_hard_link(folder: Path) -> Path:
    (folder / "real.bin").write_bytes(bytes(64))
    os.link(folder / "real.bin", folder / "w.bin")
    return write(folder, external("w.bin"))


@case("the model file itself")
def _external_hard_link_of_the_model(folder: Path) -> Path:
    path = write(folder, external("w.bin"))
    os.link(path, folder / "w.bin")
    return path


@case("pipe")
def _external_fifo(folder: Path) -> Path:
    os.mkfifo(folder / "w.bin")
    return write(folder, external("w.bin"))


@case("folder")
def _external_folder(folder: Path) -> Path:
    (folder / "w.bin").mkdir()
    return write(folder, external("w.bin"))


@case()
def _external_sparse_20_gigabytes(folder: Path) -> Path:
    with (folder / "w.bin").open("wb") as file:
        file.truncate(20 << 30)
    return write(folder, external("w.bin"))


@case("CUT|both a payload and external")
def _payload_and_external(folder: Path) -> Path:
    model = external("w.bin", (32, 32))
    model.graph.initializer[0].raw_data = bytes(4096)
    return write(folder, model)


# --- tensors --------------------------------------------------------------------------------------

_T = TensorProto
for _name, _tensor, _error in (
    ("tensor_too_short", tensor(_T.FLOAT, [1 << 20, 1 << 20], raw_data=bytes(16)), "needs 4398046511104 b"),
    ("tensor_overflow", tensor(_T.FLOAT, [1 << 33, 1 << 33], raw_data=bytes(16)), "more elements than"),
    ("tensor_negative_dim", tensor(_T.FLOAT, [-1, 4], raw_data=bytes(16)), "negative"),
    ("tensor_many_dims", tensor(_T.FLOAT, [1] * 5000, raw_data=bytes(4)), "dimensions"),
    ("tensor_unknown_type", tensor(99, [4], raw_data=bytes(16)), "data type 99"),
    ("tensor_undefined_type", tensor(0, [4], raw_data=bytes(16)), "data type 0"),
    ("tensor_without_values", tensor(_T.FLOAT, [4]), "needs 4 entries in float_data"),
    ("tensor_short_floats", tensor(_T.FLOAT, [4], float_data=[1.0]), "needs 4 entries in float_data"),
    ("tensor_wrong_field", tensor(_T.FLOAT, [1], int64_data=[1]), "wrong one"),
    ("tensor_two_fields", tensor(_T.FLOAT, [1], float_data=[1.0], raw_data=bytes(4)), "more than one field"),
    ("tensor_int4_too_long", tensor(_T.INT4, [5], raw_data=bytes(5)), "needs 3 bytes"),
    ("tensor_int4_entries", tensor(_T.INT4, [5], int32_data=[0] * 5), "needs 3 entries"),
    ("tensor_string_raw", tensor(_T.STRING, [1], raw_data=b"x"), "STRING"),
    ("tensor_string_count", tensor(_T.STRING, [2], string_data=[b"x"]), "needs 2 entries in string_data"),
    ("odd_int4", tensor(_T.INT4, [5], int32_data=[0] * 3), None),
    ("odd_uint4", tensor(_T.UINT4, [5], raw_data=bytes(3)), None),
    ("odd_int2", tensor(_T.INT2, [5], raw_data=bytes(2)), None),
    ("odd_float4", tensor(_T.FLOAT4E2M1, [5], raw_data=bytes(3)), None),
    ("odd_float8", tensor(_T.FLOAT8E4M3FN, [5], int32_data=[1] * 5), None),
    ("odd_bfloat16", tensor(_T.BFLOAT16, [5], raw_data=bytes(10)), None),
    ("odd_complex", tensor(_T.COMPLEX64, [5], float_data=[0.0] * 10), None),
    ("odd_string", tensor(_T.STRING, [2], string_data=[b"x", b""]), None),
    ("odd_scalar", tensor(_T.FLOAT, [], float_data=[1.0]), None),
    ("odd_zero_elements", tensor(_T.FLOAT, [0, 4], raw_data=b""), None),
    ("odd_zero_elements_unset", tensor(_T.FLOAT, [0, 4]), None),
    ("odd_nan", tensor(_T.FLOAT, [1], float_data=[float("nan")]), None),
):  # fmt: skip
    proto_case(_name, lambda t=_tensor: with_tensor(t), _error)  # type: ignore[misc]


def sparse(dims: Sequence[int], indices: Sequence[int], index_dims: Sequence[int]) -> onnx.ModelProto:
    model = parse("g (float[N, 4] x) => (float[N, 4] y) { y = MatMul(x, S) }")
    part = model.graph.sparse_initializer.add(dims=dims)
    part.values.CopyFrom(helper.make_tensor("S", TensorProto.FLOAT, [2], [1.0, 2.0]))
    part.indices.CopyFrom(helper.make_tensor("i", TensorProto.INT64, index_dims, indices))
    return model


proto_case("odd_sparse_linear", lambda: sparse([4, 4], [0, 5], [2]), None)
proto_case("odd_sparse_coordinates", lambda: sparse([4, 4], [0, 0, 1, 1], [2, 2]), None)
proto_case("sparse_bomb", lambda: sparse([1 << 20, 1 << 20], [0, 5], [2]), "when dense")
proto_case("sparse_indices_shape", lambda: sparse([4, 4], [0, 0, 1], [3]), "indices of shape")


# --- what constants demand ------------------------------------------------------------------------


def text_case(name: str, text: str, error: str | None = None, note: str | None = None, **head: str) -> None:
    proto_case(name, lambda: parse(text, **head), error, note)


def bomb_case(name: str, body: str, error: str | None, opset: int = 17) -> None:
    text = f"g (float[1, 1] x) => (y) {{ {body} }}"
    text_case(name, text, error, head=f'ir_version: 10, opset_import: ["" : {opset}]')


_ints = "Constant <value_ints = [%s]> ()".__mod__
bomb_case(
    "constant_of_shape_bomb", f"s = {_ints('65536, 65536, 4')} y = ConstantOfShape(s)", "creates at least"
)
bomb_case("constant_of_shape_large", f"s = {_ints('1024, 1024, 256')} y = ConstantOfShape(s)", None)
bomb_case("constant_of_shape_without_input", "y = ConstantOfShape()", None)
bomb_case("constant_of_shape_negative", f"s = {_ints('-1, 65536')} y = ConstantOfShape(s)", None)
bomb_case("expand_bomb", f"s = {_ints('65536, 65536, 65536')} y = Expand(x, s)", "creates at least")
bomb_case("tile_bomb", f"r = {_ints('65536, 262144')} y = Tile(x, r)", "creates at least 17179869184 bytes")
bomb_case(
    "tile_of_tile_bomb", f"r = {_ints('65536, 4096')} h = Tile(x, r) y = Tile(h, r)", "creates at least"
)  # fmt: skip
bomb_case(
    "range_bomb",
    "a = Constant <value_int = 0> () b = Constant <value_int = 68719476736> ()"
    "d = Constant <value_int = 1> () y = Range(a, b, d)",
    "creates at least",
)
bomb_case(
    "range_not_finite",
    "a = Constant <value_float = 0.0> () b = Constant <value_float = 1e38> ()"
    "d = Constant <value_float = 1e-38> () y = Range(a, b, d)",
    "creates at least",
)
bomb_case("range_without_inputs", "y = Range()", None)
bomb_case("pad_bomb", f"p = {_ints('0, 0, 100000, 100000')} y = Pad(x, p)", "creates at least")
bomb_case("pad_small", f"p = {_ints('0, 0, -1, 3')} y = Pad(x, p)", None)
bomb_case("resize_sizes_bomb", f"s = {_ints('100000, 100000')} y = Resize(x, , , s)", "creates at least")
bomb_case(
    "resize_scales_bomb", "s = Constant <value_floats = [1e5, 1e5]> () y = Resize(x, , s)", "creates at least"
)  # fmt: skip
bomb_case(
    "upsample_attribute_bomb", "y = Upsample <scales = [1e5, 1e5]> (x)", "creates at least", opset=7
)  # fmt: skip
bomb_case("one_hot_bomb", f"n = {_ints('17179869184')} y = OneHot(x, n, x)", "creates at least")
bomb_case("random_bomb", "y = RandomNormal <shape = [100000, 100000]> ()", "creates at least")
bomb_case("window_bomb", "n = Constant <value_int = 17179869184> () y = HannWindow(n)", "creates at least")
text_case("eye_like_bomb", "g (float[100000, 100000] x) => (y) { y = EyeLike(x) }", "creates at least")


def _loop(trips: str, condition: str, ends: str) -> str:
    return f"""g (float[1] x) => (float[1] y) {{
        m = Constant <value_int = {trips}> ()
        c = Constant <value = bool {{{condition}}}> ()
        y = Loop (m, c, x) <body = b (int64 i, bool c_in, float[1] v) => (bool c_out, float[1] v_out) {{
            {ends}
            v_out = Relu(v)
        }}>
    }}"""


text_case(
    "loop_never_ends",
    _loop("4611686018427387904", "1", "c_out = Identity(c_in)"),
    "4611686018427387904 times",
)
text_case(
    "loop_constant_inside",
    _loop("4611686018427387904", "1", "k = Constant <value = bool {1}> () c_out = Identity(k)"),
    "4611686018427387904 times",
)
text_case("loop_short", _loop("100", "1", "c_out = Identity(c_in)"))
text_case("loop_that_is_left_at_once", _loop("4611686018427387904", "0", "c_out = Identity(c_in)"))
text_case("loop_that_may_end", _loop("4611686018427387904", "1", "c_out = Not(c_in)"))
text_case(
    "loop_for_ever",
    "g (float[1] x) => (float[1] y) { y = Loop (, , x) <body = b (int64 i, bool c_in, float[1] v) => "
    "(bool c_out, float[1] v_out) { c_out = Not(c_in) v_out = Relu(v) }> }",
    "for ever",
)


@case("creates at least")
def _constant_of_shape_external_bomb(folder: Path) -> Path:
    model = parse("g () => (float[a, b] y) { y = ConstantOfShape(W) }")
    shape = tensor(TensorProto.INT64, [2], data_location=TensorProto.EXTERNAL)
    shape.external_data.add(key="location", value="w.bin")
    model.graph.initializer.append(shape)
    (folder / "w.bin").write_bytes(np.array([1 << 20, 1 << 20], np.int64).tobytes())
    return write(folder, model)


# --- structure ------------------------------------------------------------------------------------

text_case("cycle", "g (float[1] x) => (float[1] b) { a = Add(x, b) b = Relu(a) }", "cycle")
text_case("cycle_behind", "g (float[1] x) => (float[1] z) { z = Neg(b) a = Add(x, b) b = Relu(a) }", "cycle")
text_case("self_loop", "g (float[1] x) => (float[1] a) { a = Add(x, a) }", "cycle")
text_case(
    "value_twice", "g (float[1] x) => (float[1] y) { y = Relu(x) y = Neg(x) }", "again; names must be unique"
)
text_case(
    "input_overwritten", "g (float[1] x) => (float[1] x) { x = Relu(x) }", "again; names must be unique"
)
text_case("input_twice", "g (float[1] x, float[1] x) => (float[1] y) { y = Relu(x) }", "more than one input")
text_case(
    "dangling_input", "g (float[1] x) => (float[1] y) { y = Relu(zz) }", "reads 'zz', which nothing defines"
)
text_case(
    "output_without_producer", "g (float[1] x) => (float[1] y) { q = Relu(x) }", "output 'y' is not produced"
)
text_case("no_outputs", "g (float[1] x) => () { y = Relu(x) }", "no outputs")
text_case("empty_graph", "g (float[1] x) => (float[1] x) {}")
text_case("output_without_shape", "g (float[1] x) => (float y) { y = Relu(x) }")
text_case("out_of_order", "g (float[1] x) => (float[1] y) { y = Relu(a) a = Neg(x) }", note="sorted")
text_case(
    "initializer_twice",
    "g (float[1] x) => (float[1] y) <float[1] W = {0}, float[1] W = {1}> { y = Add(x, W) }",
    "more than one initializer",
)
text_case("opset_999", RELU, "1 to 26 are supported", head='ir_version: 10, opset_import: ["" : 999]')
text_case("opset_0", RELU, "opset 0", head='ir_version: 10, opset_import: ["" : 0]')
text_case(
    "opset_twice", RELU, "versions 17 and 13", head='ir_version: 10, opset_import: ["" : 17, "ai.onnx" : 13]'
)
text_case("opset_6", RELU, None, "older than 7", head='ir_version: 3, opset_import: ["" : 6]')
text_case("ir_999", RELU, "versions 3 to 13", head='ir_version: 999, opset_import: ["" : 17]')
text_case("ir_2", RELU, "versions 3 to 13", head='ir_version: 2, opset_import: ["" : 6]')
text_case(
    "unknown_domain",
    "g (float[1] x) => (float[1] y) { y = com.evil.Evil(x) }",
    head='ir_version: 10, opset_import: ["" : 17, "com.evil" : 1]',
)
text_case(
    "domain_not_imported",
    "g (float[1] x) => (float[1] y) { y = com.evil.Evil(x) }",
    "does not import that domain",
)
text_case(
    "runtime_domain_not_imported",
    "g (float[1] x) => (float[1] y) { y = com.microsoft.Gelu(x) }",
    note="'com.microsoft' is used but not imported",
)
text_case(
    "conv_rank",  # types and shapes are for ONNX Runtime to refuse
    "g (float[1, 3, 8, 8] x, float[4, 3, 3, 3, 3, 3] w) => (y) { y = Conv(x, w) }",
)
text_case("split_1000", "g (float[4] x) => (y, z) { y, z = Split <num_outputs = 1000> (x) }")
text_case(
    "initializer_also_input",
    "g (float[1] x, float[1] W) => (float[1] y) <float[1] W = {1}> { y = Add(x, W) }",
)
text_case("optional_inputs", "g (float[4] x, float h) => (float[4] y) { y = Clip(x, , h) }")
text_case(
    "sequence_and_optional",
    "g (seq(float[N]) s, optional(float[N]) o) => (float[N] y, bool h) {"
    " i = Constant <value_int = 0> () y = SequenceAt(s, i) h = OptionalHasElement(o) }",
)
text_case(
    "capture_in_subgraphs",
    "g (float[1] x, bool c) => (float[1] y) { h = Relu(x) y = If (c) <then_branch = t () => (float[1] a) {"
    " a = If (c) <then_branch = tt () => (float[1] b) { b = Neg(h) }, else_branch = te () => (float[1] d)"
    " { d = Identity(x) }> }, else_branch = e () => (float[1] f) { f = Identity(h) }> }",
)
text_case(
    "capture_out_of_order",
    "g (float[1] x, bool c) => (float[1] y) { y = If (c) <then_branch = t () => (float[1] a) { a = Neg(h) },"
    " else_branch = e () => (float[1] f) { f = Identity(h) }> h = Relu(x) }",
    note="sorted",
)
text_case(
    "capture_cycle",
    "g (float[1] x, bool c) => (float[1] y) { y = If (c) <then_branch = t () => (float[1] a) { a = Neg(h) },"
    " else_branch = e () => (float[1] f) { f = Identity(x) }> h = Relu(y) }",
    "cycle",
)
text_case(
    "capture_of_nothing",
    "g (float[1] x, bool c) => (float[1] y) { y = If (c) <then_branch = t () => (float[1] a) { a = Neg(zz) },"
    " else_branch = e () => (float[1] f) { f = Identity(x) }> }",
    "Neg node .* reads 'zz'",
)


def edited(edit: Callable[[onnx.ModelProto], object], text: str = RELU) -> Callable[[], onnx.ModelProto]:
    def make() -> onnx.ModelProto:
        model = parse(text)
        edit(model)
        return model

    return make


proto_case("no_opset", edited(lambda m: m.ClearField("opset_import")), "imports no operator set")
proto_case("no_graph", edited(lambda m: m.ClearField("graph")), "no graph")
_EVIL = "\x1b[2J<script>alert(1)</script>../../etc" + "n" * 5000
proto_case("evil_names", edited(lambda m: setattr(m.graph.node[0], "name", _EVIL)), None)
proto_case(
    "very_long_name", edited(lambda m: setattr(m.graph.node[0], "name", "n" * 70_000)), "longer than 65536"
)
proto_case(
    "name_not_utf8", lambda: good().SerializeToString().replace(b"e_out", b"\xff\xfe_\xfc\xfb"), "not UTF-8"
)  # fmt: skip


@case(note="'n'")
def _node_names_twice(folder: Path) -> Path:
    model = parse("g (float[1] x) => (float[1] y) { a = Relu(x) y = Neg(a) }")
    for node in model.graph.node:
        node.name = "n"
    return write(folder, model)


def _context(location: str) -> onnx.ModelProto:
    node = helper.make_node(
        "EPContext",
        ["x"],
        ["y"],
        domain="com.microsoft",
        embed_mode=0,
        ep_cache_context=location,
        main_context=1,
    )
    model = parse(
        "g (float[1] x) => (float[1] y) {}", 'ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]'
    )
    model.graph.node.append(node)
    return model


proto_case("context_absolute", lambda: _context("/tmp/engine.bin"), "absolute")
proto_case("context_parent_folder", lambda: _context("../engine.bin"), "'\\.\\.'")
proto_case("context_beside_the_model", lambda: _context("engine.bin"), None)


def nested(depth: int) -> bytes:
    """An If in an If ..., written by hand: onnx itself cannot serialize deep nests."""

    def field(number: int, content: bytes) -> bytes:
        return _varint(number << 3 | 2) + _varint(len(content)) + content

    def branch(name: bytes, node: bytes, output: bytes) -> bytes:
        graph = field(1, node) + field(2, b"g") + field(12, field(1, output))
        return field(5, field(1, name) + field(6, graph) + _varint(20 << 3) + b"\x05")

    value = b"v0"
    node = field(1, b"x") + field(2, value) + field(4, b"Identity")
    for level in range(1, depth + 1):
        other = field(1, b"x") + field(2, b"e%d" % level) + field(4, b"Identity")
        branches = branch(b"then_branch", node, value) + branch(b"else_branch", other, b"e%d" % level)
        value = b"v%d" % level
        node = field(1, b"c") + field(2, value) + field(4, b"If") + branches
    shape = field(2, field(1, b"\x08\x01"))
    inputs = field(11, field(1, b"x") + field(2, field(1, b"\x08\x01" + shape)))
    inputs += field(11, field(1, b"c") + field(2, field(1, b"\x08\x09" + field(2, b""))))
    graph = field(1, node) + field(2, b"g") + inputs + field(12, field(1, value))
    return b"\x08\x0a" + field(8, field(1, b"") + b"\x10\x11") + field(7, graph)


def _varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes((value & 0x7F | 0x80,))
        value >>= 7
    return out + bytes((value,))


proto_case("nested_30", lambda: nested(30), None)
proto_case("nested_40", lambda: nested(40), "nests more than 100 messages")
proto_case("nested_3000", lambda: nested(3000), "nests more than 100 messages")


def _functions(bodies: dict[str, list[str]]) -> onnx.ModelProto:
    """Functions F0, F1, ... of domain f, each a chain of the operators listed; the model calls F0."""
    functions = []
    for name, operators in bodies.items():
        values = ["a", *(f"t{i}" for i in range(len(operators) - 1)), "b"]
        nodes = [
            helper.make_node(op, [values[i]], [values[i + 1]], domain="f" if op in bodies else "")
            for i, op in enumerate(operators)
        ]
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
        functions.append(helper.make_function("f", name, ["a"], ["b"], nodes, imports))
    model = parse(
        "g (float[1] x) => (float[1] y) { y = f.F0(x) }", 'ir_version: 10, opset_import: ["" : 17, "f" : 1]'
    )
    model.functions.extend(functions)
    return model


proto_case("function", lambda: _functions({"F0": ["Relu", "F1"], "F1": ["Neg"]}), None)
proto_case("function_recursive", lambda: _functions({"F0": ["F0"]}), "calls itself")
proto_case("function_mutually_recursive", lambda: _functions({"F0": ["F1"], "F1": ["F0"]}), "calls itself")
proto_case(
    "function_bomb",
    lambda: _functions({f"F{i}": [f"F{i + 1}" if i < 11 else "Relu"] * 10 for i in range(12)}),
    "expanded the model has more than",
)
proto_case(
    "function_chain",
    lambda: _functions({f"F{i}": [f"F{i + 1}" if i < 4999 else "Relu"] for i in range(5000)}),
    None,
)


@case("defined twice")
def _function_twice(folder: Path) -> Path:
    model = _functions({"F0": ["Relu"]})
    model.functions.append(model.functions[0])
    return write(folder, model)


@case("creates at least")
def _bomb_hidden_by_a_function(folder: Path) -> Path:
    model = parse(
        "g (float[1, 1] x) => (y) { r = Constant <value_ints = [65536, 262144]> () y = Tile(x, r) }"
    )
    nodes = [helper.make_node("Identity", ["a"], ["b"])]
    model.functions.append(helper.make_function("", "Tile", ["a", "r"], ["b"], nodes, model.opset_import))
    return write(folder, model)


@case(r"'\\x1b\[2J' node of \['y'\] reads 'zz'")
def _control_characters_are_escaped_in_messages(folder: Path) -> Path:
    model = parse("g (float[1] x) => (float[1] y) { y = Relu(zz) }")
    model.graph.node[0].op_type = "\x1b[2J"
    return write(folder, model)


@case("reads 'x'")
def _function_captures(folder: Path) -> Path:
    model = _functions({"F0": ["Relu"]})
    model.functions[0].node[0].input[0] = "x"
    return write(folder, model)


@case()
def _chain_of_50000_nodes(folder: Path) -> Path:
    model = parse("g (float[1] a0) => (float[1] a50000) {}")
    model.graph.node.extend(helper.make_node("Relu", [f"a{i}"], [f"a{i + 1}"]) for i in range(50_000))
    return write(folder, model)


@case(note="sorted")
def _reversed_chain_of_20000_nodes(folder: Path) -> Path:
    model = parse("g (float[1] a0) => (float[1] a20000) {}")
    model.graph.node.extend(
        helper.make_node("Relu", [f"a{i}"], [f"a{i + 1}"]) for i in reversed(range(20_000))
    )
    return write(folder, model)


@case()
def _initializers_30000(folder: Path) -> Path:
    model = parse(RELU)
    model.graph.initializer.extend(
        TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[1], raw_data=bytes(4))
        for i in range(30_000)
    )
    return write(folder, model)


# --- files ----------------------------------------------------------------------------------------


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", "x")
    return buffer.getvalue()


for _name, _content, _error in (
    ("empty", b"", "empty"),
    ("garbage", np.random.default_rng(1).bytes(4096), "ONNX|damaged"),
    ("html", b"<!DOCTYPE html><html>404</html>", "HTML page"),
    ("xml", b'<?xml version="1.0"?><net/>', "XML"),
    ("git_lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12345\n", "git lfs pull"),
    ("zip", _zip(), "zip archive"),
    ("gzip", gzip.compress(b"x" * 100), "gzip"),
    ("seven_zip", b"7z\xbc\xaf\x27\x1c" + bytes(50), "7-Zip"),
    ("ort", bytes(4) + b"ORTM" + bytes(512), r"\.ort"),
    ("tflite", b"\x1c\0\0\0TFL3" + bytes(512), "TensorFlow Lite"),
    ("pickle", b"\x80\x02}q\x00.", "pickle"),
    ("safetensors", b"\x10\0\0\0\0\0\0\0{}              ", "safetensors"),
    ("json", b'{"ir_version": 8}', "JSON"),
    ("text", b"ir_version: 8\nproducer_name: 'x'\n", "text file"),
    ("truncated", good().SerializeToString()[:3000], "cut off"),
    ("trailing_junk", good().SerializeToString() + b"\xff" * 64, "not ONNX"),
    ("trailing_zeros", good().SerializeToString() + bytes(64), "not ONNX"),
    ("two_models", good().SerializeToString() * 2, "twice"),
    ("unknown_field", good().SerializeToString() + b"\xfa\x3f" + _varint(16 << 20) + b"A" * (16 << 20), None),
):
    proto_case(f"file_{_name}", lambda content=_content: content, _error)  # type: ignore[misc]


@case("folder")
def _file_folder(folder: Path) -> Path:
    (folder / "m.onnx").mkdir()
    return folder / "m.onnx"


@case("pipe")
def _file_fifo(folder: Path) -> Path:
    os.mkfifo(folder / "m.onnx")
    return folder / "m.onnx"


@case("pipe, socket or device")
def _file_device(folder: Path) -> Path:
    return Path("/dev/zero")


@case("does not exist")
def _file_missing(folder: Path) -> Path:
    return folder / "m.onnx"


@case("cannot be opened")
def _file_name_with_nul(folder: Path) -> Path:
    return folder / "m\0.onnx"
