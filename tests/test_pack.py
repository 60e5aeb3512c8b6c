"""pack and unpack: smaller, folded by ONNX Runtime, bit for bit the same, and back."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp
from onnxcomp import io
from onnxcomp.errors import ModelError
from onnxcomp.graph import Constant, Model
from onnxcomp.inspection import inspect
from onnxcomp.manager import Context, PassRecord, run_pass
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.fold_constants import FoldConstants
from onnxcomp.passes.fuse import Fuse
from onnxcomp.passes.pack import Pack
from onnxcomp.passes.pack_choice import choose, plain_bytes
from onnxcomp.passes.unpack import Unpack
from onnxcomp.profiling import executed_kernels, optimized_graph
from onnxcomp.runtime import open_session
from onnxcomp.serde import from_proto
from onnxcomp.storage import DOMAIN, is_packed, plain
from tests.conftest import ROOT

Array = npt.NDArray[np.generic]
MODELS = sorted(path.stem for path in (ROOT / "models").glob("*.onnx"))
CONV = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 16, 8, 8] x) => (float[N, 32, 6, 6] y) { y = Conv (x, w) }"""


def parse(text: str, **weights: Array) -> Model:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in weights.items())
    return from_proto(proto)


def shared(*shape: int, kind: str = "float32", values: int = 16, zeros: float = 0.0, seed: int = 0) -> Array:
    """A weight of few values, of which a share is zero."""
    rng = np.random.default_rng(seed)
    book = (rng.standard_normal(values) * 40).astype(kind)
    return np.where(rng.random(shape) < zeros, np.zeros((), kind), book[rng.integers(0, values, shape)]).astype(kind)


def packed(model: Model, **options: object) -> PassRecord:
    return run_pass(Pack(), model, Context(**options))  # type: ignore[arg-type]


def back(model: Model) -> bytes:
    copy = model.copy()
    run_pass(Unpack(), copy, Context())
    return copy.to_bytes()


def calls(model: Model) -> list[str]:
    return [node.op for node in model.nodes() if node.domain == DOMAIN]


def run(model: Model, **feeds: Array) -> bytes:
    return b"".join(np.asarray(v).tobytes() for v in open_session(model).run(feeds))


def simplified(path: Path, values: int, zeros: float) -> Model:
    """A model whose weights have few values, most of them zero."""
    model = io.load(path)
    for scope in model.graph.scopes():
        for item in scope.initializers:
            if isinstance(item, Constant) and item.dtype == np.float32 and len(item.shape) > 1:
                item.values = shared(*item.shape, values=values, zeros=zeros)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("zeros", [0.0, 0.8])
def test_a_model_that_was_packed_saved_and_unpacked_is_the_file_that_it_was(
    tmp_path: Path, name: str, zeros: float
) -> None:
    before = io.save(simplified(ROOT / "models" / f"{name}.onnx", 16, zeros), tmp_path / "plain.onnx")
    model = io.load(before.path)

    record = packed(model)
    stored = io.save(model, tmp_path / "packed.onnx")
    again = io.load(stored.path)
    run_pass(Unpack(), again, Context())
    after = io.save(again, tmp_path / "again.onnx")

    assert record.rewrites > 0
    assert stored.bytes < before.bytes / 2
    assert after.path.read_bytes() == before.path.read_bytes()
    onnx.checker.check_model(str(stored.path), full_check=True)


def test_the_same_kernels_run_on_the_same_constants() -> None:
    x = np.random.default_rng(1).standard_normal((1, 16, 8, 8)).astype(np.float32)
    model = parse(CONV, w=shared(32, 16, 3, 3, zeros=0.7))
    before, kernels = run(model, x=x), {k.op for k in executed_kernels(model, {"x": x})}

    assert packed(model).details["packed"] == 1

    assert run(model, x=x) == before
    assert {k.op for k in executed_kernels(model, {"x": x})} == kernels
    assert not [i.name for i in optimized_graph(model).graph.initializer if i.name in ("b0", "r0", "c0", "t0")]


