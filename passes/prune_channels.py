"""prune-channels: a narrower model, dense, so that it really runs faster; the weights that stay are solved anew.

1. Dimensions are coupled by index (dims.py): channels, heads and units that can be removed, with all that must follow.
2. One run over the calibration data gives second moments; every group gets an order and a curve of predicted errors
   (importance.py), scaled to what removal from it alone does to the model's outputs (dim_sensitivity.py). Residual
   branches are groups of one unit (dim_residuals.py).
3. Widths are chosen on the grid of the target's kernels under the budget (dim_plan.py).
4. Slices are taken out (surgery.py), and the result is proven equal to the original without them (dim_proof.py).
5. What stays is fitted to the original's outputs, operator by operator (repair.py), then two by two (dim_refine.py).

With `drop` (or no budget at all) the share of multiplications is searched that keeps the drop on held-out samples
within it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from onnxcomp.errors import UsageError
from onnxcomp.graph import Model
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.dim_atoms import SPATIAL
from onnxcomp.passes.dim_probe import plain_form
from onnxcomp.passes.dim_recurrent import expose_states
from onnxcomp.passes.dim_search import Search
from onnxcomp.passes.dims import couple

__all__ = ["PruneChannels"]


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove channels, attention heads, recurrent units and whole residual branches.

    One budget: `ratio` (share of each group that goes, at most), `macs` or `params` (share that stays), `latency`
    (share of the time of one run that stays: planned by dynamic programming on the measured time of each node, then
    measured), `drop` (quality that may be lost; by default the pipeline's). `importance` auto is obs with calibration
    data, else l2. Steps are chosen by what they save of `price`: work counts channels in the blocks of this machine's
    kernels. Widths are multiples of `grid` (0: of that block) and at least `min_width`. `sensitivity` measures each
    group alone, and with it `branches`: y = x + f(x) may become y = x. `normalized` also takes groups that a LayerNorm
    averages over. `repair` solves the weights that stay, and `refine` trains them after it, two operators at a time,
    without labels, where 128 samples or more are given. `dry_run` reports the plan and changes nothing.
    """

    name: ClassVar[str] = "prune-channels"
    effect: ClassVar[Effect] = "lossy"
    after: ClassVar[tuple[str, ...]] = ("cleanup", "fold-constants", "fuse")

    ratio: float | None = None
    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    drop: float | None = None
    importance: Literal["auto", "l1", "l2", "bn", "energy", "obs"] = "auto"
    price: Literal["work", "macs"] = "work"
    grid: int = 8
    min_width: int = 8
    normalized: bool = False
    branches: bool = True
    repair: bool = True
    refine: bool = True
    sensitivity: bool = True
    dry_run: bool = False

    def __post_init__(self) -> None:
        given = [n for n in ("ratio", "macs", "params", "latency", "drop") if getattr(self, n) is not None]
        if len(given) > 1:
            raise UsageError(f"pass 'prune-channels' takes one budget, not {' and '.join(given)}")
        for name in given:
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"option {name!r} of pass 'prune-channels' must be a share from 0 to 1")

    @property
    def searching(self) -> bool:
        """Whether the drop decides how much goes."""
        return self.ratio is None and self.macs is None and self.params is None and self.latency is None

    def run(self, model: Model, ctx: Context) -> Mapping[str, Any]:
        plain = plain_form(model)
        expose_states(plain)
        if ctx.data is None and self.searching:
            raise UsageError(
                "pass 'prune-channels' finds out with calibration data how much may go; give them with --calib, or "
                "give a budget such as prune-channels:macs=0.7"
            )
        sample = None if ctx.data is None else next(iter(ctx.data.batches(1))).feeds
        coupling = couple(plain, sample=sample)
        for kind, count in coupling.unknown.items():
            ctx.refuse(kind, f"there is no coupling rule for it ({count} nodes): what it touches keeps its width")
        for where, reason in coupling.failed:
            ctx.refuse(where, reason)
        for (weight, axis), reason in coupling.reasons.items():
            if reason != SPATIAL:
                ctx.refuse(f"{weight.name}, axis {axis}", reason)
        details = Search(coupling, self, ctx).run(model)
        if not self.dry_run:
            Cleanup().run(model, Context())  # weights that smaller ones replaced, sums that lost a branch
        return details
