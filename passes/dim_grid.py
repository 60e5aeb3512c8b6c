"""Widths that are worth having on this machine: the step of the staircase of convolution kernels, measured.

ONNX Runtime's CPU kernels compute output channels in blocks (8 or 16 by instruction set), so that a convolution costs
the same from one multiple of the block to the next.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.cache import remembered
from onnxcomp.cpu import cpu_model
from onnxcomp.graph import Model
from onnxcomp.runtime import Session, open_session, runtime_version

__all__ = ["measured_grid", "time_ratio"]

_STEPS = (16, 8, 4)
_WIDTH = 64
_ROUNDS = 15
_FASTER = 0.96
_SECONDS = 0.5


@functools.cache
def measured_grid(provider: str = "cpu") -> int:
    """The smallest step (4, 8 or 16 channels) whose removal from 64 output channels makes a 3x3 Conv faster, else 16.

    About a tenth of a second, once for each machine and ONNX Runtime.
    """
    key = {"provider": provider, "cpu": cpu_model(), "onnxruntime": runtime_version()}
    return int(remembered("conv-grid", key, lambda: _measure(provider)))


def _measure(provider: str) -> int:
    sessions = {w: _session(w, provider) for w in (_WIDTH, *(_WIDTH - s for s in _STEPS))}
    feed = {"x": np.random.default_rng(0).normal(size=(1, _WIDTH, 14, 14)).astype(np.float32)}
    best = dict.fromkeys(sessions, float("inf"))
    for _ in range(_ROUNDS):
        for width, session in sessions.items():
            begin = time.perf_counter()
            session.run(feed)
            best[width] = min(best[width], time.perf_counter() - begin)
    useful = [s for s in _STEPS if best[_WIDTH - s] < _FASTER * best[_WIDTH]]
    return min(useful, default=_STEPS[0])


def time_ratio(before: Model, after: Model, feeds: Mapping[str, npt.NDArray[Any]], *, threads: int = 1) -> float:
    """Time of one run of `after` over that of `before`: least of interleaved runs, over about half a second."""
    sessions = [open_session(model, threads=threads) for model in (before, after)]
    best = [float("inf")] * 2
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end or not np.isfinite(best[1]):
        for k, session in enumerate(sessions):
            begin = time.perf_counter()
            session.run(feeds)
            best[k] = min(best[k], time.perf_counter() - begin)
    return best[1] / best[0]


def _session(width: int, provider: str) -> Session:
    """Three convolutions, so that the change of layout at both ends does not hide the middle."""
    rng = np.random.default_rng(1)
    widths = [_WIDTH, width, width, _WIDTH]
    nodes, weights = [], []
    for k, (i, o) in enumerate(itertools.pairwise(widths)):
        values = rng.normal(size=(o, i, 3, 3)).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{k}"))
        names = (f"t{k}" if k else "x", f"t{k + 1}" if k < len(widths) - 2 else "y")
        nodes.append(helper.make_node("Conv", [names[0], f"w{k}"], [names[1]], pads=[1, 1, 1, 1]))
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, _WIDTH, 14, 14]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "grid", info[:1], info[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return open_session(model, provider=provider)
