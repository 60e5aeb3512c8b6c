"""Unusual inputs: what real samples rarely hold and deployed models meet. All are made from one feed that works."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcomp import child
from onnxcomp.errors import OnnxcompError
from onnxcomp.files import OpenFile
from onnxcomp.hints import read_hints
from onnxcomp.runtime import TensorSpec, open_session
from onnxcomp.synthesis import synthesize, usable_inputs

if TYPE_CHECKING:
    import onnx

__all__ = ["DEGENERATE", "edge_feeds", "empty_axes", "made_up_feeds", "resized", "try_empty"]

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

# Kinds of inputs on which many values are equal or out of range: ties are broken by rounding there.
DEGENERATE = frozenset({"zeros", "ones", "large", "constant channel", "extremes"})
_LENGTHS = (1, 7, 33)  # sizes of an open axis that are tried; the last is long for a sequence
_MOST_AXES = 6
_MOST_ELEMENTS = 1 << 20
_SECONDS = 60.0
_MADE_UP = 1  # samples made up beside the real ones


def edge_feeds(feeds: Mapping[str, Array]) -> dict[str, Feeds]:
    """Unusual values, by kind: the float inputs of one feed all zeros, all ones, ten times as large, at the smallest
    and the largest value in turn, and with the first channel (axis 1) constant. Other inputs are kept. Empty if there
    is no float input.
    """
    floats = {name: value for name, value in feeds.items() if value.dtype.kind == "f" and value.size}
    if not floats:
        return {}
    flat = {name: value.copy() for name, value in floats.items()}
    for value in flat.values():
        channel = value[:, :1] if value.ndim > 1 else value
        channel[...] = channel.mean(dtype=np.float64)
    ends = {
        name: np.where(np.indices(value.shape).sum(axis=0) % 2, value.max(), value.min()).astype(value.dtype)
        for name, value in floats.items()
    }
    versions = {
        "zeros": {name: np.zeros_like(value) for name, value in floats.items()},
        "ones": {name: np.ones_like(value) for name, value in floats.items()},
        "large": {
            name: (value.astype(np.float64) * 10).astype(value.dtype) for name, value in floats.items()
        },
        "extremes": ends,
        "constant channel": flat,
    }
    return {name: {**feeds, **version} for name, version in versions.items()}


def made_up_feeds(
    feeds: Mapping[str, Array], inputs: Sequence[TensorSpec], proto: onnx.ModelProto, seed: int
) -> dict[str, Feeds]:
    """Inputs of the same sizes made from the graph, and integer inputs that are indices at both ends of their range
    (of the table that Gather or OneHot reads).
    """
    made: dict[str, Feeds] = {}
    sizes = {
        dim if isinstance(dim, str) and dim else f"{spec.name}:{axis}": int(feeds[spec.name].shape[axis])
        for spec in inputs
        for axis, dim in enumerate(spec.shape or ())
        if spec.name in feeds and not isinstance(dim, int)
    }
    try:
        for number, feed in enumerate(synthesize(inputs, proto, seed=seed, count=_MADE_UP, sizes=sizes)):
            made[f"synthesized {number}"] = feed
    except OnnxcompError:
        pass  # an input that cannot be made up
    hints = read_hints(proto, [spec.name for spec in inputs])
    integers = {n for n, v in feeds.items() if v.dtype.kind in "iu"}
    bounds = {n: h.bound for n, h in hints.items() if h.bound is not None and n in integers}
    if bounds:
        low = {n: np.zeros_like(feeds[n]) for n in bounds}
        high = {n: np.full_like(feeds[n], min(b - 1, int(np.iinfo(feeds[n].dtype).max))) for n, b in bounds.items()}
        made |= {"first index": {**feeds, **low}, "last index": {**feeds, **high}}
    return made


def resized(
    feeds: Mapping[str, Array], inputs: Sequence[TensorSpec], lengths: Sequence[int] = _LENGTHS
) -> dict[str, Feeds]:
    """The feed with each open axis in turn at other sizes, by cutting or repeating; symbols stay consistent."""
    made: dict[str, Feeds] = {}
    for symbol, places in list(_open_axes(inputs).items())[:_MOST_AXES]:
        for length in lengths:
            feed = dict(feeds)
            for name, axis in places:
                old = feed.get(name)
                if old is not None and (old.shape[axis] or not length):
                    feed[name] = np.take(old, np.arange(length) % max(1, old.shape[axis]), axis=axis)
            same = all(feed[n].shape == feeds[n].shape for n in feeds)
            if not same and sum(v.size for v in feed.values()) <= _MOST_ELEMENTS:
                made[f"{symbol} = {length}"] = feed
    return made


def _open_axes(inputs: Sequence[TensorSpec]) -> dict[str, list[tuple[str, int]]]:
    """Where each named open dimension is; those without a name stand alone."""
    found: dict[str, list[tuple[str, int]]] = {}
    for spec in inputs:
        for axis, dim in enumerate(spec.shape or ()):
            if not isinstance(dim, int):
                key = dim if isinstance(dim, str) and dim else f"{spec.name}:{axis}"
                found.setdefault(key, []).append((spec.name, axis))
    return found


# --- empty axes: some kernels end the process ----------------------------------------------------------------------


def empty_axes(path: str | os.PathLike[str], inputs: Sequence[TensorSpec]) -> frozenset[str]:
    """The kinds of `resized` feeds with an empty axis that a model file with these inputs takes, tried in a child.

    The recurrent kernels of ONNX Runtime 1.31 end the process on an empty batch: "terminate called without an active
    exception".
    """
    if not _open_axes(inputs):
        return frozenset()
    return _empty_axes(os.fspath(path), OpenFile(Path(path), "model").identity)


@functools.lru_cache(maxsize=64)
def _empty_axes(path: str, state: tuple[int, ...]) -> frozenset[str]:
    ran: set[str] = set()
    with contextlib.suppress(child.ChildCrashError, TimeoutError, OnnxcompError):
        child.run("onnxcomp.edges:try_empty", {"path": path}, lambda e: ran.add(e["kind"]), seconds=_SECONDS)
    return frozenset(ran)  # whatever ended the child: these had run before


def try_empty(job: Mapping[str, Any], emit: child.Event) -> dict[str, Any]:
    """In the child: run the model with each open dimension empty, and tell which ran."""
    import onnx

    session = open_session(job["path"])
    proto = onnx.load_model(job["path"], load_external_data=False)
    feeds = usable_inputs(session, proto, count=1)[0]
    for kind, feed in resized(feeds, session.inputs, (0,)).items():
        try:
            session.run(feed)
        except Exception:  # refused, which is a fair answer
            continue
        emit({"kind": kind})
    return {}
