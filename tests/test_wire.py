"""Reading without weights loses nothing: with the payloads put back, the model is the one in the file."""

import importlib.resources
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, ModelProto, TensorProto, helper, numpy_helper, parser

from onnxcomp.errors import ModelError
from onnxcomp.external import Storage
from onnxcomp.files import OpenFile
from onnxcomp.tensors import tensors
from onnxcomp.wire import CUT_BYTES, SELF, Limits, read_skeleton

ZOO = sorted(Path("/work/shared/zoo/models").glob("*.onnx"))


def payload(stub: TensorProto, path: Path) -> np.ndarray:
    return Storage(OpenFile(path, "model")).locate(stub).bytes()


def restored(path: Path) -> ModelProto:
    """The skeleton of a file with its payloads put back."""
    model = read_skeleton(path).proto
    for _, tensor in tensors(model):
        if [entry.value for entry in tensor.external_data][:1] == [SELF]:
            tensor.raw_data = payload(tensor, path).tobytes()
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
    return model


def assert_same(found: ModelProto, expected: ModelProto) -> None:
    for model in (found, expected):
        for _, tensor in tensors(model):
            if tensor.HasField("data_location") and tensor.data_location == TensorProto.DEFAULT:
                tensor.ClearField("data_location")  # written out or not, it means the same
            for name, dtype in (("float_data", "<f4"), ("double_data", "<f8")):
                values = np.array(getattr(tensor, name), dtype)
                if values.nbytes >= CUT_BYTES:
                    tensor.ClearField(name)
                    tensor.raw_data = values.tobytes()  # comes back in the other form
    assert found.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


def weight(name: str, count: int) -> TensorProto:
    return numpy_helper.from_array(np.arange(count, dtype=np.uint8), name)


@st.composite
def graphs(draw: st.DrawFn, depth: int = 0) -> onnx.GraphProto:
    """Any graph message, valid or not, with tensors in all the places where ONNX allows them."""
    sizes = st.sampled_from((0, 1, 5, CUT_BYTES - 60, CUT_BYTES - 1, CUT_BYTES, CUT_BYTES + 1, 20_000))
    graph = onnx.GraphProto(
        name=draw(st.text(max_size=4)), doc_string="d" * draw(st.sampled_from((0, 3, 2000)))
    )
    for index in range(draw(st.integers(0, 3))):
        graph.initializer.append(weight(f"w{index}", draw(sizes)))
    for index in range(draw(st.integers(0, 1))):
        sparse = graph.sparse_initializer.add(dims=[9])
        sparse.values.CopyFrom(weight(f"s{index}", draw(sizes)))
        sparse.indices.CopyFrom(weight("", draw(sizes)))
    for _ in range(draw(st.integers(0, 3))):
        node = graph.node.add(op_type="Op", input=["a", ""], output=["b"], doc_string="x" * draw(sizes))
        kind = draw(st.sampled_from(("none", "ints", "tensor", "tensors", "graph", "graphs", "sparse")))
        attribute = AttributeProto(name="v")
        if kind == "ints":
            attribute.type = AttributeProto.INTS
            attribute.ints.extend(range(draw(sizes)))
        elif kind == "tensor":
            attribute.type = AttributeProto.TENSOR
            attribute.t.CopyFrom(weight("", draw(sizes)))
        elif kind == "tensors":
            attribute.type = AttributeProto.TENSORS
            attribute.tensors.extend(weight("", draw(sizes)) for _ in range(2))
        elif kind == "sparse":
            attribute.type = AttributeProto.SPARSE_TENSOR
            attribute.sparse_tensor.values.CopyFrom(weight("", draw(sizes)))
        elif kind in ("graph", "graphs") and depth < 2:
            attribute.type = AttributeProto.GRAPH if kind == "graph" else AttributeProto.GRAPHS
            inner = draw(graphs(depth + 1))
            attribute.g.CopyFrom(inner) if kind == "graph" else attribute.graphs.append(inner)
        if kind != "none":
            node.attribute.append(attribute)
    return graph