def test_int8_weights_are_packed_and_still_run_on_int8_kernels() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 16, 8, 8] x) => (float[1, 32, 6, 6] y) {
          xq = QuantizeLinear (x, xs, xz)
          xf = DequantizeLinear (xq, xs, xz)
          wf = DequantizeLinear <axis = 0> (w, ws, wz)
          c = Conv (xf, wf)
          yq = QuantizeLinear (c, ys, xz)
          y = DequantizeLinear (yq, ys, xz)
        }""",
        w=shared(32, 16, 3, 3, kind="int8", zeros=0.8),
        ws=np.linspace(0.01, 0.02, 32, dtype=np.float32), wz=np.zeros(32, np.int8),
        xs=np.float32(0.02), xz=np.uint8(128), ys=np.float32(0.5),
    )  # fmt: skip
    x = np.random.default_rng(1).standard_normal((1, 16, 8, 8)).astype(np.float32)
    before = run(model, x=x)

    record = packed(model)

    assert record.details["tensors"][0]["bits per weight"] < 3
    assert "QLinearConv" in {k.op for k in executed_kernels(model, {"x": x})}
    assert run(model, x=x) == before


@pytest.mark.parametrize("opset", [7, 9, 11, 12, 13, 21])
def test_models_of_older_opsets_are_raised_and_go_back(opset: int) -> None:
    proto = onnx.parser.parse_model(CONV.replace(": 17", f": {opset}").replace("ir_version: 8", "ir_version: 3"))
    weight = shared(32, 16, 3, 3, zeros=0.7)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    proto.graph.input.insert(0, helper.make_tensor_value_info("w", TensorProto.FLOAT, weight.shape))
    model = from_proto(proto)
    before = model.to_bytes()

    record = packed(model)

    assert len(calls(model)) == 1
    assert model.opset == max(opset, 12)
    assert ("notes" in record.details) == (opset < 12)
    assert [i.name for i in model.graph.inputs] == ["x"]
    assert back(from_proto(onnx.ModelProto.FromString(model.to_bytes()))) == before


PADDED = """<ir_version: 4, opset_import: ["" : 9]>
g (float[N, 16, 8, 8] x) => (float[N, 32, 8, 8] y) {
  p = Pad <pads = [0, 0, 1, 1, 0, 0, 1, 1]> (x) c = Conv (p, w) y = Clip <min = 0.0, max = 6.0> (c) }"""


def test_an_upgrade_that_rewrites_nodes_is_undone() -> None:
    model = parse(PADDED, w=shared(32, 16, 3, 3))
    x = np.random.default_rng(1).standard_normal((1, 16, 8, 8)).astype(np.float32)
    before, text = run(model, x=x), model.to_bytes()

    record = packed(model)

    assert any("Pad" in note for note in record.details["notes"])
    assert run(model, x=x) == before
    assert back(from_proto(onnx.ModelProto.FromString(model.to_bytes()))) == text


@pytest.mark.parametrize("way", ["changed since", "not reversible"])
def test_an_upgrade_stays_where_the_old_nodes_are_not_those_of_the_model(way: str) -> None:
    model = parse(PADDED, w=shared(32, 16, 3, 3))
    record = run_pass(Pack(reversible=way != "not reversible"), model, Context())
    if way == "changed since":
        next(n for n in model.graph.nodes if n.op == "Conv").name = "another"
    x = np.random.default_rng(1).standard_normal((1, 16, 8, 8)).astype(np.float32)
    before = run(model, x=x)

    run_pass(Unpack(), model, Context())

    assert (model.opset, calls(model), run(model, x=x)) == (12, [], before)
    assert not model.header.metadata_props
    assert any("unpacked" in note for note in record.details["notes"]) == (way == "not reversible")


@pytest.mark.parametrize("note", ["{", '{"opset":[1]}', '{"original":["x",[0]]}', '{"original":["x",[0]', "[]"])
def test_a_damaged_note_is_refused(note: str) -> None:
    model = parse(CONV, w=shared(32, 16, 3, 3))
    packed(model)
    model.header.metadata_props.add(key=DOMAIN, value=note)

    with pytest.raises(ModelError, match="metadata"):
        run_pass(Unpack(), model, Context())


def test_nodes_that_name_an_empty_domain_do_so_again(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (int64[N] i) => (float[N, 64] y) {
          v = Constant <value = float[1] {0.0}> () a = Gather (w, i) y = MatMul (a, v) }"""
    )
    proto.graph.initializer.append(numpy_helper.from_array(shared(500, 64), "w"))
    proto.graph.node[0].attribute[0].t.CopyFrom(numpy_helper.from_array(shared(64, 64, seed=3)))
    for node in proto.graph.node:
        node.domain = ""
    model = from_proto(proto)
    text = model.to_bytes()

    assert packed(model).details["packed"] == 2

    io.save(model, tmp_path / "packed.onnx")
    assert back(io.load(tmp_path / "packed.onnx")) == text


