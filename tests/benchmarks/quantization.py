"""Static int8 against ONNX Runtime's own quantizer: closeness, size, and speed in one interleaved run.

    python tests/benchmarks/quantization.py [--zoo ../shared/zoo] [MODEL ...]

For each model: the original, `onnxruntime.quantization.quantize_static` at its best setting (quant_pre_process, opset
13 or newer, Q/DQ, u8 activations, s8 per-channel weights; MinMax and Percentile), and onnxcomp's default pipeline, all
calibrated on the same samples. One thread. Agreement and SQNR are against the original on the evaluation data.
Models are those of the zoo, and exports with random weights (resnet50, mobilenet_v2, bert, vit; need torch) on 64
made-up samples, where ONNX Runtime quantizes linear operators only: with its default it is far from the original.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import onnxcomp
from onnxcomp.calibration.data import open_data
from onnxcomp.runtime import open_session

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
    for method in ("MinMax", "Percentile"):
        with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
            made[f"ORT {method}"] = _runtime_quantizer(model, calib, folder, method, linear_only=name in _EXPORTS)
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


def _runtime_quantizer(model: Path, calib: str, folder: Path, method: str, *, linear_only: bool) -> Path:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.disable(logging.WARNING)
    upgraded, prepared, output = folder / "up.onnx", folder / "pre.onnx", folder / f"{method}.onnx"
    proto = onnx.load(model)
    if proto.opset_import[0].version < 13:
        proto = onnx.version_converter.convert_version(proto, 13)
    onnx.save(proto, upgraded)
    try:
        quant_pre_process(str(upgraded), str(prepared))
    except Exception:  # its symbolic shapes do not cover every graph
        quant_pre_process(str(upgraded), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(output),
        _Reader(str(prepared), calib),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, method),
        op_types_to_quantize=["Conv", "MatMul", "Gemm"] if linear_only else None,
    )
    return output


class _Reader:
    """ONNX Runtime's calibration reader over the same samples."""

    def __init__(self, model: str, calib: str) -> None:
        self._data = open_data(calib, open_session(model).inputs)
        self.rewind()

    def rewind(self) -> None:
        self._batches: Iterator[Any] = self._data.batches(_SAMPLES)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else batch.feeds


if __name__ == "__main__":
    main()
