"""The command line on malformed, hostile and damaged files: exit 3 or a correct result, soon, and nothing else.

The native part of `inspect` on accepted models is what `onnxcomp.probe` keeps in a child process; here most files are
inspected in this process, and a sample in one of its own with 1 GB of memory and 10 seconds.
"""

import functools
import importlib.util
import json
import os
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from onnxcomp import child, inspection, probe
from onnxcomp.errors import ModelError, ResourceError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the cases need links, pipes and devices")

MODELS = Path(__file__).resolve().parents[1] / "models"
# Their lossless passes take quadratic time; they are accepted by the scan, which test_safety.py shows.
ALONE = (
    "external_parent_folder external_absolute external_symlink file_fifo file_empty file_html file_truncated "
    "file_missing file_unknown_field hub_cache_strict function_twice bomb_hidden_by_a_function function_captures "
    "control_characters_are_escaped_in_messages file_device"
).split()


def _load_cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("malformed", Path(__file__).with_name("malformed.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["malformed"] = module
    spec.loader.exec_module(module)
    return module


malformed = _load_cases()


class Opened:
    """The paths that Python opens while it is watched; an audit hook cannot be removed, only rest."""

    def __init__(self) -> None:
        self.paths: list[str] | None = None

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and self.paths is not None and isinstance(args[0], (str, bytes, os.PathLike)):
            self.paths.append(os.path.realpath(os.fsdecode(args[0])))


@functools.cache
def opened() -> Opened:
    hook = Opened()
    sys.addaudithook(hook)
    return hook


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder of the model. A pipe beside it blocks whoever opens it; whatever is opened there fails the test."""
    inner = tmp_path / "model"
    inner.mkdir()
    os.mkfifo(tmp_path / "secret.bin")
    opened().paths = paths = []
    yield inner
    opened().paths = None
    outside = [p for p in paths if p.startswith(str(tmp_path)) and not p.startswith(str(inner))]
    assert outside == []
    assert [p for p in paths if p.startswith(("/etc/hostname", "/dev/zero"))] == []


def judge(code: int, out: str, err: str, error: str | None) -> None:
    """A refusal is exit 3 with a message; a file that only this scan accepts may still be none for ONNX Runtime."""
    assert "Traceback" not in err
    if code == 3:
        assert err.startswith("error: ")
        assert out == ""
        assert "\x1b" not in err
    else:
        assert code == 0, err
        assert error is None
        json.loads(out)


@pytest.mark.parametrize("name", sorted(malformed.CASES))
def test_inspecting_a_malformed_file_ends_well(name: str, folder: Path, cli: Callable[..., Any]) -> None:
    case = malformed.CASES[name]
    path = case.build(folder)
    begin = time.process_time()  # not the wall clock: tests run beside others
    if "\0" in str(path):
        pytest.skip("no command line can hold a NUL")
    ran = cli("inspect", path, "--json", "-", "-q")
    judge(ran.code, ran.out, ran.err, case.error)
    assert case.error is None or ran.code == 3
    assert case.error is not None or case.allow_symlinks or ran.code == 0
    assert time.process_time() - begin < 10


LIMITED = textwrap.dedent("""
    import resource, sys
    from onnxcomp import cli, cli_commands, cli_tables, inspection  # what is imported does not count
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
    sys.exit(cli.main(["inspect", sys.argv[1], "--json", "-", "-q"]))
""")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="RLIMIT_AS needs /proc")
@pytest.mark.parametrize("name", ALONE)
def test_inspecting_needs_neither_much_memory_nor_time(name: str, folder: Path) -> None:
    case = malformed.CASES[name]
    path = case.build(folder)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, path], capture_output=True, text=True, timeout=10, cwd=MODELS.parent
    )
    judge(done.returncode, done.stdout, done.stderr, case.error)


def mutations(content: bytes, generator: random.Random, count: int) -> Iterator[bytes]:
    """Cut off, with a flipped bit in the first 4 KB or anywhere, in turn."""
    for number in range(count):
        if number % 3 == 0:
            yield content[: generator.randrange(len(content))]
            continue
        flipped = bytearray(content)
        end = 4096 if number % 3 == 1 else len(content)
        flipped[generator.randrange(min(end, len(content)))] ^= 1 << generator.randrange(8)
        yield bytes(flipped)


@pytest.mark.parametrize("name", ["digits_mlp.onnx", "digits_transformer.onnx"])
def test_inspecting_a_damaged_model_ends_well(name: str, tmp_path: Path, cli: Callable[..., Any]) -> None:
    path, codes = tmp_path / "m.onnx", []
    for content in mutations((MODELS / name).read_bytes(), random.Random(1), 30):
        path.write_bytes(content)
        ran = cli("inspect", path, "--json", "-", "-q")
        judge(ran.code, ran.out, ran.err, None)
        codes.append(ran.code)
    assert set(codes) == {0, 3}


def test_probing_a_damaged_model_ends_well(tmp_path: Path) -> None:
    path, refused = tmp_path / "m.onnx", 0
    for content in mutations((MODELS / "digits_mlp.onnx").read_bytes(), random.Random(2), 9):
        path.write_bytes(content)
        try:
            probe.probe(path)
        except ModelError:
            refused += 1
    assert 3 <= refused <= 9


# --- the probe -------------------------------------------------------------------------------------------------


def test_inspecting_in_a_child_gives_the_same_answer() -> None:
    path = MODELS / "digits_mlp.onnx"
    expected = json.loads(json.dumps(inspection.inspect(path).to_json()))
    assert probe.inspect_contained(path) == expected


def test_a_file_is_probed_once_for_each_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(child, "run", lambda *args, **limits: calls.append(args) or {})
    path = tmp_path / "m.onnx"
    malformed.write(tmp_path, malformed.good())
    probe.probe(path)
    probe.probe(path)
    assert len(calls) == 1
    path.unlink()
    malformed.write(tmp_path, malformed.parse(malformed.RELU))
    probe.probe(path)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (TimeoutError("it took longer"), ModelError, "it took longer; it may never end"),
        (child.ChildCrashError("signal SIGSEGV", False), ModelError, r"crashed on .*m\.onnx \(signal SIGSEGV\)"),
        (child.ChildCrashError("signal SIGKILL", True), ResourceError, "want of memory"),
    ],
)
def test_what_native_code_does_to_the_child_is_an_error_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, error: type[Exception], message: str
) -> None:
    def fail(*_: object, **limits: float) -> None:
        assert 10 <= limits["cpu_seconds"] < 20
        assert limits["seconds"] >= 60  # by the clock, on a machine that is busy with other things
        assert limits["memory_bytes"] >= 1 << 30
        raise failure

    monkeypatch.setattr(child, "run", fail)
    path = malformed.write(tmp_path, malformed.good())
    for _ in range(2):  # a failure is not remembered as a success
        with pytest.raises(error, match=message):
            probe.probe(path)


def test_a_file_that_the_scan_refuses_starts_no_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "run", lambda *_, **__: pytest.fail("a child was started"))
    (tmp_path / "m.onnx").write_bytes(b"")
    for path in (tmp_path / "m.onnx", tmp_path / "missing.onnx"):
        with pytest.raises(ModelError):
            probe.probe(path)
        with pytest.raises(ModelError):
            probe.inspect_contained(path)