def test_weights_of_branches_are_packed_and_folded() -> None:
    branch = """{0} () => (float[N, 64] {0}_y) <float[64, 64] w_{0}> {{ {0}_y = MatMul (x, w_{0}) }}"""
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 64] x, bool c) => (float[N, 64] y) {'
        "y = If (c) <then_branch = " + branch.format("a") + ", else_branch = " + branch.format("b") + "> }"
    )
    for attribute, seed in zip(proto.graph.node[0].attribute, (1, 2), strict=True):
        del attribute.g.initializer[:]
        name = attribute.g.node[0].input[1]
        attribute.g.initializer.append(numpy_helper.from_array(shared(64, 64, seed=seed), name))
    model = from_proto(proto)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    before, text = [run(model, x=x, c=np.asarray(c)) for c in (True, False)], model.to_bytes()

    assert packed(model).details["packed"] == 2

    assert [run(model, x=x, c=np.asarray(c)) for c in (True, False)] == before
    assert back(model) == text


def test_weights_in_constant_nodes_and_in_functions_are_packed_and_go_back(tmp_path: Path) -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (float[N, 64] x) => (float[N, 64] y) {
          v = Constant <value = float[1] {0.0}> () a = MatMul (x, v) y = own.F (a) }
        <domain: "own", opset_import: ["" : 17]>
        F (x) => (y) { w = Constant <value = float[1] {0.0}> () y = MatMul (x, w) }"""
    )
    for scope, seed in ((model.graph, 1), (model.functions[0].body, 2)):
        scope.nodes[0].attrs["value"] = Constant("value", shared(64, 64, seed=seed))
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    before = run(model, x=x)
    first = io.save(model, tmp_path / "plain.onnx")

    model = io.load(first.path)
    assert packed(model).details["packed"] == 2
    assert run(model, x=x) == before
    stored = io.save(model, tmp_path / "packed.onnx")
    again = io.load(stored.path)
    run_pass(Unpack(), again, Context())

    assert stored.bytes < first.bytes / 4
    assert io.save(again, tmp_path / "again.onnx").path.read_bytes() == first.path.read_bytes()


@pytest.mark.parametrize("values", [2, 16, 30, 200])
def test_a_table_of_which_only_rows_are_read_stays_packed_at_run_time(
    values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxcomp.passes.pack._TABLE_BYTES", 4096)
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (int64[N, M] i, int64 j) => (float[N, M, 64] y, float[64] z) {
          y = Gather (w, i) [named] z = Gather <axis = 0> (w, j) }""",
        w=shared(500, 64, values=values),
    )
    feeds = {"i": np.asarray([[3, -1], [499, 0]]), "j": np.asarray(7)}
    empty = {"i": np.empty((0, 5), np.int64), "j": np.asarray(-500)}
    before, nothing, text = run(model, **feeds), run(model, **empty), model.to_bytes()

    record = packed(model)

    assert {"Rows" in op for op in calls(model)} == {True}
    assert len(calls(model)) == 2
    assert (run(model, **feeds), run(model, **empty)) == (before, nothing)
    largest = max(np.prod(i.dims) for i in optimized_graph(model).graph.initializer)
    assert largest <= 500 * 64
    assert record.details["tensors"][0]["bits per weight"] < 13
    io.save(model, tmp_path / "packed.onnx")
    onnx.checker.check_model(str(tmp_path / "packed.onnx"), full_check=True)
    assert back(io.load(tmp_path / "packed.onnx")) == text


def test_a_small_table_is_decoded_at_load() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (int64[N] i) => (float[N, 64] y) { y = Gather (w, i) }""",
        w=shared(500, 64),
    )

    packed(model)

    assert calls(model) == ["Codes4"]


def test_a_table_that_something_else_reads_as_well_is_decoded_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcomp.passes.pack._TABLE_BYTES", 4096)
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (int64[N] i) => (float[N, 500] y) { a = Gather (w, i) t = Transpose (w) y = MatMul (a, t) }""",
        w=shared(500, 64),
    )

    packed(model)

    assert calls(model) == ["Codes4"]


def test_a_tied_weight_is_stored_once() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 64] x) => (float[N, 64] y) { a = MatMul (x, w) y = MatMul (a, w) }""",
        w=shared(64, 64),
    )

    assert packed(model).details["packed"] == 1
    assert len(calls(model)) == 1


def test_what_onnx_runtime_cannot_fold_is_left_alone_with_a_reason() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 64] x, float[64, 64] v) => (float[N, 64] y, float[64, 64] u) {
          a = MatMul (x, v) y = MatMul (a, w) }""",
        v=shared(64, 64), w=np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32), u=shared(64, 64),
    )  # fmt: skip

    record = packed(model)

    assert record.rewrites == 0
    assert {r.where for r in record.refused} == {"v", "u"}
    assert "override" in next(r.reason for r in record.refused if r.where == "v")


