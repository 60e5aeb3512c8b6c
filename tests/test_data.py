"""Reading calibration data: every form, every refusal, and streaming in bounded memory."""

from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper

from onnxcomp.calibration.data import Batch, Dataset, open_data, sample_hashes
from onnxcomp.calibration.sources import npy_column, npz_columns
from onnxcomp.errors import DataError, OnnxcompError, UsageError
from onnxcomp.runtime import TensorSpec, open_session

ZOO = Path("/work/shared/zoo")
ZOO_FEEDS = {
    "resnet20_cifar10": "cifar_nchw",
    "mlperf_pretrainedResnet_large_float": "cifar_nhwc",
    "squeezenet_winml_fp16": "squeezenet_winml_fp32",
}


def spec(name: str, shape: tuple[int | str | None, ...] | None, kind: str = "float") -> TensorSpec:
    return TensorSpec(name, f"tensor({kind})", shape)


X = spec("x_in", ("N", 3))
FIXED = spec("x_in", (4, 3))
IDS = spec("ids", ("N", 5), "int64")
VAD = (spec("input", ("batch", "seq")), spec("state", (2, "batch", 4)), spec("sr", (), "int64"))


def rows(count: int, *shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((count, *shape), dtype=np.float32)


def together(batches: Iterator[Batch], name: str) -> np.ndarray[Any, Any]:
    return np.concatenate([batch.feeds[name] for batch in batches])


# --- forms ---


@pytest.fixture(params=["npz", "npz-deflated", "npy", "dict", "array", "folder-of-npz", "folder-of-samples"])
def ten_rows(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, np.ndarray[Any, Any]]:
    """Ten samples of `X` in one of the forms that hold arrays."""
    data, form = rows(10, 3), request.param
    if form == "npz":
        np.savez(tmp_path / "a.npz", x_in=data)
    elif form == "npz-deflated":
        np.savez_compressed(tmp_path / "a.npz", x_in=data)
    elif form == "npy":
        np.save(tmp_path / "a.npy", data)
    elif form == "dict":
        return {"x_in": data}, data
    elif form == "array":
        return data, data
    elif form == "folder-of-npz":
        (tmp_path / "f").mkdir()
        np.savez(tmp_path / "f" / "0.npz", x_in=data[:7])
        np.savez(tmp_path / "f" / "1.npz", x_in=data[7:])
        return tmp_path / "f", data
    else:
        (tmp_path / "f").mkdir()
        for number, row in enumerate(data):
            np.save(tmp_path / "f" / f"{number:02}.npy", row)
        return str(tmp_path / "f"), data
    return tmp_path / ("a.npy" if form == "npy" else "a.npz"), data


def test_every_array_form_delivers_the_same_batches_again_and_again(ten_rows: Any) -> None:
    source, data = ten_rows
    dataset = open_data(source, [X], batch=4)
    for _ in range(2):
        batches = list(dataset.batches())
        assert [batch.count for batch in batches] == [4, 4, 2]
        np.testing.assert_array_equal(together(iter(batches), "x_in"), data)
    assert (dataset.length, dataset.labelled) == (10, False)


def test_a_fixed_batch_dimension_is_respected_and_the_incomplete_batch_dropped(ten_rows: Any) -> None:
    source, data = ten_rows
    dataset = open_data(source, [FIXED], batch=7)
    batches = list(dataset.batches())
    assert [batch.feeds["x_in"].shape for batch in batches] == [(4, 3), (4, 3)]
    np.testing.assert_array_equal(together(iter(batches), "x_in"), data[:8])
    assert dataset.length == 8


@pytest.mark.parametrize(("limit", "counts"), [(1, [1]), (4, [4]), (6, [4, 2]), (99, [4, 4, 2])])
def test_limit_cuts_the_last_batch(limit: int, counts: list[int]) -> None:
    assert [batch.count for batch in open_data(rows(10, 3), [X], batch=4).batches(limit)] == counts


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (4, 1), (7, 1), (8, 2)])
def test_limit_never_cuts_a_fixed_batch(limit: int, count: int) -> None:
    batches = list(open_data(rows(10, 3), [FIXED]).batches(limit))
    assert [batch.count for batch in batches] == [4] * count


def test_labels_follow_their_samples(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_in=rows(10, 3), labels=np.arange(10))
    dataset = open_data(tmp_path / "a.npz", [X], batch=4)
    assert dataset.labelled
    assert [batch.labels.tolist() for batch in dataset.batches(6) if batch.labels is not None] == [
        [0, 1, 2, 3],
        [4, 5],
    ]


