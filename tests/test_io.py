"""Saving is atomic, whatever interrupts it; loading is lazy and survives what is saved over the file."""

import errno
import hashlib
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from onnxcomp import atomic, io
from onnxcomp.errors import ModelError, RejectedError, ResourceError, UsageError
from onnxcomp.io import load, model_bytes, save, save_text
from onnxcomp.serde import export_model, from_proto, inline

HEAD = '<ir_version: 10, opset_import: ["" : 17]>'
posix = pytest.mark.skipif(os.name != "posix", reason="modes, signals and limits of POSIX")


def model_of(value: float, elements: int = 3000) -> onnx.ModelProto:
    """y = (x + w) + v with weights that are all `value` and `-value`."""
    proto = onnx.parser.parse_model(
        f"{HEAD} g (float[{elements}] x) => (float[{elements}] y) {{ h = Add(x, w)  y = Add(h, v) }}"
    )
    for name, number in (("w", value), ("v", -value)):
        proto.graph.initializer.append(
            numpy_helper.from_array(np.full(elements, number, np.float32), name)
        )
    return proto


def write(path: Path, value: float, **options: object) -> io.Saved:
    return save(from_proto(model_of(value)), path, **options)  # type: ignore[arg-type]


def value_of(path: Path) -> float:
    """The value that `model_of` put into a file; the file has to be whole."""
    weights = {t.name: t.values for t in load(path).graph.initializers}
    (value,), (negative,) = np.unique(weights["w"]), np.unique(weights["v"])
    assert negative == -value
    onnx.checker.check_model(str(path))
    return float(value)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- what is written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("external", [False, True])
def test_a_saved_model_loads_as_it_was(tmp_path: Path, external: bool) -> None:
    saved = write(tmp_path / "m.onnx", 2.0, external_data=external)
    assert value_of(tmp_path / "m.onnx") == 2.0
    onnx.load(tmp_path / "m.onnx")
    assert saved.path == tmp_path / "m.onnx"
    assert saved.bytes == model_bytes(saved.path) == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert (saved.data is not None) == external


def test_the_file_holds_the_bytes_that_protobuf_would_write(tmp_path: Path) -> None:
    model = from_proto(nested())
    proto, payloads = export_model(model)
    assert len(payloads) == 6
    inline(proto, payloads)
    save(model, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == proto.SerializeToString(deterministic=True)


def nested() -> onnx.ModelProto:
    """Weights with doc strings in initializers, attributes, subgraphs and functions; a doc string like our own mark."""

    def weight(name: str, elements: int) -> TensorProto:
        tensor = numpy_helper.from_array(np.arange(elements, dtype=np.float32), name)
        tensor.doc_string = "\x00slot" + "d" * elements
        tensor.metadata_props.add(key="k", value="v")
        return tensor

    def constant(output: str, elements: int) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [output], value=weight("", elements))

    bodies = {
        name: helper.make_graph(
            [constant(f"{name}_c", size), helper.make_node("Add", [f"{name}_c", f"{name}_w"], [f"{name}_y"])],
            name, [], [onnx.ValueInfoProto(name=f"{name}_y")], [weight(f"{name}_w", size)], doc_string="\x00slot",
        )
        for name, size in (("then_branch", 40_000), ("else_branch", 300))
    }  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    function = helper.make_function("f", "F", [], ["z"], [constant("z", 500)], opsets)
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["a"], **bodies), helper.make_node("F", [], ["b"], domain="f")],
        "g", [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("a", "b")],
        [weight("unused", 5000), weight("small", 3)], doc_string="\x00slot",
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 70_000), max_size=6), st.booleans())
def test_any_sizes_of_weights_survive(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], external: bool
) -> None:
    path = tmp_path_factory.mktemp("m") / "m.onnx"
    proto = onnx.parser.parse_model(f"{HEAD} g (float[1] x) => (float[1] y) {{ y = Relu(x) }}")
    for i, size in enumerate(sizes):
        proto.graph.initializer.append(numpy_helper.from_array(np.full(size, i, np.uint8), f"w{i}"))
    save(from_proto(proto), path, external_data=external)
    assert onnx.load(path).graph.initializer == proto.graph.initializer or external
    assert [t.values.tolist() for t in load(path).graph.initializers] == [[i] * n for i, n in enumerate(sizes)]