def test_a_decoder_that_is_not_folded_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxcomp.passes import pack_proof

    def without_folding(model: Model) -> onnx.ModelProto:
        proto = onnx.ModelProto.FromString(model.to_bytes())
        proto.graph.node.append(helper.make_node("Gather", ["t0", "c0"], ["w"]))
        return proto

    model = parse(CONV, w=shared(32, 16, 3, 3))
    before = model.to_bytes()
    monkeypatch.setattr(pack_proof, "optimized_graph", without_folding)

    record = packed(model)

    assert "does not fold" in record.refused[0].reason
    assert model.to_bytes() == before


def test_tensors_that_the_runtime_decodes_differently_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxcomp.passes import pack

    model = parse(CONV, w=shared(32, 16, 3, 3))
    before = model.to_bytes()
    monkeypatch.setattr(pack, "inexact", lambda *given: "other values")

    record = packed(model)

    assert [r.reason for r in record.refused] == ["other values"]
    assert model.to_bytes() == before


def test_a_form_that_saves_less_than_its_function_costs_is_not_used() -> None:
    model = parse(CONV, w=shared(32, 16, 3, 3), bias=shared(40))
    small = parse(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 8] x) => (float[N, 8] y) { y = MatMul (x, w) }""",
        w=shared(8, 8),
    )

    assert packed(small).rewrites == 0
    assert packed(model).details["packed"] == 1


def test_the_bytes_in_the_report_are_those_of_the_file() -> None:
    model = parse(CONV, w=shared(32, 16, 3, 3))
    before = len(model.to_bytes())

    record = packed(model)

    saved = record.details["bytes before"] - record.details["bytes"]
    functions = sum(f.ByteSize() for f in onnx.ModelProto.FromString(model.to_bytes()).functions)
    assert before - len(model.to_bytes()) == pytest.approx(saved - functions, abs=40)


def test_weights_that_are_too_large_for_memory_are_encoded_and_decoded_when_they_are_written(tmp_path: Path) -> None:
    model = parse(CONV, w=shared(32, 16, 3, 3, zeros=0.8))
    before = io.save(model, tmp_path / "plain.onnx", external_data=True)
    model = io.load(before.path)

    record = packed(model, memory=1000)
    stored = io.save(model, tmp_path / "packed.onnx", external_data=True)
    again = io.load(stored.path)
    run_pass(Unpack(), again, Context(memory=1000))
    after = io.save(again, tmp_path / "plain_again.onnx", external_data=True)

    assert record.details["packed"] == 1
    assert before.data is not None
    assert after.data is not None
    assert after.data.read_bytes() == before.data.read_bytes()


def test_other_passes_leave_packed_weights_packed() -> None:
    model = parse(CONV, w=shared(32, 16, 3, 3, zeros=0.7))
    packed(model)
    before = calls(model)

    for one in (Cleanup(), FoldConstants(), Fuse(), Cleanup()):
        run_pass(one, model, Context())

    assert calls(model) == before
    assert is_packed(model)


def test_equal_streams_that_were_merged_are_no_obstacle() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 64] x) => (float[N, 64] y) { a = MatMul (x, v) y = MatMul (a, w) }""",
        v=shared(64, 64, seed=1), w=shared(64, 64, seed=1)[::-1].copy(),
    )  # fmt: skip
    weights = {c.name: c.values.tobytes() for c in model.graph.initializers}
    packed(model)
    run_pass(Cleanup(), model, Context())

    run_pass(Unpack(), model, Context())

    assert {c.name: c.values.tobytes() for c in model.graph.initializers} == weights


@pytest.mark.parametrize("change", ["body", "name", "version", "stream", "attribute"])
def test_what_is_not_known_is_refused(change: str) -> None:
    model = parse(CONV, w=shared(32, 16, 3, 3))
    packed(model)
    proto = onnx.ModelProto.FromString(model.to_bytes())
    if change == "body":
        proto.functions[0].node[3].attribute[0].i = 7
        proto.functions[0].node[-1].op_type = "GatherElements"
    elif change == "name":
        proto.functions[0].name = proto.graph.node[0].op_type = "Codes5"
    elif change == "version":
        next(o for o in proto.opset_import if o.domain == DOMAIN).version = 2
    elif change == "stream":
        proto.graph.node[0].input[1] = "x"
    else:
        del proto.graph.node[0].attribute[:]

    with pytest.raises(ModelError, match=r"unpack|not known|no constant|needs"):
        run_pass(Unpack(), from_proto(proto), Context())


