"""equalize: give the channels of an activation similar ranges, so that one scale for all of them wastes less.

Between operators that commute with a positive factor per channel (channel_groups.py), a channel can be divided by s
where it is produced and multiplied by s where it is used, and the function stays the same:

    producers   W[c] / s[c],  b[c] / s[c]          consumers   W[., c] * s[c]

What was produced is quantized per output channel, so that division is free; the multiplication widens the spread
inside the consumers' channels. s[c] = (r[c] / max r)^strength balances the two (equalize_noise.py), with r[c] the
largest magnitude seen in channel c (Nagel et al., arXiv:1906.04721, equalize weight ranges in pairs; Xiao et al.,
arXiv:2211.10438, activations against weights). Values that are coupled, such as all that meet in a residual sum, share
s. Depthwise convolutions in between pass the factor on: of them only the bias changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.runner import collect
from onnxcomp.calibration.split import limited
from onnxcomp.calibration.statistics import TensorStatistics
from onnxcomp.errors import UsageError
from onnxcomp.graph import Model, Node
from onnxcomp.linear import Linear, linear
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.passes.channel_groups import Group, channel_groups
from onnxcomp.passes.dead import remove_dead
from onnxcomp.passes.equalize_noise import best_strength
from onnxcomp.provenance import Origin, note

__all__ = ["Equalize", "equalize"]

Array = npt.NDArray[Any]
_LARGEST = 16.0  # factor between the widest and the narrowest channel that is evened out at most
_SAMPLES = 512


@dataclass(frozen=True)
class Equalize(Pass):
    """Cross-layer equalization from calibrated channel ranges.

    `strength` is the exponent of the range ratio; without one, that of the least noise is taken for each group.
    """

    name: ClassVar[str] = "equalize"
    effect: ClassVar[Effect] = "float"
    after: ClassVar[tuple[str, ...]] = ("fuse",)

    strength: float | None = None

    def __post_init__(self) -> None:
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise UsageError(f"option 'strength' of pass 'equalize' is {self.strength:g}; it must be from 0 to 1")

    @property
    def needs_data(self) -> bool:
        return True

    def run(self, model: Model, ctx: Context) -> Mapping[str, Any]:
        if ctx.data is None:
            raise UsageError("pass 'equalize' needs calibration data; give them with --calib")
        groups = [g for g in channel_groups(model) if g.pinned is None]
        requests: dict[str, int | None] = {t.name: 1 for g in groups for t in g.tensors}
        seen = collect(
            model, limited(ctx.data, _SAMPLES), requests, threads=ctx.threads, memory=ctx.memory, histogram=False
        )
        done = equalize(model, groups, seen, ctx, self.strength)
        remove_dead(model, Context())  # the weights that rescaled ones replaced
        return {"groups": done}


def equalize(
    model: Model, groups: list[Group], seen: Mapping[str, TensorStatistics], ctx: Context, strength: float | None
) -> int:
    """Rescale the groups, in place; returns how many."""
    done = 0
    for group in groups:
        spread = _spread(group, seen)
        if spread is None or not group.producers or not group.consumers:
            continue
        spread = np.clip(spread, 1 / _LARGEST, 1.0)
        factor = spread ** (best_strength(model, group, seen, spread) if strength is None else strength)
        if factor.min() > 0.9 or not ctx.allow(f"channels of {next(iter(group.tensors)).name}"):
            continue
        _rescale(model, group, factor)
        scales = {t.name: (1, tuple((1 / factor[place]).tolist())) for t, place in group.places.items()}
        note(model, {name: Origin(name, scale=scale) for name, scale in scales.items()})
        done += 1
    return done


def _spread(group: Group, seen: Mapping[str, TensorStatistics]) -> Array | None:
    """Range of each channel, relative to the widest one; None if no value was seen.

    Each value counts relative to its own widest channel: that is what its scale follows. Channels that no value with
    statistics has stay as they are.
    """
    found = np.full(group.channels, -1.0)
    for tensor in group.tensors:
        channels, place = (seen[tensor.name].channels if tensor.name in seen else None), group.places[tensor]
        if channels is not None and len(channels.peak) == place.stop - place.start:
            peak = np.asarray(channels.peak)
            found[place] = np.maximum(found[place], peak / max(float(peak.max()), 1e-30))
    return None if (found < 0).all() else np.where(found < 0, 1.0, found)


def _rescale(model: Model, group: Group, factor: Array) -> None:
    """Divide channel c by factor[c] where it is produced, multiply where it is used up.

    The views are taken anew: the weight of a node between two groups changes twice.
    """
    for node in group.producers:
        view, own = _view(model, node), factor[group.places[node.outputs[0]]]
        view.rewrite(model, model.graph, view.scaled_outputs(1 / own), _bias(view, 1 / own))
    for node in group.between:
        view, own = _view(model, node), factor[group.places[node.outputs[0]]]
        view.rewrite(model, model.graph, view.weight.values, _bias(view, 1 / own))
    for node in group.consumers:
        view, own = _view(model, node), factor[group.places[node.inputs[0]]]
        view.rewrite(model, model.graph, view.scaled_inputs(own), _bias(view, np.ones(1)))


def _view(model: Model, node: Node) -> Linear:
    view = linear(model, node)
    if view is None:
        raise ValueError(f"{node.label} has lost its constant weight")
    return view


def _bias(view: Linear, factor: Array) -> Array | None:
    return None if view.bias is None else view.bias_values() * factor
