"""The same function with other channel ranges, as copies for `quantize` to choose from."""

from __future__ import annotations

from onnxcomp.calibration.data import Dataset
from onnxcomp.calibration.runner import collect
from onnxcomp.graph import Model
from onnxcomp.manager import Context
from onnxcomp.passes.dead import remove_dead
from onnxcomp.passes.equalize import Equalize
from onnxcomp.passes.smooth import sites, smooth

__all__ = ["equalized", "smoothed"]


def smoothed(model: Model, data: Dataset, ctx: Context) -> Model | None:
    """A copy with smoothed values (smooth.py), None if there is nothing to smooth."""
    copy = model.copy()
    requests: dict[str, int | None] = {site.value.name: -1 for site in sites(copy)}
    if not requests:
        return None
    seen = collect(copy, data, requests, threads=ctx.threads, memory=ctx.memory, histogram=False)
    return _changed(copy, smooth(copy, seen))


def equalized(model: Model, data: Dataset, ctx: Context) -> Model | None:
    """A copy with equalized channels (equalize.py), None if there is nothing to equalize."""
    copy = model.copy()
    details = Equalize().run(copy, Context(data=data, threads=ctx.threads, memory=ctx.memory))
    return _changed(copy, int(details["groups"]))


def _changed(copy: Model, changes: int) -> Model | None:
    remove_dead(copy, Context())
    return copy if changes else None
