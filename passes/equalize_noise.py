"""What rounding adds to a group of channels that are scaled by factors, predicted from ranges and weights.

With t[c] what channel c is divided by, r[c] its largest magnitude and E x[c]^2 its power, 8 bits per value and 8 bits
per output channel of the weights W, the noise that a consumer passes on is about

    of its input      (max_c r[c] / t[c])^2 / (12 * 255^2) * sum_c t[c]^2 |W[., c]|^2
    of its weights    sum_o (max_c t[c] |W[o, c]|)^2 / (12 * 127^2) * sum_c n E x[c]^2 / t[c]^2

with n weights per input and output channel, relative to its output sum_c |W[., c]|^2 E x[c]^2. The factors that take
from the first add to the second (Xiao et al., arXiv:2211.10438, balance maxima instead). A sum passes its input on as
a consumer with W = 1 does, without noise of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.statistics import Channels, TensorStatistics
from onnxcomp.graph import Model
from onnxcomp.linear import Linear, linear
from onnxcomp.passes.channel_groups import Group

__all__ = ["best_strength"]

Array = npt.NDArray[np.float64]
_STRENGTHS = (0.0, 0.25, 0.5)  # beyond, narrow channels lose the room for values that the samples do not show
_COMPENSATED = 0.5  # of the noise of nearest rounding that second-order rounding of the weights leaves, about


def best_strength(model: Model, group: Group, seen: Mapping[str, TensorStatistics], spread: Array) -> float:
    """The exponent of the spread with the least noise, 0 where even channels gain nothing."""
    readers = list(_readers(model, group, seen))
    return min(_STRENGTHS, key=lambda s: sum(_noise(r, spread**s) for r in readers))


class _Reader:
    """What one consumer sees: channels `place` of the group, and the absolute weights [outputs, channels, n]."""

    def __init__(self, place: slice, channels: Channels, weights: Array | None) -> None:
        self.place = place
        self.peak = channels.peak
        self.power = np.maximum(channels.squares / max(channels.count, 1), 1e-30)
        self.squares = np.ones(len(self.peak)) if weights is None else np.square(weights).sum(axis=(0, 2))
        self.largest = None if weights is None else weights.max(axis=2)
        self.entries = 0 if weights is None else weights.shape[2]


def _noise(reader: _Reader, factor: Array) -> float:
    t = factor[reader.place]
    signal = float(reader.squares @ reader.power)
    inputs = float(np.square((reader.peak / t).max()) / 255**2 * (np.square(t) @ reader.squares))
    weights = 0.0
    if reader.largest is not None:
        steps = np.square((reader.largest * t).max(axis=1)).sum() / 127**2
        weights = float(steps * reader.entries * (reader.power / np.square(t)).sum())
    return (inputs + _COMPENSATED * weights) / max(12 * signal, 1e-30)


def _readers(model: Model, group: Group, seen: Mapping[str, TensorStatistics]) -> Iterator[_Reader]:
    weighted = [node.inputs[0] for node in group.consumers]
    for node in group.consumers:
        view, channels = linear(model, node), _channels(group, node.inputs[0], seen)
        if view is not None and channels is not None and view.groups == 1:
            yield _Reader(group.places[node.inputs[0]], channels, _weights(view))
    for tensor in group.tensors:
        channels = _channels(group, tensor, seen)
        if channels is not None and (tensor not in weighted or len(tensor.outputs) > 1):
            yield _Reader(group.places[tensor], channels, None)


def _channels(group: Group, tensor: object, seen: Mapping[str, TensorStatistics]) -> Channels | None:
    found = seen.get(getattr(tensor, "name", ""))
    channels, place = (None if found is None else found.channels), group.places[tensor]
    return channels if channels is not None and len(channels.peak) == place.stop - place.start else None


def _weights(view: Linear) -> Array:
    """Absolute weights as [outputs, inputs, entries of the kernel]."""
    w = np.abs(view.weight.values.astype(np.float64) * view.alpha)
    if view.op == "Conv":
        return np.asarray(w.reshape(*w.shape[:2], -1))
    return np.asarray((w if view.transposed else w.T)[:, :, None])
