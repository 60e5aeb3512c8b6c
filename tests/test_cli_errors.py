"""Bad input at the command line: the right exit code, one or two sentences, no traceback, nothing written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = ("--calib", "data.npz")


def _text(folder: Path) -> None:
    (folder / "model.onnx").write_text("this is no model, it is a text that somebody renamed\n")


def _truncated(folder: Path) -> None:
    whole = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(whole[: len(whole) // 2])


def _opset(version: int):
    def change(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx")
        model.opset_import[0].version = version
        onnx.save(model, folder / "model.onnx")

    return change


def _custom_operator(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    model.graph.node[1].domain = "acme"
    model.graph.node[1].op_type = "Sparkle"
    model.opset_import.add(domain="acme", version=1)
    onnx.save(model, folder / "model.onnx")


def _external_data_outside(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    tensor = model.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../etc/passwd")
    onnx.save(model, folder / "model.onnx")


def _samples(**arrays: np.ndarray):
    return lambda folder: np.savez(folder / "data.npz", **arrays)


def _image(*shape: int, dtype: str = "float32", value: float = 0.5) -> np.ndarray:
    return np.full(shape, value, dtype)


def _other_input(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    model.graph.input[0].name = model.graph.node[0].input[0] = "picture"
    onnx.save(model, folder / "other.onnx")


def _with_nan(folder: Path) -> None:
    image = _image(20, 1, 8, 8)
    image[7, 0, 3, 3] = np.nan
    np.savez(folder / "data.npz", image=image)


def _write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def _nothing(folder: Path) -> None:
    pass


MODEL_AND_DATA = [
    (_nothing, ("optimize", "absent.onnx"), 3, "absent.onnx does not exist"),
    (_nothing, ("optimize", "."), 3, "folder"),
    (_text, ("optimize", "model.onnx"), 3, "model.onnx"),
    (_write("empty.onnx", ""), ("optimize", "empty.onnx"), 3, "empty"),
    (_truncated, ("optimize", "model.onnx"), 3, "model.onnx"),
    (_opset(99), ("optimize", "model.onnx", *DATA), 3, "opset"),
    (_opset(1), ("optimize", "model.onnx", *DATA), 3, "Relu(1)"),
    (_custom_operator, ("optimize", "model.onnx", *DATA), 3, "Sparkle"),
    (_external_data_outside, ("optimize", "model.onnx"), 3, "../../../etc/passwd"),
    (_external_data_outside, ("inspect", "model.onnx"), 3, "../../../etc/passwd"),
    (_text, ("inspect", "model.onnx"), 3, "model.onnx"),
    (_text, ("bench", "model.onnx"), 3, "model.onnx"),
    (_nothing, ("verify", "model.onnx", "absent.onnx"), 3, "absent.onnx does not exist"),
    (_nothing, ("optimize", "model.onnx", "--calib", "absent.npz"), 3, "absent.npz"),
    (_samples(picture=_image(20, 1, 8, 8)), ("optimize", "model.onnx", *DATA), 3, "'image'"),
    (_samples(image=_image(20, 1, 8, 8).astype("str")), ("optimize", "model.onnx", *DATA), 3, "image"),
    (_samples(image=_image(20, 64)), ("optimize", "model.onnx", *DATA), 3, "image"),
    (_samples(image=_image(20, 1, 9, 8)), ("optimize", "model.onnx", *DATA), 3, "9"),
    (_samples(image=_image(0, 1, 8, 8)), ("optimize", "model.onnx", *DATA), 3, "data.npz"),
    (lambda f: (f / "empty").mkdir(), ("optimize", "model.onnx", "--calib", "empty"), 3, "empty"),
    (_with_nan, ("optimize", "model.onnx", *DATA), 3, "nan in row 7"),
    (_write("data.npz", "no zip"), ("optimize", "model.onnx", *DATA), 3, "data.npz"),
    (_nothing, ("optimize", "model.onnx", "--calib", "nowhere:samples"), 2, "nowhere"),
]
OUTPUT = [
    (_write("out.onnx", "mine"), ("optimize", "model.onnx", "-o", "out.onnx"), 2, "--force"),
    (_write("model.opt.onnx", "mine"), ("optimize", "model.onnx"), 2, "--force"),
    (_write("out.json", "mine"), ("optimize", "model.onnx", "--json", "out.json"), 2, "--force"),
    (_write("out.json", "mine"), ("inspect", "model.onnx", "--json", "out.json"), 2, "--force"),
    (_nothing, ("optimize", "model.onnx", "-o", "model.onnx", "--force"), 2, "is the input itself"),
    (_nothing, ("optimize", "model.onnx", "-o", "./x/../model.onnx", "--force"), 3, "does not exist"),
    (_nothing, ("optimize", "model.onnx", "-o", "absent/out.onnx"), 3, "absent"),
    (_write("file", ""), ("optimize", "model.onnx", "-o", "file/out.onnx"), 3, "file"),
    (_nothing, ("optimize", "model.onnx", "-o", "."), 2, "folder"),
    (_nothing, ("optimize", "model.onnx", "--json", "absent/out.json"), 3, "absent"),
    (_nothing, ("optimize", "model.onnx", "-o", "x", "--json", "./x", "--force"), 2, "another name"),
    (_nothing, ("bench", "model.onnx", "--data", "data.npz", "--json", "data.npz", "--force"), 2, "is an input"),
]
USAGE = [
    (_nothing, (), 2, "give a command"),
    (_nothing, ("optimise", "model.onnx"), 2, "did you mean 'optimize'?"),
    (_nothing, ("optimize",), 2, "MODEL"),
    (_nothing, ("optimize", "model.onnx", "--clib", "x"), 2, "did you mean '--calib'?"),
    (_nothing, ("optimize", "model.onnx", "--calib"), 2, "--calib"),
    (_nothing, ("optimize", "model.onnx", "--goal", "sise"), 2, "did you mean 'size'?"),
    (_nothing, ("optimize", "model.onnx", "--target", "gpu"), 2, "cuda"),
    (_nothing, ("optimize", "model.onnx", "--max-drop", "much"), 2, "max_drop"),
    (_nothing, ("optimize", "model.onnx", "--size", "0.5x"), 2, "size"),
    (_nothing, ("optimize", "model.onnx", "--samples", "0"), 2, "samples"),
    (_nothing, ("optimize", "model.onnx", "--samples", "few"), 2, "few"),
    (_nothing, ("optimize", "model.onnx", "--seed", "-1"), 2, "seed"),
    (_nothing, ("optimize", "model.onnx", "--memory", "much"), 2, "memory"),
    (_nothing, ("optimize", "model.onnx", "--bench-seconds", "-1"), 2, "bench_seconds"),
    (_nothing, ("optimize", "model.onnx", "--bench-seconds", "nan"), 2, "bench_seconds"),
    (_nothing, ("optimize", "model.onnx", "--passes", "clenup"), 2, "did you mean 'cleanup'?"),
    (_nothing, ("optimize", "model.onnx", "--passes", "quantize"), 2, "--calib"),
    (_nothing, ("optimize", "model.onnx", *DATA, "--passes", "quantize:rangs=mse"), 2, "'ranges'"),
    (_nothing, ("optimize", "model.onnx", *DATA, "--passes", "quantize:ranges=best"), 2, "minmax"),
    (_nothing, ("optimize", "model.onnx", *DATA, "--passes", "quantize,fuse"), 2, "must come after 'fuse'"),
    (_nothing, ("optimize", "model.onnx", "--recipe", "absent.toml"), 2, "absent.toml"),
    (_write("r.toml", "passes = "), ("optimize", "model.onnx", "--recipe", "r.toml"), 2, "not valid TOML"),
    (_write("r.toml", "gaol = 'size'"), ("optimize", "model.onnx", "--recipe", "r.toml"), 2, "'goal'?"),
    (_write("r.toml", "verify = 'no'"), ("optimize", "model.onnx", "--recipe", "r.toml"), 2, "true or false"),
    (_write("r.toml", "json = 5"), ("optimize", "model.onnx", "--recipe", "r.toml"), 2, "json"),
    (_write("r.toml", "passes = 5"), ("optimize", "model.onnx", "--recipe", "r.toml"), 2, "passes"),
    (_write("r.toml", "passes = [5]"), ("optimize", "model.onnx", "--recipe", "r.toml"), 2, "5"),
    (_write("r.toml", "calib = 5"), ("optimize", "model.onnx", "--recipe", "r.toml"), 2, "data cannot be"),
    (_nothing, ("optimize", "model.onnx", "--speed", "2x", "--bench-seconds", "0"), 2, "bench_seconds"),
    (_write("r.toml", "samples = 'all'"), ("optimize", "model.onnx", "--recipe", "r.toml"), 2, "samples"),
    (_nothing, ("optimize", "model.onnx", *DATA, "--preprocess", "imagenet"), 2, "picture"),
    (_nothing, ("optimize", "model.onnx", *DATA, "--metric", "nowhere:score"), 2, "nowhere"),
    (_nothing, ("verify", "model.onnx"), 2, "CANDIDATE"),
    (_nothing, ("verify", "model.onnx", "model.onnx", "--max-drop", "2"), 2, "max_drop"),
    (_nothing, ("verify", "model.onnx", "model.onnx", "--data", "data.npz", "--samples", "0"), 2, "samples"),
    (_nothing, ("bench",), 2, "MODEL"),
    (_nothing, ("bench", "model.onnx", "--seconds", "0"), 2, "seconds"),
    (_nothing, ("bench", "model.onnx", "--batch", "0"), 2, "batch"),
    (_nothing, ("bench", "model.onnx", "--batch", "1,1"), 2, "different"),
    (_nothing, ("bench", "model.onnx", "--threads", "1,many"), 2, "threads"),
    (_nothing, ("bench", "model.onnx", "--streams", "0"), 2, "streams"),
    (_nothing, ("bench", "model.onnx", "--precision", "much"), 2, "precision"),
    (_nothing, ("bench", "model.onnx", "--provider", "cpu,,cuda"), 2, "provider"),
    (_nothing, ("bench", "model.onnx", "--shape", "imge=1x1x8x8"), 2, "did you mean 'image'?"),
    (_nothing, ("bench", "model.onnx", "--shape", "image=1x3x8x8"), 2, "[1, 3, 8, 8]"),
    (_nothing, ("bench", "model.onnx", "--shape", "image=1xbig"), 2, "image=1xbig"),
    (_nothing, ("bench", "model.onnx", "--data", "data.npz", "--shape", "1x1x8x8"), 2, "made up"),
    (_other_input, ("bench", "model.onnx", "other.onnx"), 3, "other.onnx takes 'picture' (float)"),
    (_nothing, ("bench", "--json", "model.onnx"), 2, "looks like a model"),
    (_nothing, ("bench", "model.onnx", "--provider", "abacus"), 2, "abacus"),
    (_nothing, ("inspect",), 2, "MODEL"),
    (_nothing, ("passes", "quantise"), 2, "did you mean 'quantize'?"),
    (_nothing, ("doctor", "--provider", "cpu"), 2, "no option '--provider'"),
    (_nothing, ("bench", "model.onnx", "--provider", "FooExecutionProvider"), 6, "FooExecutionProvider"),
]


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("prepare", "words", "code", "expected"),
    [pytest.param(*case, id=" ".join(case[1]) or "nothing") for case in MODEL_AND_DATA + OUTPUT + USAGE],
)
def test_bad_input_is_explained_and_nothing_is_written(cli, workshop, prepare, words, code, expected):
    prepare(workshop)
    before = _contents(workshop)
    quick = ("--bench-seconds", "0") if words[:1] == ("optimize",) and "--bench-seconds" not in words else ()

    ran = cli(*words, *quick, *(("-q",) if words else ()))

    assert (ran.code, ran.out) == (code, ""), ran.err
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert expected in ran.err
    assert len(ran.err) < 500
    assert _contents(workshop) == before


@pytest.mark.parametrize("target", ["cuda", "tensorrt"])
def test_a_target_that_is_not_installed_gives_6(cli, workshop, target):
    import onnxruntime

    if len(onnxruntime.get_available_providers()) > 2:
        pytest.skip("this build of ONNX Runtime has more than the CPU")

    ran = cli("optimize", "model.onnx", "--target", target)

    assert ran.code == 6
    assert "pip install onnxruntime-gpu" in ran.err


def test_verbose_shows_where_an_error_came_from(cli, workshop):
    ran = cli("inspect", "absent.onnx", "-v")

    assert ran.code == 3
    assert "Traceback" in ran.err
    assert "error: " in ran.err.splitlines()[-1]


# --- what nobody expected ---


def _raise(error: BaseException):
    def command(args, progress):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "traceback"),
    [
        (KeyboardInterrupt(), 130, False),
        (MemoryError(), 8, False),
        (OSError(errno.ENOSPC, "No space left on device"), 8, False),
        (ZeroDivisionError("one by none"), 1, True),
    ],
)
def test_exits_that_are_no_error_of_ours(cli, monkeypatch, error, code, traceback):
    from onnxcomp.cli_commands import COMMANDS

    monkeypatch.setitem(COMMANDS, "doctor", _raise(error))

    ran = cli("doctor", "-q")

    assert (ran.code, ran.out) == (code, "")
    assert ("Traceback" in ran.err) == traceback
    assert ran.err.splitlines()[-1].startswith("error: ")


def test_a_bug_says_how_to_report_it(cli, monkeypatch):
    from onnxcomp.cli_commands import COMMANDS
    from onnxcomp.errors import OnnxcompError

    monkeypatch.setitem(COMMANDS, "doctor", _raise(OnnxcompError("pass 'fuse' failed: KeyError: 'x'")))

    ran = cli("doctor", "-q")

    assert ran.code == 1
    assert "pass 'fuse' failed" in ran.err
    assert "please report it" in ran.err


def test_a_failing_verification_leaves_nothing_at_the_output(cli, workshop, monkeypatch):
    from onnxcomp.errors import VerificationError

    def fail(job):
        raise VerificationError("output 'scores' differs")

    monkeypatch.setattr("onnxcomp.job.Job.verify_result", fail)

    ran = cli("optimize", "model.onnx", "--bench-seconds", "0", "-o", "out.onnx", "-q")

    assert ran.code == 4
    assert sorted(p.name for p in workshop.iterdir()) == ["data.npz", "model.onnx"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_optimize_leaves_no_file_and_no_process(workshop, number):
    command = [sys.executable, "-m", "onnxcomp", "optimize", "model.onnx", *DATA, "--bench-seconds", "60"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("timing"):
                break
        children: list[psutil.Process] = []
        deadline = time.monotonic() + 20
        while not children and time.monotonic() < deadline:
            time.sleep(0.05)
            children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        rest = process.stderr.read()

    assert children
    assert not [child for child in children if child.is_running()]
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in rest
    assert sorted(p.name for p in workshop.iterdir()) == ["data.npz", "model.onnx"]