def test_labels_are_fed_when_the_model_has_such_an_input() -> None:
    dataset = open_data(
        {"x_in": rows(2, 3), "labels": np.zeros((2, 5), np.int64)}, [X, spec("labels", ("N", 5), "int64")]
    )
    assert not dataset.labelled
    assert set(next(dataset.batches()).feeds) == {"x_in", "labels"}


def test_one_rank_more_gives_one_feed_per_row() -> None:
    source = {
        "input": rows(3, 1, 6),
        "state": rows(3, 2, 1, 4),
        "sr": np.full(3, 16000),
        "labels": np.arange(3),
    }
    batches = list(open_data(source, VAD).batches())
    assert [batch.count for batch in batches] == [1, 1, 1]
    assert [array.shape for array in batches[2].feeds.values()] == [(1, 6), (2, 1, 4), ()]
    np.testing.assert_array_equal(batches[2].feeds["state"], source["state"][2])
    assert batches[2].labels is not None
    assert batches[2].labels.tolist() == [2]


def test_both_kinds_of_arrays_may_be_mixed_when_counts_agree() -> None:
    batches = list(
        open_data({"input": rows(3, 6), "state": rows(3, 2, 1, 4), "sr": np.full(3, 8)}, VAD).batches()
    )
    assert [batch.feeds["input"].shape for batch in batches] == [(1, 6)] * 3


def test_arrays_of_the_models_own_ranks_without_common_batch_axis_are_one_feed() -> None:
    dataset = open_data({"input": rows(5, 6), "state": rows(2, 5, 4), "sr": np.int64(8)}, VAD)
    (batch,) = dataset.batches(1)
    assert [array.shape for array in batch.feeds.values()] == [(5, 6), (2, 5, 4), ()]
    assert batch.count == dataset.length == 5


@pytest.mark.parametrize("name", ["arr_0", "x", "data", "input", "images"])
def test_a_generic_name_stands_for_the_only_input(name: str) -> None:
    assert set(next(open_data({name: rows(2, 3)}, [X]).batches()).feeds) == {"x_in"}


def test_samples_of_different_shapes_go_into_different_batches(tmp_path: Path) -> None:
    for number, width in enumerate([5, 5, 7]):
        np.save(tmp_path / f"{number}.npy", rows(1, width))
    shapes = [b.feeds["s"].shape for b in open_data(tmp_path, [spec("s", ("N", "W"))]).batches()]
    assert shapes == [(2, 5), (1, 7)]


def test_a_sample_file_may_carry_one_label(tmp_path: Path) -> None:
    for number in range(3):
        np.savez(tmp_path / f"{number}.npz", x_in=rows(1, 3)[0], labels=np.int64(number))
    (batch,) = open_data(tmp_path, [X]).batches()
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 1, 2]


def save_pb(folder: Path, number: int, array: Any, name: str = "") -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"input_{number}.pb").write_bytes(numpy_helper.from_array(array, name).SerializeToString())


def test_test_data_sets_feed_by_name_or_else_by_number(tmp_path: Path) -> None:
    for number in (2, 10):
        folder = tmp_path / f"test_data_set_{number}"
        save_pb(folder, 0, np.full((1, 5), number, np.int64), "ids")
        save_pb(folder, 1, np.full((1, 3), number, np.float32))
        (folder / "output_0.pb").write_bytes(b"not read")
    by_name = list(open_data(tmp_path, [IDS, X]).batches())
    assert [batch.feeds["x_in"][0, 0] for batch in by_name] == [2, 10]
    one = list(open_data(tmp_path / "test_data_set_2", [IDS, X]).batches())
    assert [batch.feeds["ids"][0, 0] for batch in one] == [2]


