"""prune-weights: most weights become zero, the others are solved anew so that the outputs stay; no labels, no training.

1. One run over the calibration data gives the second moments of what multiplies each weight (sparse_operands.py).
2. Each weight gets a curve of error over sparsity, scaled to what its zeros alone do to the model's outputs; zeros are
   allocated where they cost least (sparse_plan.py).
3. Operator by operator, from the inputs that it gets in the model pruned so far, a mask is chosen and the weights on it
   are solved by least squares, the bias takes up the mean (sparse_update.py, sparse_sequence.py).

Later passes keep the zeros: rounding and repair solve on what is left. Zeros save bytes once they are packed; ONNX
Runtime's CPU kernels do not skip them, so no run gets faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from onnxcomp.errors import UsageError
from onnxcomp.graph import Model
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.passes.dead import remove_dead
from onnxcomp.passes.sparse_patterns import Pattern
from onnxcomp.passes.sparse_search import Search

__all__ = ["PruneWeights"]

_MOST = 0.99


@dataclass(frozen=True)
class PruneWeights(Pass):
    """Set weights to zero: single ones, N of M, or blocks.

    One budget: `ratio` (share of zeros in all weights) or `drop` (quality that may be lost; by default the pipeline's:
    the largest share of zeros that keeps it on held-out samples). `ratios` gives sparsities by node or weight, as
    NAME=SHARE with globs, 0 for none; alone it leaves all others as they are. `pattern` is unstructured, N:M (2:4: the
    budget decides which weights get it) or a block of outputs x input channels (4x1). `method` chooses the mask; auto
    is admm with calibration data, else magnitude. `update` solves the weights that stay, `sequential` does so for the
    inputs of the model pruned so far. `allocation` global spreads a ratio by sensitivity, uniform gives each weight the
    same; `sensitivity` measures each weight alone. `only` and `skip` are globs of nodes or weights.
    """

    name: ClassVar[str] = "prune-weights"
    effect: ClassVar[Effect] = "lossy"
    after: ClassVar[tuple[str, ...]] = ("cleanup", "fold-constants", "fuse")
    pays_later: ClassVar[bool] = True

    ratio: float | None = None
    ratios: tuple[str, ...] = ()
    drop: float | None = None
    pattern: str = "unstructured"
    method: Literal["auto", "magnitude", "wanda", "obs", "admm"] = "auto"
    update: bool = True
    sequential: bool = True
    allocation: Literal["global", "uniform"] = "global"
    sensitivity: bool = True
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.ratio is not None and self.drop is not None:
            raise UsageError("pass 'prune-weights' takes one budget, not ratio and drop")
        if self.ratio is not None and not 0 <= self.ratio <= _MOST:
            raise UsageError(f"option 'ratio' of pass 'prune-weights' must be a share from 0 to {_MOST}")
        if self.drop is not None and not 0 <= self.drop <= 1:
            raise UsageError("option 'drop' of pass 'prune-weights' must be a share from 0 to 1")
        Pattern.parse(self.pattern)
        self.per_weight()

    @property
    def searching(self) -> bool:
        """Whether the drop decides how much goes."""
        return self.ratio is None and (self.drop is not None or not self.ratios)

    @property
    def needs_data(self) -> bool:
        return self.searching or self.method in ("wanda", "obs", "admm")

    def per_weight(self) -> dict[str, float]:
        """The option `ratios` as glob: sparsity. Raises UsageError for what is no NAME=SHARE."""
        found: dict[str, float] = {}
        for text in self.ratios:
            name, equals, share = text.rpartition("=")
            try:
                value = float(share[:-1]) / 100 if share.endswith("%") else float(share)
            except ValueError:
                value = -1.0
            if not name or not equals or not 0 <= value <= _MOST:
                raise UsageError(
                    f"option 'ratios' of pass 'prune-weights' has {text!r}; it takes NAME=SHARE with shares from 0 to "
                    f"{_MOST}, such as conv1=0.5+fc=0.8"
                )
            found[name] = value
        return found

    def run(self, model: Model, ctx: Context) -> Mapping[str, Any]:
        if ctx.data is None and self.needs_data:
            raise UsageError(
                "pass 'prune-weights' finds out with calibration data how much may go; give them with --calib, or give "
                "a budget such as prune-weights:ratio=0.5"
            )
        details = Search(model, self, ctx).run()
        remove_dead(model, Context())  # the biases that corrected ones replaced
        return details
