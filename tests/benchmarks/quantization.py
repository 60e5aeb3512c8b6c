"""Static int8 against ONNX Runtime's own quantizer: closeness, size, and speed in one interleaved run.

    python tests/benchmarks/quantization.py [--zoo ../shared/zoo] [MODEL ...]

For each model: the original, `onnxruntime.quantization.quantize_static` at its best setting (quant_pre_process, opset
13 or newer, Q/DQ, u8 activations, s8 per-channel weights; MinMax and Percentile), and onnxcomp's default pipeline, all
calibrated on the same samples. One thread. Agreement and SQNR are against the original on the evaluation data.
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
import zoo

import onnxcomp
from onnxcomp.calibration.data import open_data
from onnxcomp.runtime import open_session

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
            compare(name, args.zoo, Path(folder), args.seconds)


def compare(name: str, folder_of_zoo: Path, folder: Path, seconds: float) -> None:
    """Print one line per tool."""
    model = folder_of_zoo / "models" / f"{name}.onnx"
    calib, evaluation = (str(zoo.feeds(folder_of_zoo / "feeds", name, part)) for part in ("calib", "eval"))
    made = {"onnxcomp": folder / "onnxcomp.onnx"}
    onnxcomp.optimize(model, made["onnxcomp"], calib=calib, eval=evaluation, samples=_SAMPLES, bench_seconds=1.0)
    for method in ("MinMax", "Percentile"):
        with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
            made[f"ORT {method}"] = runtime_quantizer(model, calib, folder, method)
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


def runtime_quantizer(model: Path, calib: str, folder: Path, method: str) -> Path:
    """The file that ONNX Runtime's quantizer makes of a model with a method of calibration. Raises what it raises."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.disable(logging.WARNING)
    upgraded, prepared, output = folder / "up.onnx", folder / "pre.onnx", folder / f"{method}.onnx"
    proto = onnx.load(model)
    if proto.opset_import[0].version < 13:
        proto = onnx.version_converter.convert_version(proto, 13)
    onnx.save(proto, upgraded)
    quant_pre_process(str(upgraded), str(prepared))
    quantize_static(
        str(prepared),
        str(output),
        _Reader(str(prepared), calib),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, method),
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
