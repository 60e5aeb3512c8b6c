"""Seconds and peak memory of editing one weight of a large model, against other tools and against copying the file.

    python tests/benchmarks/large_model.py [--gigabytes 2.3] [--sparse] [--python PYTHON_WITH_ONNXSLIM] [FOLDER]

The model has 23 MatMul weights of equal size in one external data file, filled with random bytes, so that no file
system stores holes; with `--sparse` the data file is one hole. Each tool runs in a process of its own, in turn with
`shutil.copyfile` of the data file, and writes with external data: onnxcomp and onnx set one weight to zero, OnnxSlim
has no way to edit and only loads and saves.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

ROOT = Path(__file__).resolve().parents[2]
LAYERS = 23
BLOCK = 1 << 24

MEASURE = """
import time
{imports}
begin = time.perf_counter()
{code}
seconds = time.perf_counter() - begin
peak = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(seconds, peak / 1024)
"""
TOOLS = {  # imports, which are not timed, and what is
    "shutil.copyfile": ("import shutil", "shutil.copyfile({data!r}, {target!r})"),
    "shutil.copyfile and fsync": (
        "import os, shutil",
        "shutil.copyfile({data!r}, {target!r}); os.fsync(os.open({target!r}, os.O_RDWR))",
    ),
    "onnxcomp": (
        "import numpy as np\nfrom onnxcomp.io import load, save",
        "model = load({source!r})\nweight = model.graph.initializers[3]\n"
        "weight.values = np.zeros(weight.shape, weight.dtype)\nsave(model, {target!r}, external_data=True)",
    ),
    "onnx": (
        "import numpy as np, onnx",
        "model = onnx.load({source!r})\nold = model.graph.initializer[3]\n"
        "old.CopyFrom(onnx.numpy_helper.from_array(np.zeros(tuple(old.dims), np.float32), old.name))\n"
        "onnx.save(model, {target!r}, save_as_external_data=True, location='target.data')",
    ),
    "onnxslim": ("import onnxslim", "onnxslim.slim({source!r}, {target!r}, save_as_external_data=True)"),
}


def make(folder: Path, gigabytes: float, *, sparse: bool = False) -> tuple[Path, Path]:
    """A chain of MatMul with `gigabytes` of weights in a data file, which is one hole if `sparse`."""
    width = int((gigabytes * 1e9 / LAYERS / 4) ** 0.5)
    nbytes = width * width * 4
    graph = helper.make_graph(
        [helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]) for i in range(LAYERS)],
        "chain",
        [helper.make_tensor_value_info("h0", TensorProto.FLOAT, [1, width])],
        [helper.make_tensor_value_info(f"h{LAYERS}", TensorProto.FLOAT, [1, width])],
    )
    for i in range(LAYERS):
        weight = graph.initializer.add(
            name=f"w{i}", data_type=TensorProto.FLOAT, dims=[width, width], data_location=TensorProto.EXTERNAL
        )
        for key, value in (("location", "source.data"), ("offset", i * nbytes), ("length", nbytes)):
            weight.external_data.add(key=key, value=str(value))
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])
    source, data = folder / "source.onnx", folder / "source.data"
    onnx.save(model, source)
    with data.open("wb") as file:
        if not sparse:
            rng = np.random.default_rng(0)
            block = (rng.integers(0, 1 << 23, BLOCK // 4, np.uint32) | 0x3C000000).tobytes()  # floats about 0.01
            for left in range(LAYERS * nbytes, 0, -BLOCK):
                file.write(block[: min(left, BLOCK)])
        file.truncate(LAYERS * nbytes)
    return source, data


def measure(python: str, imports: str, code: str) -> tuple[float, float]:
    """Seconds of some code and peak MiB of the process of its own that it runs in."""
    command = [python, "-c", MEASURE.format(imports=imports, code=code)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), float(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.3)
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the other tools")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="large-model-", dir=args.folder))
    try:
        source, data = make(folder, args.gigabytes, sparse=args.sparse)
        found: dict[str, list[tuple[float, float]]] = {}
        failed: dict[str, str] = {}
        for _ in range(args.rounds):
            for name in args.tools:
                imports, template = TOOLS[name]
                target = folder / "out" / "target.onnx"
                target.parent.mkdir()
                code = template.format(source=str(source), data=str(data), target=str(target))
                try:
                    found.setdefault(name, []).append(
                        measure(args.python if name == "onnxslim" else sys.executable, imports, code)
                    )
                except RuntimeError as error:
                    failed[name] = str(error)
                shutil.rmtree(target.parent)
                time.sleep(1)  # the disk may finish what it was given
        copying = float(np.median([seconds for seconds, _ in found["shutil.copyfile"]]))
        print(f"{data.stat().st_size / 1e9:.2f} GB, median of {args.rounds}")
        for name, runs in found.items():
            if runs:
                seconds, peak = np.median(runs, axis=0)
                print(f"{name:26s} {seconds:7.2f} s  {seconds / copying:5.2f} x copyfile  {peak:8.0f} MiB")
        for name, reason in failed.items():
            print(f"{name:26s} failed: {reason[:100]}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
