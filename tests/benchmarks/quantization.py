"""Static int8 against ONNX Runtime's own quantizer: closeness, size, and speed in one interleaved run.

    python tests/benchmarks/quantization.py [--zoo ../shared/zoo] [MODEL ...]

For each model: onnxcomp's default pipeline, ONNX Runtime's quantizer at its best settings, and NNCF and Quark where
they are installed (quantizers.py), all calibrated on the same samples. One thread. Agreement and SQNR are against the
original on the evaluation data. Models are those of the zoo, and exports with random weights (resnet50, mobilenet_v2,
bert, vit; need torch) on 64 made-up samples, where the others quantize linear operators only: with their default they
are far from the original.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

import numpy as np
import zoo
from quantizers import QUANTIZERS, batches

import onnxcomp
from onnxcomp.calibration.data import open_data
from onnxcomp.runtime import open_session

_EXPORTS = ("resnet50", "mobilenet_v2", "bert", "vit")
_SAMPLES = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["resnet20_cifar10", "resnet56_cifar10"])
    parser.add_argument("--zoo", type=Path, default=zoo.FOLDER)
    parser.add_argument("--seconds", type=float, default=20.0)
    args = parser.parse_args()
    print(f"{'model':36s} {'tool':12s} {'agree %':>8s} {'SQNR dB':>8s} {'file':>6s}  speed-up (95 %)")
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            model = args.zoo / "models" / f"{name}.onnx"
            calib, evaluation = (zoo.feeds(args.zoo / "feeds", name, part) for part in ("calib", "eval"))
            if name in _EXPORTS:
                model, calib, evaluation = exported(name, Path(folder))
            compare(name, model, str(calib), str(evaluation), Path(folder), args.seconds)


def exported(name: str, folder: Path) -> tuple[Path, Path, Path]:
    """An export with random weights, and data to calibrate and to evaluate."""
    from architectures import export, feeds

    model, calib, evaluation = folder / f"{name}.onnx", folder / "calib.npz", folder / "eval.npz"
    export(name, model, 17, folded=True)
    np.savez(calib, **feeds(name, 64))
    np.savez(evaluation, **feeds(name, 32, seed=2))
    return model, calib, evaluation


def compare(name: str, model: Path, calib: str, evaluation: str, folder: Path, seconds: float) -> None:
    """Print one line per tool."""
    made = {"onnxcomp": folder / "onnxcomp.onnx"}
    budget = 1.0 if name in _EXPORTS else 0.01  # classes of random weights are nearly tied
    options = {"samples": _SAMPLES, "bench_seconds": 1.0, "max_drop": budget}
    onnxcomp.optimize(model, made["onnxcomp"], calib=calib, eval=evaluation, **options)
    for tool, quantizer in QUANTIZERS.items():
        made[tool] = folder / f"{tool}.onnx"
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                quantizer(model, made[tool], lambda: batches(model, calib, _SAMPLES), linear_only=name in _EXPORTS)
        except Exception as error:
            print(f"{name:36s} {tool:14s} failed: {type(error).__name__}: {str(error)[:100]!r}", flush=True)
    tools = [t for t, path in made.items() if path.exists()]
    timed = onnxcomp.benchmark(model, *(made[t] for t in tools), data=evaluation, seconds=seconds)
    for tool, row in zip(tools, timed.models[1:], strict=True):
        agree, sqnr = closeness(model, made[tool], evaluation)
        ratio = row.file_bytes / timed.models[0].file_bytes
        assert row.ci is not None
        interval = f"{row.speedup:.2f} ({row.ci[0]:.2f} to {row.ci[1]:.2f})"
        print(f"{name:36s} {tool:12s} {agree:>8s} {sqnr:8.1f} {ratio:6.3f}  {interval}", flush=True)


def closeness(model: Path, made: Path, evaluation: str) -> tuple[str, float]:
    """Share of equal classes in percent, "-" without classes, and SQNR in dB, of the first output.

    Not by `onnxcomp verify`, as some tools rename dimensions, and a changed interface is no match there.
    """
    one, other = open_session(model), open_session(made)
    equal: list[bool] = []
    signal = noise = 0.0
    for batch in open_data(evaluation, one.inputs).batches():
        y, found = one.run(batch.feeds)[0].astype(np.float64), other.run(batch.feeds)[0]
        signal, noise = signal + float(np.square(y).sum()), noise + float(np.square(found - y).sum())
        equal += (y.argmax(-1) == found.argmax(-1)).tolist() if y.ndim == 2 and y.shape[1] > 1 else []
    agree = f"{100 * np.mean(equal):.2f}" if equal else "-"
    return agree, 10 * float(np.log10(signal / max(noise, 1e-30)))


if __name__ == "__main__":
    main()
