"""Nodes left and seconds of the lossless pipeline against OnnxSlim, onnxsim and onnxscript's optimizer.

    python tests/benchmarks/lossless.py [--peers PYTHON] [--models FOLDER] [--only NAME]

Each tool loads, optimizes and saves in a process of its own; the time does not include its imports. `--peers` is the
Python in which the peers are installed; a tool that is not there is skipped. Nodes are those of all graphs without
Constant nodes. A result is marked where it differs from the original in interface or outputs (tolerance 1e-3).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("onnxcomp", "onnxslim", "onnxsim", "onnxscript")
PIPELINE = "cleanup,fold-constants,cleanup,fuse,cleanup,fuse-attention"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default=sys.executable)
    parser.add_argument("--models", type=Path, default=ROOT.parent / "shared" / "zoo" / "models")
    parser.add_argument("--only", default="")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'model':38s} {'nodes':>6s} | " + " | ".join(f"{t:>16s}" for t in TOOLS))
        for path in models(arguments, Path(folder)):
            cells = [measure(t, path, Path(folder) / f"{t}.onnx", arguments) for t in TOOLS]
            print(f"{path.stem:38s} {nodes(path):6d} | " + " | ".join(f"{c:>16s}" for c in cells), flush=True)


def models(arguments: Any, folder: Path) -> Any:
    """The zoo's models, then the exported ones."""
    if arguments.models.is_dir():
        yield from (p for p in sorted(arguments.models.glob("*.onnx")) if arguments.only in p.stem)
    for name in ("resnet50", "bert", "vit"):
        path = folder / f"exported_{name}.onnx"
        if arguments.only in path.stem:
            code = (
                f"from architectures import export; from pathlib import Path; export({name!r}, Path({str(path)!r}), 17)"
            )
            subprocess.run(
                [sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parent, check=True, capture_output=True
            )
            yield path


def measure(tool: str, source: Path, target: Path, arguments: Any) -> str:
    """One cell of the table: nodes, seconds (best of some runs), and what is wrong."""
    python = sys.executable if tool == "onnxcomp" else arguments.peers
    seconds = []
    for _ in range(arguments.runs):
        command = [python, "-W", "ignore", __file__, "--child", tool, str(source), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        if done.returncode == 42:
            return "-"
        if done.returncode:
            return "crash"
        seconds.append(json.loads(done.stdout.splitlines()[-1]))
    return f"{nodes(target)} {min(seconds):.2f}s{wrong(source, target)}"


def child(tool: str, source: str, target: str) -> None:
    """Optimize one file with one tool and print the seconds."""
    try:
        optimize = globals()[f"_{tool}"]()
    except ImportError:
        sys.exit(42)
    begin = time.perf_counter()
    optimize(source, target)
    print("\n" + json.dumps(time.perf_counter() - begin))


def _onnxcomp() -> Any:
    sys.path.insert(0, str(ROOT))
    from onnxcomp.io import load, save
    from onnxcomp.manager import Context, Pipeline
    from onnxcomp.passes import cleanup, fold_constants, fuse, fuse_attention  # noqa: F401 - imports are not what is measured

    def optimize(source: str, target: str) -> None:
        model = load(source)
        Pipeline.parse(PIPELINE).run(model, Context())
        save(model, target, overwrite=True)

    return optimize


def _onnxslim() -> Any:
    import onnxslim

    return lambda source, target: onnxslim.slim(source, target)


def _onnxsim() -> Any:
    import onnx
    import onnxsim

    return lambda source, target: onnx.save(onnxsim.simplify(onnx.load(source))[0], target)


def _onnxscript() -> Any:
    import onnx_ir
    from onnxscript import optimizer

    def optimize(source: str, target: str) -> None:
        model = onnx_ir.load(source)
        optimizer.optimize(model)
        onnx_ir.save(model, target)

    return optimize


def nodes(path: Path) -> int:
    import onnx

    found = [onnx.load(path, load_external_data=False).graph]
    for graph in found:
        for attribute in (a for node in graph.node for a in node.attribute):
            found.extend([attribute.g] if attribute.HasField("g") else attribute.graphs)
    return sum(node.op_type != "Constant" for graph in found for node in graph.node)


def wrong(source: Path, target: Path) -> str:
    """Marks: I interface, O outputs, ! does not run."""
    import numpy as np
    import onnx

    sys.path.insert(0, str(ROOT))
    from onnxcomp.runtime import open_session
    from tests.conformance import interface, unequal

    before, after = (onnx.load(p, load_external_data=False) for p in (source, target))
    mark = "" if interface(before) == interface(after) else " I"
    random = np.random.default_rng(0)
    try:
        session = open_session(str(source), optimize=False)
        feeds = {i.name: _feed(i, random) for i in session.inputs}
        expected = session.run(feeds)
    except Exception:  # no synthesized input suits every model
        return mark + " ?"
    try:
        found = open_session(str(target), optimize=False).run(feeds)
    except Exception:  # the mark says it
        return mark + " !"
    return mark + (" O" if any(unequal(a, b, 1e-3) for a, b in zip(expected, found, strict=True)) else "")


def _feed(spec: Any, random: Any) -> Any:
    shape = [d if isinstance(d, int) and d > 0 else 2 if k == 0 else 64 for k, d in enumerate(spec.shape)]
    if spec.dtype.kind in "iu":
        return random.integers(0, 2, shape).astype(spec.dtype)
    return random.random(shape).astype(spec.dtype)


if __name__ == "__main__":
    main()
