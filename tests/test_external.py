"""External data are found where they may be, mapped read-only, and measured without overflow."""

import hashlib
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxcomp.errors import ModelError
from onnxcomp.external import (
    MappedFiles,
    Reference,
    element_bytes,
    map_bytes,
    resolve,
    unsafe_location,
    verify_checksum,
)


def external(dims: list[int], data_type: int = TensorProto.FLOAT, **entries: object) -> TensorProto:
    tensor = TensorProto(name="W", data_type=data_type, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "w.bin").write_bytes(np.arange(100, dtype=np.float32).tobytes())
    (tmp_path / "m.onnx").write_bytes(b"model")
    return tmp_path


def test_the_bytes_of_a_range_are_mapped_read_only(folder: Path) -> None:
    reference = resolve(external([2, 3], location="w.bin", offset=40, length=24), folder, folder / "m.onnx")
    assert reference == Reference((folder / "w.bin").resolve(), 40, 24)
    view = map_bytes(reference)
    assert view.readonly
    np.testing.assert_array_equal(np.frombuffer(view, np.float32), np.arange(10, 16, dtype=np.float32))


def test_offset_and_length_follow_from_the_shape(folder: Path) -> None:
    reference = resolve(external([7], location="w.bin"), folder, folder / "m.onnx")
    assert (reference.offset, reference.length) == (0, 28)


def test_a_tensor_of_4_bit_integers_ends_in_half_a_byte(folder: Path) -> None:
    tensor = external([3, 3], TensorProto.INT4, location="w.bin")
    assert resolve(tensor, folder, folder / "m.onnx").length == 5


def test_an_empty_tensor_is_an_empty_view(folder: Path) -> None:
    (folder / "empty.bin").touch()
    reference = resolve(external([0, 3], location="empty.bin"), folder, folder / "m.onnx")
    assert bytes(map_bytes(reference)) == b""


def test_a_folder_that_is_reached_through_a_link_is_fine(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    assert (
        resolve(external([7], location="w.bin"), link, link / "m.onnx").path == (folder / "w.bin").resolve()
    )


def test_one_descriptor_per_file_serves_thousands_of_tensors(folder: Path) -> None:
    import resource

    files, before = MappedFiles(), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        views = [files.view(Reference(folder / "w.bin", 4 * (i % 100), 4)) for i in range(2000)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert float(np.frombuffer(views[1999], np.float32)[0]) == 99.0


def test_a_file_that_became_shorter_is_reported(folder: Path) -> None:
    reference = resolve(external([100], location="w.bin"), folder, folder / "m.onnx")
    os.truncate(folder / "w.bin", 100)
    with pytest.raises(ModelError, match="became shorter"):
        map_bytes(reference)


def test_a_file_that_became_a_link_is_not_followed(folder: Path) -> None:
    reference = resolve(external([100], location="w.bin"), folder, folder / "m.onnx")
    (folder / "w.bin").rename(folder / "elsewhere.bin")
    (folder / "w.bin").symlink_to("elsewhere.bin")
    with pytest.raises(ModelError, match="cannot be opened"):
        map_bytes(reference)


def test_a_checksum_is_compared_only_on_request(folder: Path) -> None:
    right = hashlib.sha1((folder / "w.bin").read_bytes()[4:12]).hexdigest()
    tensor = external([2], location="w.bin", offset=4, length=8, checksum=right.upper())
    verify_checksum(resolve(tensor, folder, folder / "m.onnx"))
    tensor = external([3], location="w.bin", offset=4, length=12, checksum=right)
    reference = resolve(tensor, folder, folder / "m.onnx")
    with pytest.raises(ModelError, match="fetch the file again"):
        verify_checksum(reference)


def test_a_key_that_is_there_twice_is_refused(folder: Path) -> None:
    tensor = external([2], location="w.bin")
    tensor.external_data.add(key="location", value="other.bin")
    with pytest.raises(ModelError, match="'location' is repeated"):
        resolve(tensor, folder, folder / "m.onnx")


def test_the_message_names_tensor_location_and_sizes(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"tensor 'W' at 'w\.bin': .*shape \[2, 2\] need 16 bytes.* is 15"):
        resolve(external([2, 2], location="w.bin", length=15), folder, folder / "m.onnx")


@pytest.mark.parametrize(
    "location", ["", " ", "/a", "a/../b", "..", "C:a", "C:/a", "\\\\host\\a", "a\\b", "a\0b"]
)
def test_a_location_that_could_lead_elsewhere_is_unsafe(location: str) -> None:
    assert unsafe_location(location)


@pytest.mark.parametrize(
    "location", ["a", "a/b.bin", "./a", "a..b", "...", "onnx::MatMul_12", "ünïcode", "-x"]
)
def test_a_plain_relative_location_is_safe(location: str) -> None:
    assert unsafe_location(location) is None


@given(st.text(max_size=12))
def test_a_safe_location_stays_in_its_folder(location: str) -> None:
    if unsafe_location(location) is None:
        inside = os.path.normpath(os.path.join("/folder", location))
        assert inside == "/folder" or inside.startswith("/folder/")


@given(st.sampled_from(sorted(helper.get_all_tensor_dtypes() - {0, TensorProto.STRING})), st.data())
def test_element_bytes_equals_what_onnx_packs(data_type: int, data: st.DataObject) -> None:
    dims = data.draw(st.lists(st.integers(0, 5), max_size=3))
    tensor = helper.make_tensor("t", data_type, dims, [0] * math.prod(dims))
    array = onnx_bytes(tensor)
    assert element_bytes(data_type, dims) == array


def onnx_bytes(tensor: TensorProto) -> int:
    from onnx import numpy_helper

    return len(numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data)


@pytest.mark.parametrize("dims", [[1 << 62, 1 << 62], [-1], [-1, 0], [1] * 300])
def test_impossible_dimensions_are_refused(dims: list[int]) -> None:
    with pytest.raises(ModelError):
        element_bytes(TensorProto.FLOAT, dims)


@pytest.mark.parametrize("data_type", [0, TensorProto.STRING, 99, -1])
def test_types_without_a_size_are_refused(data_type: int) -> None:
    with pytest.raises(ModelError, match="data type"):
        element_bytes(data_type, [1])