@settings(max_examples=80, deadline=None)
@given(graphs(), st.booleans())
def test_any_model_survives_being_cut_and_put_back(
    tmp_path_factory: pytest.TempPathFactory, graph: onnx.GraphProto, function: bool
) -> None:
    model = ModelProto(ir_version=10, graph=graph)
    if function:
        model.functions.add(name="f").node.extend(graph.node)
        model.training_info.add().algorithm.CopyFrom(graph)
    path = tmp_path_factory.mktemp("wire") / "m.onnx"
    path.write_bytes(model.SerializeToString())
    skeleton = read_skeleton(path).proto
    assert all(len(tensor.raw_data) < CUT_BYTES for _, tensor in tensors(skeleton))
    assert_same(restored(path), model)
    assert read_skeleton(path.read_bytes()).proto == model


@pytest.mark.skipif(not ZOO, reason="the zoo is not here")
def test_the_zoo_survives_being_cut_and_put_back() -> None:
    for path in ZOO:
        assert_same(restored(path), onnx.load(path, load_external_data=False))


def test_models_of_the_onnx_package_survive_being_cut_and_put_back() -> None:
    folder = Path(str(importlib.resources.files("onnx"))) / "backend" / "test" / "data"
    paths = sorted(folder.rglob("model.onnx"))[::3]
    assert paths
    for path in paths:
        assert_same(restored(path), onnx.load(path, load_external_data=False))


def model_with(initializer: TensorProto) -> ModelProto:
    model = parser.parse_model('<ir_version: 10, opset_import: ["" : 17]> g () => (y) { y = Identity(w) }')
    model.graph.initializer.append(initializer)
    return model


def test_a_cut_weight_is_a_reference_into_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    values = np.arange(1000, dtype=np.float32)
    path.write_bytes(model_with(numpy_helper.from_array(values, "w")).SerializeToString())
    reading = read_skeleton(path)
    stub = reading.proto.graph.initializer[0]
    assert (reading.size, reading.unknown_bytes) == (path.stat().st_size, 0)
    assert stub.raw_data == b""
    assert reading.proto.ByteSize() < 200
    np.testing.assert_array_equal(payload(stub, path).view(np.float32), values)