def test_the_bisection_limit_packs_only_the_first_tensors() -> None:
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 64] x) => (float[N, 64] y) { a = MatMul (x, v) y = MatMul (a, w) }""",
        v=shared(64, 64, seed=1), w=shared(64, 64, seed=2),
    )  # fmt: skip

    record = packed(model, limit=1)

    assert record.rewrites == 1
    assert len(calls(model)) == 1


def test_optimize_unpacks_packed_models_and_packs_the_result(tmp_path: Path) -> None:
    model = parse(CONV, w=shared(32, 16, 3, 3, zeros=0.7))
    first = io.save(model, tmp_path / "plain.onnx")
    packed(model)
    io.save(model, tmp_path / "packed.onnx")
    options = {"bench_seconds": 0, "force": True}

    report = onnxcomp.optimize(tmp_path / "packed.onnx", tmp_path / "a.onnx", passes="cleanup", **options)
    onnxcomp.optimize(tmp_path / "packed.onnx", tmp_path / "b.onnx", passes="unpack", **options)

    assert [r.name for r in report.passes] == ["unpack", "cleanup", "pack"]
    assert calls(io.load(tmp_path / "a.onnx")) == calls(model)
    assert (tmp_path / "b.onnx").read_bytes() == first.path.read_bytes()


def test_inspect_shows_the_plain_weights_and_says_that_they_are_packed(tmp_path: Path) -> None:
    model = parse(CONV, w=shared(32, 16, 3, 3, zeros=0.7))
    expected = inspect(model)
    packed(model)
    io.save(model, tmp_path / "packed.onnx")

    found = inspect(tmp_path / "packed.onnx")

    assert (found.parameters, found.nonzero_parameters, found.macs) == (
        expected.parameters, expected.nonzero_parameters, expected.macs,
    )  # fmt: skip
    assert found.layers == expected.layers
    assert any("packed" in note for note in found.notes)
    assert found.file_bytes == (tmp_path / "packed.onnx").stat().st_size


def test_a_model_that_another_version_packed_is_run_compared_and_inspected(tmp_path: Path) -> None:
    model = parse(CONV, w=shared(32, 16, 3, 3))
    io.save(model, tmp_path / "plain.onnx")
    packed(model)
    proto = onnx.ModelProto.FromString(model.to_bytes())
    proto.functions[0].name = proto.graph.node[0].op_type = "Another"
    onnx.save(proto, tmp_path / "packed.onnx")

    found = onnxcomp.verify(tmp_path / "plain.onnx", tmp_path / "packed.onnx")
    back = onnxcomp.verify(tmp_path / "packed.onnx", tmp_path / "plain.onnx")

    assert "failed" not in (found.verdict, back.verdict)
    assert any("does not know" in note for note in inspect(tmp_path / "packed.onnx").notes)


def test_bfloat16_is_packed_and_four_bit_integers_are_left_with_a_reason() -> None:
    kinds = {"v": TensorProto.BFLOAT16, "w": TensorProto.INT4}
    types = {name: helper.tensor_dtype_to_np_dtype(kind) for name, kind in kinds.items()}
    model = parse(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 64] x) => (float[N, 64] y) {
          a = Cast <to = 1> (v) b = Cast <to = 1> (w) c = MatMul (x, a) y = MatMul (c, b) }""",
        **{name: np.random.default_rng(0).integers(0, 5, (64, 64)).astype(kind) for name, kind in types.items()},
    )
    x = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)
    before, text = run(model, x=x), model.to_bytes()

    record = packed(model)

    assert [t["name"] for t in record.details["tensors"]] == ["v"]
    assert "INT4" in record.refused[0].reason
    assert run(model, x=x) == before
    assert back(model) == text


def test_a_plain_model_is_its_own_plain_form() -> None:
    model = parse(CONV, w=shared(32, 16, 3, 3))

    assert plain(model) is model
    assert not choose([])
    assert plain_bytes(model.graph.initializers[0]) == pytest.approx(4 * 32 * 16 * 9, abs=32)


@pytest.mark.parametrize(("most", "ranked"), [(5000, False), (10_000, True)])
def test_large_models_get_no_codes_that_take_much_memory_to_decode(
    monkeypatch: pytest.MonkeyPatch, most: int, ranked: bool
) -> None:
    rng = np.random.default_rng(0)
    values = np.rint(rng.laplace(0, 1.2, (80, 100))).astype(np.float32)
    model = parse(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 80] x) => (float[N, 100] y) { y = MatMul (x, w) }""",
        w=values,
    )
    monkeypatch.setattr("onnxcomp.passes.pack.MAX_RANKED", most)

    packed(model)

    assert any("Ranks" in name for name in calls(model)) == ranked
