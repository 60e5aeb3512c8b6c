"""What flows through the layers before and after optimization: errors of their outputs, histograms of their tensors.

Both models run on the same few samples with inner values as outputs; values are paired by name. Sizes, samples and
time are bounded: this is a look inside for the report, the verdict comes from the verification.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.runner import expose
from onnxcomp.graph import Constant, Model
from onnxcomp.layer_table import keyed
from onnxcomp.layers import Place

__all__ = ["Range", "Values", "look_inside", "quantized_ranges"]

Array = npt.NDArray[Any]

_BINS = 64
_TENSORS = 16  # histograms of weights, and as many of activations
_OUTPUTS = 64  # layers whose outputs are compared
_ELEMENTS = 1 << 22  # of a tensor that is looked at
_SAMPLE = 1 << 16  # values of one activation and sample that go into its histogram
_SECONDS = 0.2  # after which no further sample is run
_MODEL_BYTES = 1 << 28  # weights of a model above which it is not run another time


@dataclass(frozen=True)
class Range:
    """What a quantized tensor can hold: `low` to `high`, in `steps` (the smallest and the largest, by channel)."""

    low: float
    high: float
    steps: tuple[float, float]


@dataclass
class Values:
    """Errors of layers' outputs by layer, and histograms as the JSON report has them."""

    errors: dict[str, float] = field(default_factory=dict)
    histograms: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Plan:
    """Names of values to fetch: outputs of layers (by layer), quantized activations, weights by layer on both sides."""

    outputs: Mapping[str, str]
    ranges: Mapping[str, Range]
    weights: Sequence[tuple[Place, Place]]


def look_inside(
    original: Model,
    optimized: Model,
    layers: tuple[Sequence[Place], Sequence[Place]],
    feeds: Sequence[Mapping[str, Array]],
    *,
    threads: int = 1,
) -> Values:
    """Compare inner values on `feeds`, single samples, for a fraction of a second. `layers` are those of both models.

    `original` is best the model as the lossy passes found it: what lossless passes have merged has no twin before them.

    Models with more than 256 MB of weights are not run. A model that does not run with its inner values exposed gives
    no errors and histograms of stored weights only.
    """
    plan = _plan(original, optimized, layers)
    names = list(dict.fromkeys([*plan.outputs.values(), *plan.ranges]))
    runs: list[tuple[dict[str, Array], dict[str, Array]]] = []
    if max(sum(p.layer.bytes for p in side) for side in layers) <= _MODEL_BYTES:
        decoded = [_decoded(pair[side] for pair in plan.weights) for side in (0, 1)]
        try:
            runs = _run_both((original, optimized), names, decoded, feeds, threads)
        except Exception:  # a model that only runs as a whole: the report is valid without this part
            runs = []
    weights = [_weight_histogram(a, b, runs[0] if runs else ({}, {})) for a, b in plan.weights]
    activations = [_activation_histogram(name, kept, runs) for name, kept in plan.ranges.items()]
    return Values(_errors(plan.outputs, runs), [h for h in (*weights, *activations) if h is not None])


def quantized_ranges(model: Model) -> dict[str, Range]:
    """The range of each value of the main graph that a QuantizeLinear with constant parameters stores."""
    found = {}
    for node in model.graph.nodes:
        if node.op == "QuantizeLinear" and not node.domain and model.weight(node.inputs[0]) is None:
            scale = model.value(node.inputs[1])
            zero = model.value(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1, np.uint8)
            chosen = None if scale is None or zero is None else _range(scale, zero)
            if chosen is not None:
                found[node.inputs[0].name] = chosen
    return found


def _range(scale: Array, zero: Array) -> Range | None:
    """What codes of the zero point's type stand for; None for types that are no integers of up to 16 bits."""
    names = {"uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535), "int16": (-32768, 32767),
             "uint4": (0, 15), "int4": (-8, 7)}  # fmt: skip
    if zero.dtype.name not in names or not scale.size:
        return None
    first, last = names[zero.dtype.name]
    s, z = scale.astype(np.float64).reshape(-1), zero.astype(np.float64).reshape(-1)
    return Range(
        float((s * (first - z)).min()), float((s * (last - z)).max()), (float(s.min()), float(s.max()))
    )


def _plan(original: Model, optimized: Model, layers: tuple[Sequence[Place], Sequence[Place]]) -> _Plan:
    inner = {o.name for n in original.graph.nodes for o in n.outputs if o.name}
    inner |= {t.name for t in original.graph.inputs}
    after = {o.name for n in optimized.graph.nodes for o in n.outputs if o.name}
    by_cost = sorted(layers[1], key=lambda p: -(p.layer.macs or 0))
    outputs: dict[str, str] = {}
    for place in by_cost:
        name = place.node.outputs[0].name
        if not place.layer.nested and name in inner and name in after and len(outputs) < _OUTPUTS:
            outputs.setdefault(place.layer.node, name)
    ranges = {name: r for name, r in quantized_ranges(optimized).items() if name in inner}
    spread = np.unique(np.linspace(0, len(ranges) - 1, min(_TENSORS, len(ranges))).astype(np.intp))
    kept = [list(ranges)[i] for i in spread]
    before = keyed(layers[0])
    pairs = [(before[k], p) for k, p in keyed(layers[1]).items() if k in before and _shown(before[k]) and _shown(p)]
    largest = sorted(pairs, key=lambda pair: -pair[0].layer.bytes)[:_TENSORS]
    return _Plan(outputs, {n: ranges[n] for n in kept}, [pair for pair in pairs if pair in largest])


def _shown(place: Place) -> bool:
    size = int(np.prod(place.layer.weight_shape)) if place.layer.weight_shape is not None else 0
    return not place.layer.nested and _BINS <= size <= _ELEMENTS and place.weight is not None


