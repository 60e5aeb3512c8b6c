"""dead-channels: channels that change nothing go, on any topology, from the weights alone.

Training leaves filters with zero weights, batch normalizations with zero scales (folded to zeros by `fuse`), inputs
that nobody reads, and copies. What is found and why it is exact: dim_lossless.py. Which slices have to go together:
dims.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from onnxcomp.graph import Model
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.dim_lossless import remove_without_loss, worth_a_look
from onnxcomp.passes.dim_probe import plain_form

__all__ = ["DeadChannels"]


@dataclass(frozen=True)
class DeadChannels(Pass):
    """Remove channels, heads and units that are unread, zero, constant or there twice; needs no data."""

    name: ClassVar[str] = "dead-channels"
    effect: ClassVar[Effect] = "float"
    after: ClassVar[tuple[str, ...]] = ("cleanup", "fold-constants", "fuse")

    def run(self, model: Model, ctx: Context) -> Mapping[str, Any]:
        if not worth_a_look(model):  # the analysis behind it runs the model
            return {}
        removed = remove_without_loss(model, plain_form(model), ctx)
        if removed:
            Cleanup().run(model, Context())  # constants that the analysis had taken apart, weights that were replaced
        return removed
