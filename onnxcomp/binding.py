"""Runs with inputs and outputs in the memory of a device, and what copying them there and back takes.

`session.run` copies inputs in and outputs out; on a GPU that can take longer than the model. Bound to the device, a run
is the model alone (onnxruntime.ai, "I/O Binding"). ONNX Runtime binds tensors of numbers only.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.providers import CUDA, TENSORRT
from onnxcomp.runtime import Session, device_value

__all__ = ["DEVICES", "Bound", "can_bind"]

DEVICES = {CUDA: "cuda", TENSORRT: "cuda", "NvTensorRTRTXExecutionProvider": "cuda", "DmlExecutionProvider": "dml"}
_COPIES = 20


def can_bind(session: Session) -> bool:
    """Whether all inputs and outputs are tensors of numbers, of types that numpy has."""
    return all(s.dtype is not None and s.dtype.kind in "biuf" for s in (*session.inputs, *session.outputs))


class Bound:
    """A session with one set of inputs on `device` ("cuda", "dml", "cpu"); calling it runs the model there."""

    def __init__(self, session: Session, feeds: Mapping[str, npt.NDArray[Any]], device: str) -> None:
        self._run = session.native.run_with_iobinding
        self._binding = session.native.io_binding()
        self._values: list[tuple[Any, npt.NDArray[Any]]] = []
        for name, given in feeds.items():
            array = np.ascontiguousarray(given)
            value = device_value(array, device)
            self._values.append((value, array))
            self._binding.bind_ortvalue_input(name, value)
        for spec in session.outputs:
            self._binding.bind_output(spec.name, device)

    def __call__(self) -> None:
        """One run, over when its outputs are there."""
        self._run(self._binding)
        self._binding.synchronize_outputs()

    def outputs(self) -> list[Any]:
        """What the last run gave, in the memory of the host."""
        return list(self._binding.copy_outputs_to_cpu())

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
            self.outputs()
            times[:, i] = between - begin, perf_counter_ns() - between
        into, out = np.median(times, axis=1)
        return int(into), int(out)