def test_payloads_lie_in_one_data_file_at_multiples_of_64(tmp_path: Path) -> None:
    saved = save(from_proto(nested()), tmp_path / "m.onnx", external_data=True)
    assert saved.data is not None
    assert names(tmp_path) == [saved.data.name, "m.onnx"]
    inner = hashlib.sha256(saved.data.read_bytes()).digest()  # one block, so one digest below the outer one
    assert saved.data.name == f"m.{hashlib.sha256(inner).hexdigest()[:12]}.data"
    stubs = [t for _, t in io.tensors(onnx.load(tmp_path / "m.onnx", load_external_data=False)) if t.external_data]
    entries = [{e.key: e.value for e in t.external_data} for t in stubs]
    assert len(entries) == 6
    assert {e["location"] for e in entries} == {saved.data.name}
    assert all(int(e["offset"]) % 64 == 0 for e in entries)
    assert all(t.doc_string and t.metadata_props for t in stubs)


def test_external_data_are_used_above_the_limit_of_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "_INLINE_LIMIT", 10_000)
    assert write(tmp_path / "m.onnx", 1.0).data is not None
    assert value_of(tmp_path / "m.onnx") == 1.0


def test_a_weight_that_is_shared_is_written_once(tmp_path: Path) -> None:
    model = from_proto(model_of(1.0))
    first, second = model.graph.initializers
    second.weight = first.weight
    saved = save(model, tmp_path / "m.onnx", external_data=True)
    assert saved.data is not None
    assert saved.data.stat().st_size == 12_000