@pytest.mark.parametrize("data_type", ["FLOAT", "DOUBLE", "COMPLEX64", "COMPLEX128"])
def test_typed_values_are_cut_like_raw_ones(data_type: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    values = np.arange(500).astype(data_type.lower().replace("float", "float32"))
    tensor = helper.make_tensor("w", getattr(TensorProto, data_type), [500], values)
    assert not tensor.HasField("raw_data")
    path.write_bytes(model_with(tensor).SerializeToString())
    stub = read_skeleton(path).proto.graph.initializer[0]
    assert stub.ByteSize() < 100
    np.testing.assert_array_equal(
        payload(stub, path).view(values.dtype), values
    )


def test_a_tensor_with_two_payloads_is_refused(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[500], float_data=[1.0] * 500)
    tensor.raw_data = bytes(2000)
    path = tmp_path / "m.onnx"
    path.write_bytes(model_with(tensor).SerializeToString())
    with pytest.raises(ModelError, match="two payloads"):
        read_skeleton(path)


def test_a_weight_is_found_when_the_model_lies_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(model_with(weight("w", 5000)).SerializeToString())
    (tmp_path / "m.onnx").symlink_to("blob")
    assert_same(restored(tmp_path / "m.onnx"), model_with(weight("w", 5000)))


def test_serialized_bytes_keep_their_weights() -> None:
    model = model_with(weight("w", 5000))
    assert read_skeleton(model.SerializeToString()).proto == model


def test_unknown_fields_are_dropped_and_counted_wherever_they_are(tmp_path: Path) -> None:
    model = model_with(weight("w", 5000))
    small = b"\xfa\x3f\x03abc"  # field 1023, 3 bytes
    node = b"\x0a" + bytes([len(model.graph.node[0].SerializeToString() + small)])
    graph = node + model.graph.node[0].SerializeToString() + small
    tensor = weight("w", 5000).SerializeToString() + small
    graph += b"\x2a" + _varint(len(tensor)) + tensor + small
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08\x0a" + b"\x3a" + _varint(len(graph)) + graph + small)
    reading = read_skeleton(path)
    assert reading.unknown_bytes == 4 * len(small)
    assert [len(reading.proto.graph.node), len(reading.proto.graph.initializer)] == [1, 1]
    assert small not in reading.proto.SerializeToString()


@pytest.mark.parametrize("padding", [0, 4000])
@pytest.mark.parametrize("entry", [b"\x12\x01\x00", b"\x12\x81\x80\x00\x00", b"\x92\x00\x01\x00"])
def test_a_file_cannot_bring_the_reserved_location_along(padding: int, entry: bytes, tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="?")
    honest = tensor.external_data[0].SerializeToString()
    forged = honest.replace(b"\x12\x01?", entry)
    content = tensor.SerializeToString().replace(
        b"\x6a" + bytes([len(honest)]) + honest, b"\x6a" + bytes([len(forged)]) + forged
    )
    content += b"\x62" + _varint(padding) + b"d" * padding  # doc_string
    attribute = b"\x0a\x05value\x2a" + _varint(len(content)) + content + b"\xa0\x01\x04"
    node = b"\x12\x01y\x22\x08Constant\x2a" + _varint(len(attribute)) + attribute
    graph = b"\x0a" + _varint(len(node)) + node + b"\x62\x03\x0a\x01y"
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08\x0a\x3a" + _varint(len(graph)) + graph)
    with pytest.raises(ModelError, match="reserved location"):
        read_skeleton(path)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(proto_bytes=4000), "more than the 4000 that protobuf can hold"),
        (Limits(skeleton_bytes=100), "needs more than 100 bytes without its weights"),
        (Limits(structure_bytes=100), "needs more than 100 bytes without its weights"),
        (Limits(nodes=9), "more than 9 nodes"),
        (Limits(initializers=1), "more than 1 initializers"),
        (Limits(functions=1), "more than 1 functions"),
        (Limits(depth=1), "nests more than 1 messages"),
        (Limits(fields=10), "more than 10 fields"),
        (Limits(unknown_bytes=4), "more than 4 bytes that are not ONNX"),
    ],
)
def test_limits_are_kept(limits: Limits, message: str, tmp_path: Path) -> None:
    model = model_with(weight("w", 5000))
    model.graph.initializer.append(weight("v", 1))
    for index in range(10):
        model.graph.node.add(op_type="Relu", output=[f"v{index}"])
    model.functions.add(name="f")
    model.functions.add(name="g")
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString() + b"\xfa\x3f\x03abc")
    with pytest.raises(ModelError, match=message):
        read_skeleton(path, limits)


def test_long_strings_are_no_structure(tmp_path: Path) -> None:
    model = model_with(weight("w", 5))
    model.graph.node[0].attribute.add(name="blob", type=AttributeProto.STRING, s=bytes(50_000))
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    assert read_skeleton(path, Limits(structure_bytes=1000)).proto == model


def test_payloads_are_not_read(tmp_path: Path) -> None:
    """A sparse file with a payload of a gigabyte: reading it would take a second and a gigabyte."""
    payload = 1 << 30
    tensor = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[payload]).SerializeToString()
    head = tensor + b"\x4a" + _varint(payload)
    graph = b"\x2a" + _varint(len(head) + payload) + head
    path = tmp_path / "m.onnx"
    with path.open("wb") as file:
        file.write(b"\x08\x0a\x3a" + _varint(len(graph) + payload) + graph)
        file.truncate(file.tell() + payload)
    begin = time.process_time()
    reading = read_skeleton(path)
    assert time.process_time() - begin < 0.5
    assert reading.size > payload
    assert reading.proto.ByteSize() < 100


def _varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes((value & 0x7F | 0x80,))
        value >>= 7
    return out + bytes((value,))
