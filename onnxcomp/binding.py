"""Runs with inputs and outputs in the memory of a device, and what copying them there and back takes.

`session.run` copies inputs in and outputs out; on a GPU that can take longer than the model. Bound to the device, a run
is the model alone (onnxruntime.ai, "I/O Binding").
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.providers import CUDA, TENSORRT
from onnxcomp.runtime import Session, device_value

__all__ = ["DEVICES", "Bound"]

DEVICES = {CUDA: "cuda", TENSORRT: "cuda", "NvTensorRTRTXExecutionProvider": "cuda", "DmlExecutionProvider": "dml"}
_COPIES = 20


class Bound:
    """A session with one set of inputs on `device` ("cuda", "dml", "cpu"); calling it runs the model there."""

    def __init__(self, session: Session, feeds: Mapping[str, npt.NDArray[Any]], device: str) -> None:
        self._run = session.native.run_with_iobinding
        self._binding = session.native.io_binding()
        self._values: list[tuple[Any, npt.NDArray[Any]]] = []
        for name, given in feeds.items():
            array = np.ascontiguousarray(given)
            if array.dtype.kind in "biuf":
                value = device_value(array, device)
                self._values.append((value, array))
                self._binding.bind_ortvalue_input(name, value)
            else:  # text stays on the host
                self._binding.bind_cpu_input(name, array)
        for spec in session.outputs:
            self._binding.bind_output(spec.name, device if spec.dtype is not None and spec.dtype.kind != "O" else "cpu")

    def __call__(self) -> None:
        """One run, over when its outputs are there."""
        self._run(self._binding)
        self._binding.synchronize_outputs()

    def copy_ns(self) -> tuple[int, int]:
        """Median nanoseconds of copying the inputs in and the outputs out, after one run."""
        self()
        times = np.empty((2, _COPIES), np.int64)
        for i in range(_COPIES):
            begin = perf_counter_ns()
            for value, array in self._values:
                value.update_inplace(array)
            self._binding.synchronize_inputs()
            between = perf_counter_ns()
            self._binding.copy_outputs_to_cpu()
            times[:, i] = between - begin, perf_counter_ns() - between
        into, out = np.median(times, axis=1)
        return int(into), int(out)
