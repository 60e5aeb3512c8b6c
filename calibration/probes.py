"""Probes: what a histogram needs of an image map, computed in the graph, so that the map itself need not leave it.

ONNX Runtime keeps maps between convolutions in a blocked layout, and making a map an output costs a conversion and a
copy of all of it; on depthwise networks that alone doubles the time of inference. Pooling works on the blocked layout:

    MaxPool, kernel 1, stride s   every s-th row and column: a sample of positions, all channels
    GlobalMaxPool                 the exact maximum per channel
    ReduceMin                     the exact minimum, where values may be negative

So only small arrays come out. Values that cannot be negative (behind Relu and the like) get the minimum of the sample:
zero is in every range anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from onnxcomp.calibration.statistics import SAMPLE, TensorStatistics
from onnxcomp.graph import Model, producer
from onnxcomp.shapes import Shapes

__all__ = ["Probe", "attach", "find_probes"]

Array = npt.NDArray[Any]
_IMAGE_OPS = frozenset({"Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
_NON_NEGATIVE = frozenset({"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs"})
_KEEP_SIGN = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})

_LARGE = 1 << 18  # values of a map in one run: below, copying it costs less than probing


@dataclass(frozen=True)
class Probe:
    """The value that is probed, the step between sampled positions, and whether the minimum is computed as well."""

    name: str
    step: int
    signed: bool

    @property
    def outputs(self) -> list[str]:
        """Names of the graph outputs that it adds."""
        parts = ("sample", "maximum", "minimum") if self.signed else ("sample", "maximum")
        return [f"{self.name}/probe/{part}" for part in parts]

    def read(self, values: Iterable[Array], statistics: TensorStatistics) -> None:
        """Add one run's `outputs` to the statistics."""
        sample, maximum, *minimum = values
        if sample.size:
            lowest = minimum[0] if self.signed else sample.min()
            statistics.add_sample(sample, float(lowest), float(np.max(maximum)))


def find_probes(model: Model, names: Iterable[str], shapes: Shapes, part: float = 1.0) -> dict[str, Probe]:
    """Probes for those values of the main graph that are large float32 image maps.

    `shapes` are those of one batch, of which the share `part` goes into a run.
    """
    tensors = {o.name: o for node in model.graph.nodes for o in node.outputs}
    found = {}
    for name in names:
        tensor = tensors.get(name)
        if tensor is None or not _is_image(tensor):
            continue
        kind = shapes[tensor]
        size, shape = kind.size, kind.shape
        if kind.elem != TensorProto.FLOAT or size is None or shape is None or len(shape) != 4:
            continue
        step = 1 + 2 * int(np.sqrt(size * part / SAMPLE) / 2)  # odd: no power of two hides positions from it
        if size * part >= _LARGE and step < max(int(shape[2] or 0), int(shape[3] or 0)):
            found[name] = Probe(name, step, not _non_negative(model, tensor))
    return found


def attach(graph: onnx.GraphProto, probes: Mapping[str, Probe]) -> None:
    """Add the nodes and outputs of the probes to an exported graph."""
    for probe in probes.values():
        names = probe.outputs
        graph.node.append(
            helper.make_node("MaxPool", [probe.name], names[:1], kernel_shape=[1, 1], strides=[probe.step] * 2)
        )
        graph.node.append(helper.make_node("GlobalMaxPool", [probe.name], names[1:2]))
        if probe.signed:
            graph.node.append(helper.make_node("ReduceMin", [probe.name], names[2:], keepdims=0))
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)


def _is_image(tensor: Any) -> bool:
    """Whether an operator that knows channels from positions computes or reads the value: [N, C, H, W] for sure."""
    nodes = [producer(tensor), *(n for n in tensor.outputs if n.inputs and n.inputs[0] is tensor)]
    return any(n is not None and not n.domain and n.op in _IMAGE_OPS for n in nodes)


def _non_negative(model: Model, tensor: Any) -> bool:
    node = producer(tensor)
    while node is not None and not node.domain and node.op in _KEEP_SIGN:
        node = producer(node.inputs[0])
    if node is None or node.domain:
        return False
    if node.op == "Clip":
        low = model.value(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1].name else None
        return float(node.attrs.get("min", -1) if low is None else low.reshape(())) >= 0
    return node.op in _NON_NEGATIVE