@posix
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        saved = write(tmp_path / "m.onnx", 1.0, external_data=True)
        save_text("x", tmp_path / "r.html")
    finally:
        os.umask(before)
    assert saved.data is not None
    for path in (saved.path, saved.data, tmp_path / "r.html"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("external", [False, True])
def test_two_saves_of_a_model_give_the_same_bytes(tmp_path: Path, external: bool) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save(from_proto(nested()), tmp_path / name / "m.onnx", external_data=external)
    assert names(tmp_path / "a") == names(tmp_path / "b")
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_payloads_outside_of_initializers_are_kept(tmp_path: Path) -> None:
    """Sparse tensors, training_info and defaults of functions, all large enough to be left in the file."""
    proto = model_of(1.0)
    indices = numpy_helper.from_array(np.arange(500, dtype=np.int64), "")
    values = numpy_helper.from_array(np.arange(1, 501, dtype=np.float32), "s")
    proto.graph.sparse_initializer.add(values=values, indices=indices, dims=[1000])
    proto.training_info.add().algorithm.initializer.append(numpy_helper.from_array(np.ones(700), "t"))
    function = proto.functions.add(name="F", domain="f", opset_import=[helper.make_opsetid("", 17)])
    function.attribute_proto.append(
        AttributeProto(name="a", type=AttributeProto.TENSOR, t=numpy_helper.from_array(np.ones(900), "d"))
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    save(load(path), path, overwrite=True)
    found = onnx.load(path)
    assert found.training_info == proto.training_info
    assert found.functions == proto.functions
    assert found.graph.sparse_initializer == proto.graph.sparse_initializer


# --- overwriting -----------------------------------------------------------------------------------------------


def test_an_existing_file_is_kept_without_overwrite(tmp_path: Path) -> None:
    write(tmp_path / "m.onnx", 1.0)
    with pytest.raises(UsageError, match="exists"):
        write(tmp_path / "m.onnx", 2.0)
    assert value_of(tmp_path / "m.onnx") == 1.0


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_a_model_is_saved_over_the_file_that_its_weights_lie_in(tmp_path: Path, before: bool, after: bool) -> None:
    path = tmp_path / "m.onnx"
    write(path, 1.0, external_data=before)
    model = load(path)
    constant = next(t for t in model.graph.initializers if t.name == "w")
    for value in (2.0, 3.0):
        constant.values = np.full(3000, value, np.float32)
        save(model, path, overwrite=True, external_data=after)
        weights = {t.name: t.values for t in load(path).graph.initializers}
        assert set(weights["w"]) == {value}
        assert set(weights["v"]) == {-1.0}  # still that of the first file, which is gone
        assert len(names(tmp_path)) == (2 if after else 1)


def test_a_data_file_goes_once_no_model_refers_to_it(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    first = write(path, 1.0, external_data=True).data
    assert first is not None
    shutil.copy(path, tmp_path / "backup.onnx")
    second = write(path, 2.0, external_data=True, overwrite=True).data
    assert second is not None
    assert value_of(tmp_path / "backup.onnx") == 1.0  # the copy still needs the old data
    (tmp_path / "backup.onnx").unlink()
    write(path, 3.0, overwrite=True)
    assert names(tmp_path) == ["m.onnx"]


def test_models_of_the_same_stem_do_not_take_each_others_data(tmp_path: Path) -> None:
    write(tmp_path / "m.bin", 1.0, external_data=True)
    write(tmp_path / "m.onnx", 2.0, external_data=True)
    write(tmp_path / "m.onnx", 3.0, overwrite=True)
    assert value_of(tmp_path / "m.bin") == 1.0


def test_data_files_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in ("m.data", "m.opt.0123456789ab.data", "m.0123456789ab.data.txt", "n.0123456789ab.data"):
        (tmp_path / name).write_text("mine")
    others = names(tmp_path)
    write(tmp_path / "m.onnx", 1.0, external_data=True)
    write(tmp_path / "m.onnx", 2.0, overwrite=True)
    assert names(tmp_path) == sorted(["m.onnx", *others])


def test_a_data_file_outside_of_the_folder_is_never_removed(tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    outside = tmp_path / "m.0123456789ab.data"
    outside.write_bytes(bytes(64))
    proto = onnx.parser.parse_model(f"{HEAD} g (float[1] x) => (float[1] y) {{ y = Relu(x) }}")
    tensor = proto.graph.initializer.add(name="w", data_type=1, dims=[16], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=f"../{outside.name}")
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    write(folder / "m.onnx", 1.0, overwrite=True)
    assert outside.exists()


# --- interruptions ---------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Stands for KeyboardInterrupt."""


@pytest.mark.parametrize(
    ("step", "external"),
    [
        *(("write", e) for e in (False, True)),
        *(("require_space", e) for e in (False, True)),
        *(("os.replace", e) for e in (False, True)),
        *(("before_commit", e) for e in (False, True)),
        ("locked", True),
        ("sync_folder", True),
    ],
)
def test_an_interruption_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, external: bool
) -> None:
    path = tmp_path / "m.onnx"
    write(path, 1.0, external_data=external)
    before = names(tmp_path)

    def stop(*_: object, **__: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        options = {"overwrite": True, "external_data": external}
        if step == "before_commit":
            options["before_commit"] = stop
        else:
            patch.setattr(*((os, "replace") if step == "os.replace" else (atomic, step)), stop)
        with pytest.raises(Stop):
            write(path, 2.0, **options)
    assert names(tmp_path) == before
    assert value_of(path) == 1.0


@posix
def test_an_interruption_right_after_the_commit_keeps_the_new_data_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    write(path, 1.0, external_data=True)
    replace = os.replace

    def late(source: Path, target: Path) -> None:
        replace(source, target)
        if target == path:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", late)
    with pytest.raises(KeyboardInterrupt):
        write(path, 2.0, external_data=True, overwrite=True)
    assert value_of(path) == 2.0
    assert len(names(tmp_path)) == 2


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_leaves_no_temporary_file(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "m.onnx"
    write(path, 1.0, external_data=True)
    before = names(tmp_path)
    script = textwrap.dedent(f"""
        import sys; sys.path[:0] = {sys.path!r}
        import os, signal, time
        from onnxcomp.cli import _terminable
        from onnxcomp.io import load, save
        signal.signal(signal.SIGINT, signal.default_int_handler)
        def wait(path):
            print(*os.listdir({str(tmp_path)!r}), flush=True)
            time.sleep(30)
        with _terminable():
            model = load({str(path)!r})
            model.graph.initializers[0].values = model.graph.initializers[0].values * 2
            save(model, {str(path)!r}, overwrite=True, external_data=True, before_commit=wait)
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert b".tmp-" in process.stdout.readline()
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert errors.rstrip().endswith(b"KeyboardInterrupt")
    assert names(tmp_path) == before
    assert value_of(path) == 1.0


def test_drafts_of_dead_processes_are_removed_and_others_kept(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    dead, alive = process.pid, os.getppid()
    kept = [f".m.onnx.tmp-{alive}-00112233", f".n.onnx.tmp-{dead}-00112233", f".m.onnx.tmp-{dead}-0011"]
    for name in [*kept, f".m.onnx.tmp-{dead}-00112233", f".m.onnx.tmp-{dead}-deadbeef"]:
        (tmp_path / name).write_text("half")
    write(tmp_path / "m.onnx", 1.0)
    assert names(tmp_path) == sorted([*kept, "m.onnx"])


def _write_many(path: Path, value: float) -> None:
    for i in range(25):
        write(path, value, overwrite=True, external_data=i % 2 == 0)


@posix
def test_two_writers_at_once_end_with_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    write(path, 1.0, external_data=True)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, value)) for value in (1.0, 2.0, 1.0)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [w.exitcode for w in writers] == [0, 0, 0]
    assert value_of(path) in (1.0, 2.0)
    assert [n for n in names(tmp_path) if ".tmp-" in n] == []
    write(path, 3.0, overwrite=True)
    assert names(tmp_path) == ["m.onnx"]


# --- disks and folders -----------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("external", [False, True])
def test_a_file_size_limit_is_a_resource_error_and_keeps_the_old_file(tmp_path: Path, external: bool) -> None:
    path = tmp_path / "m.onnx"
    write(path, 1.0, external_data=external)
    before, limits = names(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # Python ignores SIGXFSZ: writing gives EFBIG
    try:
        with pytest.raises(ResourceError, match="not written, what was there before still is") as caught:
            write(path, 2.0, overwrite=True, external_data=external)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.exit_code == 8
    assert names(tmp_path) == before
    assert value_of(path) == 1.0


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_seen_before_and_while_writing(tiny_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_disk / "m.onnx"
    write(path, 1.0)
    (tiny_disk / "ballast").write_bytes(bytes(30_000))
    with pytest.raises(ResourceError, match=r"needs 24,\d+ bytes, .* has \d+,\d+ left"):
        write(path, 2.0, overwrite=True)
    monkeypatch.setattr(atomic, "require_space", lambda folder, size: None)
    for external in (False, True):
        with pytest.raises(ResourceError, match="the disk is full"):
            write(path, 2.0, overwrite=True, external_data=external)
    assert names(tiny_disk) == ["ballast", "m.onnx"]
    assert value_of(path) == 1.0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_at_the_sync_is_a_resource_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    write(tmp_path / "m.onnx", 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(ResourceError, match="disk is full"):
            write(tmp_path / "m.onnx", 2.0, overwrite=True)
    assert value_of(tmp_path / "m.onnx") == 1.0
    assert names(tmp_path) == ["m.onnx"]


def test_a_file_system_that_became_read_only_rejects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RejectedError, match="Read-only file system") as caught:
        write(tmp_path / "m.onnx", 1.0)
    assert caught.value.exit_code == 3
    assert names(tmp_path) == []


def test_paths_that_cannot_be_written_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for path, error, message in (
        (tmp_path, UsageError, "is a folder"),
        (tmp_path / "missing" / "m.onnx", RejectedError, "does not exist"),
        (tmp_path / "file" / "m.onnx", RejectedError, "does not exist"),
        (tmp_path / "a\0b.onnx", UsageError, "NUL"),
        (tmp_path / ("n" * 300), RejectedError, "File name too long"),
    ):
        with pytest.raises(error, match=message):
            write(path, 1.0, overwrite=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(RejectedError, match="read-only"):
        write(tmp_path / "m.onnx", 1.0)
    assert names(tmp_path) == ["file"]


@posix
def test_a_pipe_or_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(UsageError, match="pipe, socket or device"):
            write(path, 1.0, overwrite=True)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_text_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_text("old ä", tmp_path / "r.json")
    with pytest.raises(UsageError, match="exists"):
        save_text("new", tmp_path / "r.json")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(ResourceError):
            save_text("new", tmp_path / "r.json", overwrite=True)
    assert (tmp_path / "r.json").read_text("utf-8") == "old ä"
    assert names(tmp_path) == ["r.json"]


# --- loading ---------------------------------------------------------------------------------------------------


def test_a_loaded_model_is_that_of_the_file_as_it_was(tmp_path: Path) -> None:
    for external in (False, True):
        path = tmp_path / f"{external}.onnx"
        write(path, 1.0, external_data=external)
        model = load(path)
        write(path, 2.0, overwrite=True, external_data=external)
        assert {float(t.values[0]) for t in model.graph.initializers} == {1.0, -1.0}


def test_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m.onnx", 1.0, external_data=True)
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    proto.graph.initializer[0].external_data.add(key="checksum", value="0" * 40)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="has changed"):
        load(tmp_path / "m.onnx")


def test_a_model_proto_with_external_data_is_refused_with_the_way_out(tmp_path: Path) -> None:
    write(tmp_path / "m.onnx", 1.0, external_data=True)
    with pytest.raises(ModelError, match="give the path"):
        load(onnx.load(tmp_path / "m.onnx", load_external_data=False))


def test_sizes_of_files_outside_of_the_folder_are_not_looked_up(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(f"{HEAD} g (float[1] x) => (float[1] y) {{ y = Relu(x) }}")
    tensor = proto.graph.initializer.add(name="w", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/hostname")
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    assert model_bytes(tmp_path / "m.onnx") == (tmp_path / "m.onnx").stat().st_size