def _decoded(places: Any) -> list[str]:
    """Weights that nodes compute from what is stored."""
    return [p.tensor.name for p in places if p.tensor.inputs]


def _run_both(
    models: tuple[Model, Model],
    names: Sequence[str],
    decoded: Sequence[Sequence[str]],
    feeds: Sequence[Mapping[str, Array]],
    threads: int,
) -> list[tuple[dict[str, Array], dict[str, Array]]]:
    """The values by name, of both models, of each sample that there was time for; decoded weights of the first."""
    found: list[tuple[dict[str, Array], dict[str, Array]]] = []
    sessions = [expose(m, [*names, *d], threads=threads) for m, d in zip(models, decoded, strict=True)]
    given = {t.name for t in models[0].graph.inputs}
    begin = perf_counter()
    for feed in feeds:
        sides = []
        for session, more in zip(sessions, decoded, strict=True):
            wanted = [n for n in [*names, *([] if found else more)] if n not in given]
            values = dict(zip(wanted, session.run(feed, wanted), strict=True)) if wanted else {}
            values.update((n, np.asarray(feed[n])) for n in names if n in given and n in feed)
            sides.append({n: v for n, v in values.items() if isinstance(v, np.ndarray)})
        found.append((sides[0], sides[1]))
        if perf_counter() - begin > _SECONDS:
            break
    return found


def _errors(outputs: Mapping[str, str], runs: Sequence[tuple[dict[str, Array], dict[str, Array]]]) -> dict[str, float]:
    """sum (x - y)² / sum x² of each layer's output over the samples; only where both are floats of one shape."""
    found = {}
    for layer, name in outputs.items():
        signal = noise = 0.0
        for before, after in runs:
            x, y = before.get(name), after.get(name)
            if x is None or y is None or x.shape != y.shape or x.dtype.kind != "f" or y.dtype.kind != "f":
                break
            wide = x.astype(np.float64)
            signal += float(np.square(wide).sum())
            noise += float(np.square(wide - y).sum())
        else:
            if signal > 0 and np.isfinite(noise):
                found[layer] = noise / signal
    return found


# --- histograms -------------------------------------------------------------------------------------------------


def _weight_histogram(
    before: Place, after: Place, run: tuple[dict[str, Array], dict[str, Array]]
) -> dict[str, Any] | None:
    x, y = _values(before, run[0]), _values(after, run[1])
    if x is None or y is None:
        return None
    return _histogram(before.layer.node, "weight", x, y, _weight_range(after), 0)


def _values(place: Place, run: Mapping[str, Array]) -> Array | None:
    """The weight as the node sees it, flat; None if it is computed and was not."""
    if place.tensor.inputs:
        value = run.get(place.tensor.name)
    else:
        value = None if place.weight is None else place.weight.load()
    if value is None or value.dtype.kind not in "fiu":
        return None
    flat = value.reshape(-1).astype(np.float64)
    return flat if np.isfinite(flat).all() else None


def _weight_range(place: Place) -> Range | None:
    """The range of a weight behind DequantizeLinear, over all channels."""
    nodes = place.tensor.inputs
    if not nodes or nodes[0].op != "DequantizeLinear" or len(nodes[0].inputs) < 2:
        return None
    values = [t.values if isinstance(t, Constant) else None for t in nodes[0].inputs[:3]]
    codes, scale, zero = [*values, None][:3]
    if codes is None or scale is None:
        return None
    return _range(scale, np.zeros(1, codes.dtype) if zero is None else zero)


def _activation_histogram(
    name: str, kept: Range, runs: Sequence[tuple[dict[str, Array], dict[str, Array]]]
) -> dict[str, Any] | None:
    before = [run[0].get(name) for run in runs]
    after = [run[1].get(name) for run in runs]
    if not before or any(v is None or v.dtype.kind != "f" or not np.isfinite(v).all() for v in before):
        return None
    same = all(v is not None and v.dtype.kind == "f" and np.isfinite(v).all() for v in after)
    x = np.concatenate([_sampled(v) for v in before if v is not None])
    y = np.concatenate([_sampled(v) for v in after if v is not None]) if same else None
    return _histogram(name, "activation", x, y, kept, len(runs)) if x.size else None


def _sampled(values: Array) -> Array:
    """At most 65,536 values, evenly spaced by an odd step so that no power of two hides a channel."""
    flat = values.reshape(-1)
    step = (flat.size // _SAMPLE) | 1
    return np.asarray(flat[::step] if flat.size > _SAMPLE else flat, np.float64)


def _histogram(
    name: str, kind: str, before: Array, after: Array | None, kept: Range | None, samples: int
) -> dict[str, Any]:
    """Counts in 64 equal bins over all values and the range, and the share of the original's values outside of it."""
    everything = [before.min(), before.max(), *([] if after is None else [after.min(), after.max()])]
    low, high = float(min(everything)), float(max(everything))
    if kept is not None:
        low, high = min(low, kept.low), max(high, kept.high)
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = [None if v is None else np.histogram(v, _BINS, (low, high))[0].tolist() for v in (before, after)]
    outside = None
    if kept is not None and kind == "activation":  # of a weight every channel has a range of its own
        half = kept.steps[1] / 2
        outside = float(np.mean((before < kept.low - half) | (before > kept.high + half)))
    return {
        "tensor": name,
        "kind": kind,
        "low": low,
        "high": high,
        "original": counts[0],
        "optimized": counts[1],
        "minimum": float(before.min()),
        "maximum": float(before.max()),
        "range": None if kept is None else [kept.low, kept.high],
        "steps": None if kept is None else list(kept.steps),
        "outside": outside,
        "samples": samples,
    }
