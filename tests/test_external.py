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
from onnxcomp.external import Storage, element_bytes, unsafe_location
from onnxcomp.files import OpenFile


def external(dims: list[int], data_type: int = TensorProto.FLOAT, **entries: object) -> TensorProto:
    tensor = TensorProto(name="W", data_type=data_type, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def storage(folder: Path) -> Storage:
    return Storage(OpenFile(folder / "m.onnx", "model"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "w.bin").write_bytes(np.arange(100, dtype=np.float32).tobytes())
    (tmp_path / "m.onnx").write_bytes(b"model")
    return tmp_path


def test_the_bytes_of_a_range_are_read(folder: Path) -> None:
    reference = storage(folder).locate(external([2, 3], location="w.bin", offset=40, length=24))
    assert (reference.file.path, reference.offset, reference.length) == ((folder / "w.bin").resolve(), 40, 24)
    np.testing.assert_array_equal(reference.bytes().view(np.float32), np.arange(10, 16, dtype=np.float32))


def test_offset_and_length_follow_from_the_shape(folder: Path) -> None:
    reference = storage(folder).locate(external([7], location="w.bin"))
    assert (reference.offset, reference.length) == (0, 28)


def test_a_tensor_of_4_bit_integers_ends_in_half_a_byte(folder: Path) -> None:
    tensor = external([3, 3], TensorProto.INT4, location="w.bin")
    assert storage(folder).locate(tensor).length == 5


def test_an_empty_tensor_is_an_empty_view(folder: Path) -> None:
    (folder / "empty.bin").touch()
    reference = storage(folder).locate(external([0, 3], location="empty.bin"))
    assert reference.bytes().size == 0
    assert list(reference.chunks()) == []


def test_a_folder_that_is_reached_through_a_link_is_fine(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    reference = storage(link).locate(external([7], location="w.bin"))
    assert reference.file.path == (folder / "w.bin").resolve()


def test_a_large_range_is_mapped_and_a_small_one_read(folder: Path) -> None:
    values = np.arange(3 << 20, dtype=np.float32)
    (folder / "w.bin").write_bytes(b"abc" + values.tobytes())
    reference = storage(folder).locate(external([3 << 20], location="w.bin", offset=3))
    found = reference.bytes()
    assert not found.flags.writeable
    assert found.base is not None
    np.testing.assert_array_equal(np.frombuffer(found, np.float32), values)
    assert b"".join(c.tobytes() for c in reference.chunks()) == values.tobytes()


def test_few_descriptors_serve_thousands_of_tensors(folder: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = storage(folder)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        found = [files.locate(external([1], location="w.bin", offset=4 * (i % 100))) for i in range(2000)]
        values = [reference.bytes() for reference in found]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert float(values[1999].view(np.float32)[0]) == 99.0


def test_few_descriptors_serve_a_file_for_each_tensor(folder: Path) -> None:
    import resource

    for i in range(400):
        (folder / f"w{i}.bin").write_bytes(np.float32(i).tobytes())
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = storage(folder)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        found = [files.locate(external([1], location=f"w{i}.bin")) for i in range(400)]
        values = [float(reference.bytes().view(np.float32)[0]) for reference in found]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert values == list(range(400))
    (folder / "w399.bin").write_bytes(b"other")
    with pytest.raises(ModelError, match="changed while it was in use"):
        found[399].bytes()


def test_many_large_ranges_are_read_when_no_descriptor_is_left_for_mappings(folder: Path) -> None:
    import resource

    (folder / "w.bin").write_bytes(bytes(8 << 20))
    reference = storage(folder).locate(external([2 << 20], location="w.bin"))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, before[1]))
    try:
        views = [reference.bytes() for _ in range(12)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert all(not v.any() and v.size == 8 << 20 for v in views)


@pytest.mark.parametrize("elements", [100, 2 << 20])
def test_a_file_that_became_shorter_is_reported(folder: Path, elements: int) -> None:
    (folder / "w.bin").write_bytes(bytes(4 * elements))
    reference = storage(folder).locate(external([elements], location="w.bin"))
    os.truncate(folder / "w.bin", 100)
    with pytest.raises(ModelError, match="changed while it was in use"):
        reference.bytes()
    with pytest.raises(ModelError, match="changed while it was in use"):
        list(reference.chunks())


def test_a_file_that_another_replaces_is_still_read(folder: Path) -> None:
    reference = storage(folder).locate(external([100], location="w.bin"))
    (folder / "new.bin").write_bytes(bytes(400))
    (folder / "new.bin").replace(folder / "w.bin")
    np.testing.assert_array_equal(reference.bytes().view(np.float32), np.arange(100, dtype=np.float32))


def test_a_checksum_is_compared_on_request(folder: Path) -> None:
    right = hashlib.sha1((folder / "w.bin").read_bytes()[4:12]).hexdigest()
    tensor = external([2], location="w.bin", offset=4, length=8, checksum=right.upper())
    storage(folder).locate(tensor).verify_checksum()
    tensor = external([3], location="w.bin", offset=4, length=12, checksum=right)
    reference = storage(folder).locate(tensor)
    with pytest.raises(ModelError, match="fetch the file again"):
        reference.verify_checksum()


def test_a_key_that_is_there_twice_is_refused(folder: Path) -> None:
    tensor = external([2], location="w.bin")
    tensor.external_data.add(key="location", value="other.bin")
    with pytest.raises(ModelError, match="'location' is repeated"):
        storage(folder).locate(tensor)


def test_the_message_names_tensor_location_and_sizes(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"tensor 'W' at 'w\.bin': .*shape \[2, 2\] need 16 bytes.* is 15"):
        storage(folder).locate(external([2, 2], location="w.bin", length=15))


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
