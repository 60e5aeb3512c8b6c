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
from quantizers import QUANTIZERS, batches

import onnxcomp

_SHARED = {
    "resnet20_cifar10": "cifar_nchw",
    "resnet56_cifar10": "cifar_nchw",
    "mlperf_pretrainedResnet_large_float": "cifar_nhwc",
}
_EXPORTS = ("resnet50", "mobilenet_v2", "bert", "vit")
_SAMPLES = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["resnet20_cifar10", "resnet56_cifar10"])
    parser.add_argument("--zoo", type=Path, default=Path(__file__).parents[3] / "shared" / "zoo")
    parser.add_argument("--seconds", type=float, default=20.0)
    args = parser.parse_args()
    print(f"{'model':36s} {'tool':12s} {'agree %':>8s} {'SQNR dB':>8s} {'file':>6s}  speed-up (95 %)")
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            model, feeds = args.zoo / "models" / f"{name}.onnx", args.zoo / "feeds" / _SHARED.get(name, name)
            if name in _EXPORTS:
                model, feeds = exported(name, Path(folder))
            compare(name, model, f"{feeds}.calib.npz", f"{feeds}.eval.npz", Path(folder), args.seconds)


def exported(name: str, folder: Path) -> tuple[Path, Path]:
    """An export with random weights, and where its data are."""
    from architectures import export, feeds

    model = folder / f"{name}.onnx"
    export(name, model, 17, folded=True)
    np.savez(folder / f"{name}.calib.npz", **feeds(name, 64))
    np.savez(folder / f"{name}.eval.npz", **feeds(name, 32, seed=2))
    return model, folder / name


def compare(name: str, model: Path, calib: str, evaluation: str, folder: Path, seconds: float) -> None:
    """Print one line per tool."""
    made = {"onnxcomp": folder / "onnxcomp.onnx"}
    budget = 1.0 if name in _EXPORTS else 0.01  # classes of random weights are nearly tied
    options = {"samples": _SAMPLES, "bench_seconds": 1.0, "max_drop": budget}
    onnxcomp.optimize(model, made["onnxcomp"], calib=calib, eval=evaluation, **options)
    for tool, quantizer in QUANTIZERS.items():
        with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
            made[tool] = folder / f"{tool}.onnx"
            quantizer(model, made[tool], lambda: batches(model, calib, _SAMPLES), linear_only=name in _EXPORTS)
    tools = [t for t, path in made.items() if path.exists()]
    timed = onnxcomp.benchmark(model, *(made[t] for t in tools), data=evaluation, seconds=seconds)
    for tool, row in zip(tools, timed.models[1:], strict=True):
        found = onnxcomp.verify(model, made[tool], evaluation, max_drop=1.0)
        stats = next(iter(found.outputs.values()), None)
        if stats is None:
            print(f"{name:36s} {tool:12s} cannot be compared: {found.reasons[0]}", flush=True)
            continue
        agree = "-" if stats.classes is None else f"{100 * stats.classes.top1 / stats.classes.rows:.2f}"
        ratio = row.file_bytes / timed.models[0].file_bytes
        sqnr = -10 * np.log10(max(stats.errors.noise_ratio, 1e-30))
        assert row.ci is not None
        interval = f"{row.speedup:.2f} ({row.ci[0]:.2f} to {row.ci[1]:.2f})"
        print(f"{name:36s} {tool:12s} {agree:>8s} {sqnr:8.1f} {ratio:6.3f}  {interval}", flush=True)


if __name__ == "__main__":
    main()