MODULE = """
import numpy as np
calls = []
def feeds():
    calls.append(1)
    for k in range(3):
        yield {"x_in": np.full((2, 3), k, np.float32)}, np.array([k, k])
def broken():
    yield {}["missing"]
NUMBER = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_feeds_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "my_feeds_module.py"


@pytest.mark.parametrize("place", ["my_feeds_module", "my_feeds_module.py"])
def test_a_named_function_is_called_for_each_reading(place: str, module: Path) -> None:
    dataset = open_data(f"{place}:feeds", [X])
    assert (dataset.labelled, dataset.length) == (True, None)
    for _ in range(2):
        assert together(dataset.batches(), "x_in")[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_list_of_feeds_stays_as_batched_unless_the_model_fixes_the_size() -> None:
    feeds = [{"x_in": rows(3, 3)}, {"x_in": rows(6, 3)}]
    assert [batch.count for batch in open_data(feeds, [X]).batches()] == [3, 6]
    assert [batch.count for batch in open_data(feeds, [FIXED]).batches()] == [4, 4]


def test_an_open_dataset_is_returned_as_it_is() -> None:
    dataset = open_data(rows(2, 3), [X])
    assert isinstance(dataset, Dataset)
    assert open_data(dataset, [X]) is dataset


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("float", np.ones((2, 3), np.float64)),
        ("float16", np.ones((2, 3), np.float32)),
        ("int64", np.ones((2, 3), np.int32)),
        ("int32", np.ones((2, 3), np.int64)),
        ("float", np.ones((2, 3), ">f4")),
        ("float", np.asfortranarray(np.ones((2, 3), np.float32))),
    ],
)
def test_feeds_come_in_the_models_own_type_and_c_order(kind: str, data: Any) -> None:
    model_input = spec("x", ("N", 3), kind)
    array = next(open_data(data, [model_input]).batches()).feeds["x"]
    assert array.dtype == model_input.dtype
    assert array.flags.c_contiguous


def test_strings_are_fed_as_objects() -> None:
    array = next(open_data(np.array([["a"], ["bc"]]), [spec("x", ("N", 1), "string")]).batches()).feeds["x"]
    assert array.tolist() == [["a"], ["bc"]]
    assert array.dtype == np.object_


# --- refusals ---


def npz(**arrays: Any) -> Callable[[Path], Any]:
    def write(folder: Path) -> Path:
        np.savez(folder / "calib.npz", **arrays)
        return folder / "calib.npz"

    return write


def damaged(folder: Path) -> Path:
    np.savez(folder / "calib.npz", x_in=rows(100, 3))
    path = folder / "calib.npz"
    content = bytearray(path.read_bytes())
    content[500] ^= 0xFF
    path.write_bytes(content)
    return path


def text_file(name: str, content: bytes = b"") -> Callable[[Path], Any]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def short_npy(folder: Path) -> Path:
    np.save(folder / "a.npy", rows(10, 3))
    (folder / "a.npy").write_bytes((folder / "a.npy").read_bytes()[:-8])
    return folder / "a.npy"


def objects(folder: Path) -> Path:
    np.save(folder / "a.npy", np.array([{}, []], object), allow_pickle=True)
    return folder / "a.npy"


def half_labelled(folder: Path) -> Path:
    np.savez(folder / "0.npz", x_in=rows(1, 3), labels=np.zeros(1))
    np.savez(folder / "1.npz", x_in=rows(1, 3))
    return folder


def external_pb(folder: Path) -> Path:
    tensor = onnx.TensorProto(dims=[1, 3], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    (folder / "input_0.pb").write_bytes(tensor.SerializeToString())
    return folder


def numbered_pb(folder: Path) -> Path:
    save_pb(folder, 3, rows(1, 3))
    return folder


def bad_pb(folder: Path) -> Path:
    (folder / "input_0.pb").write_bytes(b"\xff\xff")
    return folder


def nan_at(row: int) -> Any:
    data = rows(40, 3)
    data[row, 1] = np.nan
    return data


NCHW = spec("x_in", ("N", 3, 8, 9))
REFUSED: list[tuple[str, Callable[[Path], Any], tuple[TensorSpec, ...], str]] = [
    ("missing path", lambda p: p / "calb.npz", (X,), "there is no file or folder"),
    ("unknown kind", text_file("calib.csv"), (X,), "unknown kind '.csv'; expected .npz"),
    ("not a zip", text_file("calib.npz", b"PK but no"), (X,), "calib.npz cannot be read: BadZipFile"),
    ("damaged zip", damaged, (X,), "Bad CRC-32"),
    ("cut npy", short_npy, (X,), "holds 112 bytes where its header promises 120"),
    ("not an npy", text_file("a.npy", b"hello"), (X,), "a.npy cannot be read"),
    ("objects", objects, (X,), "holds Python objects, which are never unpickled"),
    ("empty folder", lambda p: p, (X,), "holds nothing; expected .npz"),
    ("folder of other files", lambda p: text_file("a.mp3")(p).parent, (X,), "only files of the kinds .mp3"),
    ("wrong name", npz(x_inn=rows(2, 3)), (X,), "is not an input of the model (did you mean 'x_in'?)"),
    ("strange name", npz(zzz=rows(2, 3)), (X,), "(rename it to 'x_in'?); the model's inputs are 'x_in'"),
    ("extra array", npz(x_in=rows(2, 3), mask=rows(2)), (X,), "'mask' is not an input"),
    ("missing input", npz(x_in=rows(2, 3)), (X, IDS), "no array for the model's input 'ids', only 'x_in'"),
    ("no arrays", npz(), (X,), "no array for the model's input 'x_in'"),
    ("npy for two inputs", short_npy, (X, IDS), "holds one array, but the model has 2 inputs"),
    ("pixels", npz(x_in=np.zeros((2, 3), np.uint8)), (X,), "uint8, but the model takes float32; scale raw"),
    ("integers", npz(x_in=np.zeros((2, 3), np.int64)), (X,), "convert with .astype(np.float32)"),
    ("floats", npz(ids=np.zeros((2, 5))), (IDS,), "is float64, but the model takes int64"),
    ("lower rank", npz(x_in=np.zeros(3, np.float32)), (X,), "takes rank 2; give rank 2"),
    ("scalar for any rank", lambda p: {"x": np.float32(1)}, (spec("x", None),), "has shape []"),
    ("higher rank", npz(x_in=rows(2, 2, 2, 3)), (X,), "or rank 3 with one feed per row"),
    ("fixed size", npz(x_in=rows(2, 4)), (X,), "has shape [2, 4], but the model takes [N, 3]"),
    ("NHWC", npz(x_in=rows(2, 8, 9, 3)), (NCHW,), "the model takes NCHW: array.transpose(0, 3, 1, 2)"),
    ("NCHW", npz(x_in=rows(2, 3, 8, 9)), (spec("x_in", ("N", 8, 9, 3)),), "array.transpose(0, 2, 3, 1)"),
    ("row of fixed size", npz(x_in=rows(5, 2, 3)), (FIXED,), "has shape [2, 3], but the model takes [4, 3]"),
    ("too few", npz(x_in=rows(3, 3)), (FIXED,), "3 sample(s), but the model takes batches of exactly 4"),
    ("no samples", npz(x_in=rows(0, 3)), (X,), "hold no samples"),
    ("ragged", npz(x_in=rows(3, 3), ids=np.zeros((4, 5), int)), (X, IDS), "samples: 'x_in' 3, 'ids' 4"),
    ("ragged rows", npz(input=rows(4, 6), state=rows(3, 2, 1, 4), sr=np.zeros(3, int)), VAD, "'input' 4"),
    ("labels", npz(x_in=rows(3, 3), labels=np.zeros(4)), (X,), "have shape [4], but there are 3 samples"),
    ("text labels", npz(x_in=rows(1, 3), labels=np.array(["a"])), (X,), "labels are <U1; give numbers"),
    ("labels of some", half_labelled, (X,), "only one has labels"),
    ("NaN", npz(x_in=nan_at(33)), (X,), "calib.npz: input 'x_in' holds nan in row 33, which"),
    ("large float", npz(x_in=rows(2, 3) + 1e6), (spec("x_in", ("N", 3), "float16"),), "is beyond float16"),
    ("large integer", npz(x_in=np.full((2, 3), 2**40)), (spec("x_in", ("N", 3), "int32"),), "not fit int32"),
    ("negative", lambda p: np.full((2, 3), -1), (spec("x_in", ("N", 3), "uint64"),), "holds -1 in row 0"),
    ("ragged list", lambda p: {"x_in": [[1.0], [1.0, 2.0]]}, (X,), "array 'x_in' cannot be read: ValueError"),
    ("empty list", lambda p: [], (X,), "the given list gives no samples"),
    ("item", lambda p: [3], (X,), "the given list item 0 is a int; expected a dict of arrays"),
    ("item counts", lambda p: [{"x_in": rows(2, 3), "ids": np.zeros((1, 5), int)}], (X, IDS), "'ids' 1"),
    ("later item", lambda p: [rows(2, 3), rows(2, 4)], (X,), "list item 1: input 'x_in' has shape"),
    ("external pb", external_pb, (X,), "keeps its values in another file"),
    ("bad pb", bad_pb, (X,), "input_0.pb cannot be read: DecodeError"),
    ("pb number", numbered_pb, (X,), "the model has only 1 input(s): x_in"),
    ("type", lambda p: rows(2, 3), (spec("x_in", ("N", 3), "bfloat16"),), "which data sets cannot hold"),
    ("no inputs", lambda p: rows(2, 3), (), "the model has no inputs"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "inputs", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_unfit_data_are_refused_with_exit_code_3(
    make: Callable[[Path], Any], inputs: tuple[TensorSpec, ...], message: str, tmp_path: Path
) -> None:
    source = make(tmp_path)
    with pytest.raises(DataError) as caught:
        list(open_data(source, inputs).batches())
    assert message in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("no_such_module:feeds", {}, "there is no module 'no_such_module'"),
        ("no_such_file.py:feeds", {}, "there is no file no_such_file.py"),
        ("my_feeds_module:feed", {}, "'feed' does not exist in my_feeds_module (did you mean 'feeds'?)"),
        ("my_feeds_module:NUMBER", {}, "'NUMBER' is not a function"),
        (iter([1]), {}, "give the function that makes it"),
        (7, {}, "data cannot be a int"),
        (rows(2, 3), {"batch": 0}, "batch size must be a positive whole number, not 0"),
        (rows(2, 3), {"seed": -1}, "seed must be a whole number"),
        (rows(2, 3), {"preprocess": "imagenet"}, "preprocessing is for folders of pictures"),
    ],
)
def test_senseless_requests_are_refused_with_exit_code_2(
    source: Any, options: dict[str, Any], message: str, module: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        open_data(source, [X], **options)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("limit", [0, -1, True, 1.5])
def test_a_senseless_limit_is_refused_at_once(limit: Any) -> None:
    with pytest.raises(UsageError, match="number of samples"):
        open_data(rows(2, 3), [X]).batches(limit)


def test_an_error_inside_the_users_function_names_the_function(module: Path) -> None:
    with pytest.raises(DataError, match=r"my_feeds_module:broken cannot be read: KeyError: 'missing'"):
        open_data("my_feeds_module:broken", [X])


def test_an_error_inside_the_users_module_is_not_called_a_missing_module(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("import no_such_module_at_all")
    with pytest.raises(DataError, match="no_such_module_at_all"):
        open_data(f"{tmp_path / 'm.py'}:feeds", [X])


def test_a_function_that_gives_its_samples_only_once_is_found_out() -> None:
    stream = iter([{"x_in": rows(2, 3)}])
    dataset = open_data(lambda: stream, [X])
    with pytest.raises(DataError, match="at every call"):
        list(dataset.batches())


def test_a_close_file_name_is_suggested(tmp_path: Path) -> None:
    np.savez(tmp_path / "calib.npz", x_in=rows(2, 3))
    with pytest.raises(DataError, match=r"did you mean 'calib.npz'"):
        open_data(tmp_path / "calb.npz", [X])


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=300), kept=st.integers(0, 120))
def test_damaged_files_raise_nothing_but_data_errors(
    content: bytes, kept: int, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    for name, save in (("a.npz", np.savez), ("a.npy", np.save)):
        save(folder / name, rows(4, 3))
        (folder / name).write_bytes((folder / name).read_bytes()[:kept] + content)
        with pytest.raises(OnnxcompError) as caught:
            list(open_data(folder / name, [X]).batches())
        assert isinstance(caught.value, DataError)


# --- streaming ---

ARRAYS = hnp.arrays(
    st.sampled_from([np.dtype(t) for t in ("f2", "f4", "f8", "i1", "u2", "i8", "?", ">f4", "<U3")]),
    hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=6),
)


@settings(max_examples=80, deadline=None)
@given(array=ARRAYS, step=st.integers(1, 9), fortran=st.booleans(), packed=st.booleans())
def test_rows_read_from_a_file_are_the_rows_of_the_array(
    array: np.ndarray[Any, Any], step: int, fortran: bool, packed: bool, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    stored = np.asfortranarray(array) if fortran else array
    (np.savez_compressed if packed else np.savez)(folder / "a.npz", other=np.zeros(3), name=stored)
    np.save(folder / "a.npy", stored)
    for column in (npz_columns(folder / "a.npz")["name"], npy_column(folder / "a.npy", "name")):
        blocks = list(column.rows(step))
        assert all(len(block) == step for block in blocks[:-1])
        assert (column.shape, column.dtype) == (array.shape, array.dtype)
        assert np.concatenate(blocks).astype(array.dtype).tobytes() == array.tobytes()  # not in native order


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    batch=st.integers(1, 10),
    limit=st.integers(1, 60),
    fixed=st.booleans(),
)
def test_regrouping_keeps_every_sample_and_its_label_in_order(
    sizes: list[int], batch: int, limit: int, fixed: bool, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    total, start = sum(sizes), 0
    for number, size in enumerate(sizes):
        values = np.arange(start, start + size)
        np.savez(folder / f"{number}.npz", x=values[:, None].astype(np.float32), labels=values)
        start += size
    model_input = spec("x", (batch if fixed else "N", 1))
    if fixed and total < batch:
        with pytest.raises(DataError, match="exactly"):
            open_data(folder, [model_input])
        return
    batches = list(open_data(folder, [model_input], batch=batch).batches(limit))
    expected = max(min(limit, total) // batch, 1) * batch if fixed else min(limit, total)
    assert together(iter(batches), "x")[:, 0].tolist() == list(range(expected))
    assert [label for b in batches if b.labels is not None for label in b.labels] == list(range(expected))
    assert all(b.count == batch for b in batches[:-1])
    assert all(b.count == len(b.feeds["x"]) == len(b.labels) for b in batches if b.labels is not None)


def write_zeros(folder: Path, form: str, samples: int) -> Path:
    """`samples` x 50 000 float32 zeros, without ever holding them: deflated, or as a sparse file."""
    header = {"descr": "<f4", "fortran_order": form == "npz-fortran", "shape": (samples, 50_000)}
    size = samples * 200_000
    if form == "npy":
        with (folder / "x_in.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + size)
        return folder / "x_in.npy"
    archive = zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("x_in.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(size // 2_000_000):
            member.write(bytes(2_000_000))
    return folder / "a.npz"


@pytest.mark.parametrize("form", ["npz", "npz-fortran", "npy"])
def test_memory_does_not_grow_with_the_size_of_a_file(form: str, tmp_path: Path) -> None:
    path = write_zeros(tmp_path, form, 1000)
    tracemalloc.start()
    try:
        read = sum(b.feeds["x_in"].nbytes for b in open_data(path, [spec("x_in", ("N", 50_000))]).batches())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read == 200_000_000
    assert peak < 30_000_000


# --- hashes, and the zoo ---


def test_sample_hashes_do_not_depend_on_batching_and_tell_samples_apart() -> None:
    data = {"x_in": rows(6, 3), "ids": np.arange(30).reshape(6, 5)}
    by_four = [h for b in open_data(data, [X, IDS], batch=4).batches() for h in sample_hashes(b)]
    one_by_one = [h for b in open_data(data, [X, IDS], batch=1).batches() for h in sample_hashes(b)]
    assert by_four == one_by_one
    assert len(set(by_four)) == 6


def test_samples_of_text_have_hashes_too() -> None:
    words, x = np.array(["a", "b", "c"], dtype=object), rows(3, 2)
    together = sample_hashes(Batch({"words": words, "x": x}, None, 3, ""))
    alone = [sample_hashes(Batch({"words": words[i : i + 1], "x": x[i : i + 1]}, None, 1, ""))[0] for i in range(3)]
    assert together == alone
    assert len(set(together)) == 3


def test_a_changed_bit_changes_only_its_samples_hash() -> None:
    data = rows(4, 3)
    changed = data.copy()
    changed[2, 1] = np.nextafter(changed[2, 1], np.float32(9))
    before, after = (sample_hashes(next(open_data(a, [X]).batches())) for a in (data, changed))
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, True]


ZOO_MODELS = sorted(path.stem for path in ZOO.glob("models/*.onnx"))


@pytest.mark.skipif(not ZOO_MODELS, reason="the zoo of real models is not here")
@pytest.mark.parametrize("part", ["calib", "eval"])
def test_the_feeds_of_the_zoo_run_on_their_models(part: str) -> None:
    ran = 0
    for name in ZOO_MODELS:
        feeds = ZOO / "feeds" / f"{ZOO_FEEDS.get(name, name)}.{part}.npz"
        if feeds.is_file():
            session = open_session(ZOO / "models" / f"{name}.onnx")
            dataset = open_data(feeds, session.inputs)
            assert dataset.length == sum(batch.count for batch in dataset.batches())
            for batch in dataset.batches(2):
                assert session.run(batch.feeds)
                ran += 1
    assert ran > 0
