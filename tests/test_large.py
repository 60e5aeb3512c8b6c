"""Models of gigabytes are edited and saved in little memory, in about the time that a copy takes."""

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnxcomp.io import load, save
from onnxcomp.serde import export_model, from_proto
from onnxcomp.splice import splice
from onnxcomp.weights import Weight

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")

EDIT = """
import sys
import numpy as np
from onnxcomp.io import load, save
source, target, external = sys.argv[1:]
model = load(source)
weight = model.graph.initializers[1]
weight.values = np.full(weight.shape, 7, weight.dtype)
save(model, target, external_data=external == "external")
print(next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose gigabytes are removed at the end."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def stubs(count: int, elements: int) -> onnx.ModelProto:
    """A model with `count` float weights in `big.data`, which is still to be made."""
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 17]> g (float[1] x) => (float[1] y) { y = Relu(x) }'
    )
    for i in range(count):
        tensor = proto.graph.initializer.add(
            name=f"w{i}", data_type=TensorProto.FLOAT, dims=[elements], data_location=TensorProto.EXTERNAL
        )
        for key, value in (("location", "big.data"), ("offset", 4 * elements * i), ("length", 4 * elements)):
            tensor.external_data.add(key=key, value=str(value))
    return proto


def sparse_external(folder: Path, count: int, elements: int) -> Path:
    """The model of `stubs` with a data file that is one hole."""
    (folder / "big.onnx").write_bytes(stubs(count, elements).SerializeToString())
    with (folder / "big.data").open("wb") as file:
        file.truncate(4 * elements * count)
    return folder / "big.onnx"


def sparse_inline(folder: Path, count: int, elements: int) -> Path:
    """The same in one file, in which each payload is a hole."""
    model = load(sparse_external(folder, count, elements))
    path = folder / "inline.onnx"
    with path.open("wb") as file:
        for piece in splice(*export_model(model)).pieces:
            if isinstance(piece, Weight):
                file.seek(piece.nbytes, os.SEEK_CUR)
            else:
                file.write(piece)
        file.truncate()
    return path


def edit(source: Path, target: Path, how: str) -> int:
    """Peak bytes of a process that sets one weight of a model."""
    done = subprocess.run(
        [sys.executable, "-c", EDIT, source, target, how],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    return 1024 * int(done.stdout)


@linux
def test_editing_a_weight_of_2_3_gb_takes_less_than_half_a_gb(folder: Path) -> None:
    source, target = sparse_external(folder, 23, 25_000_000), folder / "out.onnx"
    assert edit(source, target, "auto") < 500e6  # too large for one message, so the data go into a file
    weights = [t.weight for t in load(target).graph.initializers]
    assert [w.nbytes for w in weights] == [100_000_000] * 23
    assert [float(w.load()[12_345_678]) for w in weights[:3]] == [0.0, 7.0, 0.0]
    if not (folder / "big.data").stat().st_blocks:  # the file system knows holes
        assert sum(512 * p.stat().st_blocks for p in folder.iterdir()) < 110e6, "what was a hole is written"


@linux
def test_a_model_of_1_2_gb_in_one_file_is_edited_in_less_than_300_mb(folder: Path) -> None:
    source, target = sparse_inline(folder, 12, 25_000_000), folder / "out.onnx"
    assert source.stat().st_size > 1.2e9
    assert edit(source, target, "inline") < 300e6
    weights = [t.weight for t in load(target).graph.initializers]
    assert [float(w.load()[-1]) for w in weights[:3]] == [0.0, 7.0, 0.0]
    assert target.stat().st_size == source.stat().st_size


def test_no_message_grows_beyond_2_gb(folder: Path) -> None:
    model = load(sparse_external(folder, 40, 25_000_000))
    message = splice(*export_model(model))
    assert message.size > 4_000_000_000  # measured without being built
    assert sum(len(p) for p in message.pieces if isinstance(p, bytes)) < 10_000


def ratios(folder: Path, source: Path, copy: Callable[[], object]) -> list[float]:
    """Seconds of an edit with its saving by those of a copy of the data file, five times in turn."""
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        copy()
        middle = time.perf_counter()
        edited = load(source)
        edited.graph.initializers[0].values = np.ones(25_000_000, np.float32)
        save(edited, folder / "out.onnx", external_data=True)
        found.append((time.perf_counter() - middle) / (middle - begin))
        for path in (folder / "copy", *folder.glob("out*")):
            path.unlink()
    return found


@pytest.mark.slow
def test_editing_a_sparse_file_takes_at_most_twice_the_time_of_a_copy(folder: Path) -> None:
    source, data = sparse_external(folder, 23, 25_000_000), folder / "big.data"
    found = ratios(folder, source, lambda: shutil.copyfile(data, folder / "copy"))
    assert statistics.median(found) < 2, found


@pytest.mark.slow
def test_saving_takes_at_most_twice_the_time_of_a_copy(folder: Path) -> None:
    """Against `shutil.copyfile` that is on the disk at its end, as what is saved is."""
    model = from_proto(stubs(0, 0))
    rng = np.random.default_rng(0)
    for i in range(6):
        model.constant(model.graph, f"w{i}", rng.standard_normal(25_000_000, np.float32))
    data = save(model, folder / "big.onnx", external_data=True).data
    assert data is not None
    del model

    def copy() -> None:
        shutil.copyfile(data, folder / "copy")
        with (folder / "copy").open("rb+") as file:
            os.fsync(file.fileno())

    found = ratios(folder, folder / "big.onnx", copy)
    assert statistics.median(found) < 2, found
