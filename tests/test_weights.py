"""A weight gives the same elements, bytes and digest wherever its payload lies."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.external import Storage
from onnxcomp.files import CHUNK_BYTES, OpenFile
from onnxcomp.weights import Weight

TYPES = sorted(helper.get_all_tensor_dtypes() - {0, TensorProto.STRING})


def raw(weight: Weight) -> bytes:
    return b"".join(bytes(chunk) for chunk in weight.chunks())


def in_file(folder: Path, proto: TensorProto) -> Weight:
    """The weight with its payload 3 bytes into a file."""
    (folder / "m.onnx").write_bytes(b"model")
    (folder / "w.bin").write_bytes(b"pad" + proto.raw_data)
    stub = TensorProto(name="w", data_type=proto.data_type, dims=proto.dims, data_location=TensorProto.EXTERNAL)
    stub.external_data.add(key="location", value="w.bin")
    stub.external_data.add(key="offset", value="3")
    return Weight.from_proto(stub, Storage(OpenFile(folder / "m.onnx", "model")).locate(stub))


@pytest.mark.parametrize("data_type", TYPES)
def test_every_type_is_the_same_from_message_file_and_array(tmp_path: Path, data_type: int) -> None:
    typed = helper.make_tensor("w", data_type, [3, 3], [0, 1, 1, 0, 1, 0, 0, 1, 1])
    values = numpy_helper.to_array(typed)
    proto = numpy_helper.from_array(values, "w")
    weights = [Weight.from_proto(typed), Weight.from_proto(proto), in_file(tmp_path, proto), Weight.from_array(values)]
    for weight in weights:
        assert (weight.data_type, weight.shape, weight.size) == (data_type, (3, 3), 9)
        assert weight.nbytes == len(proto.raw_data)
        assert raw(weight) == proto.raw_data
        assert weight.load().tobytes() == values.tobytes()
        assert weight.load().dtype == weight.dtype == values.dtype
        assert not weight.load().flags.writeable
        assert numpy_helper.to_array(weight.to_proto("x")).tobytes() == values.tobytes()
    assert len({weight.digest() for weight in weights}) == 1


@given(st.lists(st.integers(0, 4), max_size=4), st.sampled_from(["<f4", ">f4", "<i8", "|b1", "<f2"]), st.booleans())
def test_arrays_of_any_layout_give_bytes_in_row_order(shape: list[int], dtype: str, transpose: bool) -> None:
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    values = values.T if transpose else values
    weight = Weight.from_array(values)
    np.testing.assert_array_equal(weight.load(), values)
    assert raw(weight) == np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes()
    assert weight.nbytes == len(raw(weight))


def test_pieces_are_bounded(tmp_path: Path) -> None:
    values = np.arange(CHUNK_BYTES // 2 + 5, dtype=np.int32)
    proto = numpy_helper.from_array(values, "w")
    for weight in (in_file(tmp_path, proto), Weight.from_proto(proto), Weight.from_array(values)):
        sizes = [len(chunk) for chunk in weight.chunks()]
        assert sizes == [CHUNK_BYTES, CHUNK_BYTES, 20]
        assert raw(weight) == values.tobytes()


def test_strings_have_a_digest_and_no_raw_bytes() -> None:
    one, other = (
        Weight.from_proto(helper.make_tensor("w", TensorProto.STRING, [2], [b"a", last])) for last in (b"b", b"c")
    )
    assert one.nbytes == 0
    assert one.digest() != other.digest()
    assert one.load().tolist() == ["a", "b"]


def test_the_digest_tells_type_and_shape_apart() -> None:
    zeros = [
        np.zeros(4, np.float32), np.zeros((2, 2), np.float32), np.zeros(4, np.int32), np.zeros(2, np.int64),
    ]  # fmt: skip
    assert len({Weight.from_array(z).digest() for z in zeros}) == 4


def test_a_message_comes_back_field_by_field() -> None:
    proto = helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0])
    proto.doc_string = "d"
    assert Weight.from_proto(proto).to_proto("w") == proto
    assert Weight.from_proto(proto).to_proto("v").name == "v"
    assert proto.name == "w"


def test_the_head_of_a_weight_is_that_of_its_bytes() -> None:
    array = np.arange(9, dtype=np.uint8)
    for weight in (Weight.from_array(array), Weight.from_proto(numpy_helper.from_array(array))):
        assert weight.head(4) == bytes(range(4))
        assert weight.head(100) == bytes(range(9))
