"""inspect and summary: what is counted, what is a parameter, and what is remarked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp import io, layers
from onnxcomp.errors import DataError, ModelError
from onnxcomp.inspection import Inspection, inspect, summary

HEAD = '<ir_version: 10, opset_import: ["" : 17, "here" : 1]>'
FOLDER = Path(__file__).resolve().parents[1] / "models"
KEYS = ["path", "sha256", "file_bytes", "parameters", "nonzero_parameters", "macs", "nodes"]

SMALL = """g (float[N,2] x) => (y)
<float[2,3] w = {1, 0, 2, 0, -0.0, 3}, float[3] b = {1, 2, 3}, int64[2] s = {-1, 3}> {
    h = MatMul (x, w)
    a = Add (h, b)
    y = Reshape (a, s)
}"""


def proto(text: str, head: str = HEAD) -> onnx.ModelProto:
    return onnx.parser.parse_model(f"{head}\n{text}")


def look(text: str, head: str = HEAD) -> Inspection:
    return inspect(proto(text, head))


# --- parameters ---------------------------------------------------------------------------------------------


def test_parameters_are_all_numbers_but_shapes() -> None:
    found = look(SMALL)
    assert (found.parameters, found.nonzero_parameters) == (9, 6)
    assert found.sparsity == pytest.approx(3 / 9)


def test_a_tensor_used_twice_counts_once() -> None:
    text = "g (float[2,2] x) => (y) <float[2,2] w = {1, 2, 3, 4}> { a = MatMul (x, w) y = MatMul (a, w) }"
    assert look(text).parameters == 4


def test_weights_in_constant_nodes_and_branches_count() -> None:
    found = look(
        """g (bool c, float[2] x) => (y) {
            k = Constant <value = float[2] {1, 2}> ()
            z = Add (x, k)
            y = If (c) <
                then_branch = a () => (s) <float[2] w = {3, 4}> { s = Mul (z, w) },
                else_branch = b () => (t) { t = Identity (z) }
            >
        }"""
    )
    assert found.parameters == 4
    assert "2 parameters are used in branches or loops" in found.notes


def test_zeros_are_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_PIECE", 4)
    found = look("g (float[1,10] x) => (y) <float[10] w = {1, 0, 1, 1, 0, 1, 1, 1, 0, 1}> { y = Mul (x, w) }")
    assert found.nonzero_parameters == 7


@pytest.mark.parametrize(("kind", "size"), [("INT4", 3), ("BFLOAT16", 10), ("FLOAT8E4M3FN", 5)])
def test_bytes_by_type_are_those_of_the_file(kind: str, size: int) -> None:
    tensor = helper.make_tensor("w", getattr(TensorProto, kind), [5], [1, 0, 2, 0, 3])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])], "g", [],
        [helper.make_tensor_value_info("y", getattr(TensorProto, kind), [5])], [tensor],
    )  # fmt: skip
    found = inspect(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))
    assert list(found.bytes_by_type.values()) == [size]
    assert (found.parameters, found.nonzero_parameters) == (5, 3)


# --- layers -------------------------------------------------------------------------------------------------


def test_layers_say_what_they_weigh_and_cost() -> None:
    matmul, add = look(SMALL).layers
    assert (matmul.op, matmul.weight_shape, matmul.parameters, matmul.bytes) == ("MatMul", (2, 3), 6, 24)
    assert (matmul.bits_per_weight, matmul.macs, matmul.share, matmul.quantized) == (32.0, 6, 1.0, False)
    assert (add.op, add.parameters, add.macs) == ("Add", 3, 0)


def test_int8_weights_behind_dequantize_linear_are_quantized() -> None:
    weight = numpy_helper.from_array(np.ones((64, 32), np.int8), "q")
    model = proto(
        """g (float[1,64] x, int8[64,32] q) => (y) <float s = {0.5}> {
            w = DequantizeLinear (q, s)
            y = MatMul (x, w)
        }"""
    )
    del model.graph.input[1]
    model.graph.initializer.append(weight)
    found = inspect(model)
    (layer,) = found.layers
    assert (layer.weight_shape, layer.dtype, layer.quantized) == ((64, 32), "int8", True)
    assert layer.bits_per_weight == pytest.approx(8 * (2048 + 4) / 2048)
    assert (
        found.quantization.dequantize_linear,
        found.quantization.weighted,
        found.quantization.quantized,
    ) == (1, 1, 1)
    assert found.passes[-1].candidates == 0


def test_a_weight_that_a_function_decodes_belongs_to_the_layer_that_reads_it() -> None:
    found = look(
        """g (float[1,2] x) => (y) <uint8[4] codes = {0, 1, 1, 0}, float[2] table = {0.5, 1.5}> {
            w = here.decode (codes, table)
            y = MatMul (x, w)
        }
        <domain: "here", opset_import: ["" : 17]> decode (c, t) => (w) {
            i = Cast <to = 7> (c)
            f = Gather (t, i)
            s = Constant <value = int64[2] {2, 2}> ()
            w = Reshape (f, s)
        }"""
    )
    (layer,) = found.layers
    assert (layer.op, layer.weight_shape, layer.macs) == ("MatMul", (2, 2), 4)
    assert layer.bytes == 4 + 8
    assert layer.bits_per_weight == 8 * 12 / 4


def test_shares_of_macs_add_up_to_one() -> None:
    found = inspect(FOLDER / "digits_resnet.onnx", trial=False)
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    assert sum(layer.macs or 0 for layer in found.layers) == found.macs


# --- remarks ------------------------------------------------------------------------------------------------


def test_notes_name_what_makes_a_model_hard() -> None:
    found = look(
        "g (float[N,H] x) => (y) { y = here.Mystery (x) }",
        '<ir_version: 8, opset_import: ["" : 11, "here" : 1]>',
    )
    assert "opset 11 is older than 13, which per-channel quantization needs" in found.notes
    assert "custom operators, which are left alone: here.Mystery" in found.notes
    assert "open dimensions besides the batch: H" in found.notes
    assert found.dynamic == {"N": ("x[0]",), "H": ("x[1]",)}


def test_initializers_as_inputs_are_noted() -> None:
    model = proto(SMALL)
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 3]))
    assert any("caller may override" in note for note in inspect(model).notes)
    model.ir_version = 3
    assert any("IR version 3" in note for note in inspect(model).notes)


def test_external_data_count_as_part_of_the_file(tmp_path: Path) -> None:
    weight = np.ones((64, 64), np.float32)
    model = proto("g (float[1,64] x) => (y) { y = Mul (x, x) }")
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    model.graph.node[0].input[1] = "w"
    path = tmp_path / "m.onnx"
    io.save(io.load(model), path, external_data=True)
    found = inspect(path)
    assert found.file_bytes > weight.nbytes > path.stat().st_size
    assert any("external data" in note for note in found.notes)
    assert found.parameters == weight.size


# --- passes -------------------------------------------------------------------------------------------------


def test_passes_are_tried_without_changing_the_model() -> None:
    model = io.load(proto(
        """g (float[1,1,4,4] x) => (y) <float[1,1,1,1] w = {2}, float[1] o = {1}, float[1] z = {0}> {
            a = Identity (x)
            c = Conv (a, w)
            y = BatchNormalization (c, o, z, z, o)
        }"""
    ))  # fmt: skip
    before = model.to_bytes()
    tried = {p.name: p for p in inspect(model).passes}
    assert list(tried) == ["cleanup", "fold-constants", "fuse", "dead-channels", "quantize"]
    assert tried["cleanup"].candidates >= 1
    assert tried["fuse"].candidates >= 1
    assert tried["quantize"].candidates == 1
    assert tried["quantize"].note == "100.0% of the known MACs"
    assert model.to_bytes() == before
    assert [p.name for p in inspect(model, trial=False).passes] == ["quantize"]


# --- the whole ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits_gru", "digits_mlp", "digits_resnet", "digits_transformer"])
def test_an_inspection_is_plain_json(name: str) -> None:
    found = inspect(FOLDER / f"{name}.onnx").to_json()
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again["macs_unknown"] == []
    assert again["passes"][0]["pass"] == "cleanup"
    assert again["nodes"] == sum(again["operators"].values())


def test_a_summary_has_the_keys_of_the_report() -> None:
    path = FOLDER / "digits_mlp.onnx"
    found = summary(path)
    assert list(found) == KEYS
    assert found["path"] == str(path)
    assert found["sha256"] == io.sha256(path)
    assert found["file_bytes"] == path.stat().st_size
    assert found["macs"] == 64 * 128 + 128 * 64 + 64 * 10


def test_a_summary_of_a_model_in_memory_has_the_size_that_its_file_would_have() -> None:
    model = io.load(FOLDER / "digits_resnet.onnx")
    found = summary(model)
    assert (found["path"], found["sha256"]) == (None, None)
    assert found["file_bytes"] == pytest.approx(len(model.to_bytes()), rel=0.01)


def test_macs_that_are_not_known_are_none() -> None:
    text = "g (float[1,3,H,H] x, float[4,3,1,1] w) => (y) { y = Conv (x, w) }"
    assert summary(proto(text))["macs"] is None
    assert summary(proto(text), sizes={"H": 2})["macs"] == 48
    feeds = {"x": np.zeros((1, 3, 2, 2), np.float32), "w": np.zeros((4, 3, 1, 1), np.float32)}
    assert summary(proto(text), feeds=feeds)["macs"] == 48


def test_a_missing_file_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        inspect(tmp_path / "absent.onnx")


def test_a_sample_that_does_not_run_is_a_data_error() -> None:
    text = "g (float[N,8] x, bool[6] m) => (y) { r = Compress <axis = 0> (x, m) y = MatMul (r, r) }"
    with pytest.raises(DataError):
        inspect(proto(text), feeds={"x": np.zeros((6, 8), np.float32)})
