"""`--goal size`: how small a file gets within a drop, against int8, archives, and onnxsim's k-means.

    python tests/benchmarks/smallest.py [--zoo FOLDER] [--feeds FOLDER ...] [--drops 1%,0.5%] [--peers PYTHON] [MODEL]

All ratios are bytes of the original file / bytes of the other file. `run` is the time of the original / that of the
small file, with its interval; `drop` is on evaluation samples disjoint from the calibration samples (with labels:
top-1; classifiers without: changed classes; else noise / signal of the worst output). Beside it:

    int8       ONNX Runtime's quantize_static at its best setting (quantizers.py), - where it fails
    zip        the original file in an archive (deflate, level 9), which no runtime reads
    int8 zip   the int8 file in one
    k-means    onnxsim.quantize_weight_only_kmeans (16 values for each MatMul and Gemm, stored as float32), by a Python
               that has onnxsim

`--feeds` are folders with NAME.calib.npz and NAME.eval.npz for models that the zoo has no feeds for.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zoo
from quantizers import QUANTIZERS, batches

import onnxcomp

_PEER = """
import sys, onnx
from onnxsim.kmeans_quantization import quantize_weight_only_kmeans
onnx.save(quantize_weight_only_kmeans(onnx.load(sys.argv[1])), sys.argv[2])
"""
_HEAD = ("model", "parameters", "drop", "bytes", "run (95 %)", "int8", "zip", "int8 zip", "k-means", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--zoo", type=Path, default=zoo.FOLDER)
    parser.add_argument("--feeds", type=Path, nargs="*", default=[])
    parser.add_argument("--drops", default="1%,0.5%")
    parser.add_argument("--peers", default="")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each timing")
    arguments = parser.parse_args()
    print(" | ".join(_HEAD), flush=True)
    for path in sorted((arguments.zoo / "models").glob("*.onnx")):
        data = _data(path.stem, [arguments.zoo / "feeds", *arguments.feeds])
        if data is not None and (not arguments.models or path.stem in arguments.models):
            with tempfile.TemporaryDirectory() as folder:
                compare(path, data, Path(folder), arguments)


def _data(name: str, folders: Sequence[Path]) -> tuple[Path, Path] | None:
    """Calibration and evaluation samples, None if there are none."""
    for folder in folders:
        calib, evaluation = (zoo.feeds(folder, name, part) for part in ("calib", "eval"))
        if calib.exists() and evaluation.exists():
            return calib, evaluation
    return None


def compare(model: Path, data: tuple[Path, Path], folder: Path, arguments: Any) -> None:
    """Print a line per drop."""
    others = _others(model, str(data[0]), folder, arguments.peers)
    for drop in arguments.drops.split(","):
        report = onnxcomp.optimize(
            model, folder / f"small{drop}.onnx", calib=data[0], eval=data[1], goal="size", max_drop=drop,
            bench_seconds=arguments.seconds,
        )  # fmt: skip
        quality = None if report.verification is None else report.verification.quality
        timed = None if report.benchmark is None else report.benchmark.models[1]
        run = "-"
        if timed is not None and timed.ci is not None:
            run = f"{timed.speedup:.2f} ({timed.ci[0]:.2f} to {timed.ci[1]:.2f})"
        row = (
            model.stem,
            f"{report.original['parameters']}",
            f"{drop} -> {100 * quality.drop:.2f} %" if quality is not None else "-",
            _ratio(model, report.optimized["file_bytes"]),
            run,
            *others,
            f"{report.seconds:.0f}",
        )
        print(" | ".join(row), flush=True)


def _others(model: Path, calib: str, folder: Path, peers: str) -> tuple[str, ...]:
    """Ratios of int8, zip, zipped int8, and onnxsim's k-means."""
    int8 = folder / "int8.onnx"
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        QUANTIZERS["ORT MinMax"](model, int8, lambda: batches(model, calib, 512), linear_only=False)
    clustered = folder / "clustered.onnx"
    if peers:
        subprocess.run([peers, "-c", _PEER, str(model), str(clustered)], capture_output=True, check=False)
    return (
        _ratio(model, int8.stat().st_size) if int8.exists() else "-",
        _ratio(model, _zipped(model)),
        _ratio(model, _zipped(int8)) if int8.exists() else "-",
        _ratio(model, clustered.stat().st_size) if clustered.exists() else "-",
    )


def _zipped(path: Path) -> int:
    return len(zlib.compress(path.read_bytes(), 9))


def _ratio(model: Path, size: int) -> str:
    return f"{model.stat().st_size / size:.1f}x"


if __name__ == "__main__":
    sys.exit(main())
