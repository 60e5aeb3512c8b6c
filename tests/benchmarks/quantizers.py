"""Static int8 by other tools, each at the setting that is most accurate among those that run fast on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxcomp.calibration.data import open_data
from onnxcomp.runtime import open_session

__all__ = ["QUANTIZERS", "batches"]

Feeds = dict[str, np.ndarray]
Data = Callable[[], Iterator[Feeds]]


def batches(model: Path, calib: str, samples: int) -> Iterator[Feeds]:
    """The calibration samples in batches, as onnxcomp reads them."""
    for batch in open_data(calib, open_session(model).inputs).batches(samples):
        yield dict(batch.feeds)


def _runtime(model: Path, output: Path, data: Data, *, linear_only: bool, method: str) -> None:
    """`quantize_static`: opset 13 or newer, quant_pre_process, Q/DQ, u8 activations, s8 weights per channel."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.disable(logging.WARNING)
    prepared = str(output.with_suffix(".prepared.onnx"))
    upgraded = _upgraded(model, output)
    try:
        quant_pre_process(upgraded, prepared)
    except Exception:  # its symbolic shapes do not cover every graph
        quant_pre_process(upgraded, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        str(output),
        _Reader(data),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, method),
        op_types_to_quantize=["Conv", "MatMul", "Gemm"] if linear_only else None,
    )


def _nncf(model: Path, output: Path, data: Data, *, linear_only: bool) -> None:
    import nncf

    items = list(data())
    proto = onnx.load(_upgraded(model, output))
    kind = nncf.ModelType.TRANSFORMER if any(n.op_type == "Softmax" for n in proto.graph.node[:-2]) else None
    found = nncf.quantize(
        proto, nncf.Dataset(items), preset=nncf.QuantizationPreset.MIXED, subset_size=len(items), model_type=kind
    )
    onnx.save(found, output)


def _quark(model: Path, output: Path, data: Data, *, linear_only: bool) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType
    from quark.onnx import ModelQuantizer, QuantizationConfig
    from quark.onnx.quantization.config import Config

    config = QuantizationConfig(
        calibrate_method=CalibrationMethod.MinMax,
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"] if linear_only else None,
    )
    quantizer = ModelQuantizer(Config(global_quant_config=config))
    quantizer.quantize_model(_upgraded(model, output), str(output), _Reader(data))


def _upgraded(model: Path, output: Path) -> str:
    path = output.with_suffix(".upgraded.onnx")
    proto = onnx.load(model)
    if proto.opset_import[0].version < 13:
        proto = onnx.version_converter.convert_version(proto, 13)
    onnx.save(proto, path)
    return str(path)


class _Reader:
    """What ONNX Runtime and Quark read samples from."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self.rewind()

    def rewind(self) -> None:
        self._batches = self._data()

    def get_next(self) -> Feeds | None:
        return next(self._batches, None)


QUANTIZERS: dict[str, Any] = {
    "ORT MinMax": partial(_runtime, method="MinMax"),
    "ORT Percentile": partial(_runtime, method="Percentile"),
    "NNCF": _nncf,
    "Quark": _quark,
}
