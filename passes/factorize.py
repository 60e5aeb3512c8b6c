"""factorize: two small operators in the place of a large one, where that really pays.

Gemm, MatMul and Conv are split by a truncated SVD in the metric of their inputs (low_rank.py): a matrix into two, a
kernel into an operator to or from fewer channels, or into one along each axis. The second factor is solved by least
squares, the bias takes up the mean. With the goal latency a rank counts only if the multiplications and the measured
time of the pair fall, on a real input in sessions of their own; with the goal size if the parameters fall. Ranks are
chosen so that the summed error, scaled to what splitting each operator alone does to the model's outputs, is least
under the budget. Small models rarely gain: a second operator costs more than it saves, and the report says how much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from onnxcomp.errors import UsageError
from onnxcomp.graph import Model
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.passes.dead import remove_dead
from onnxcomp.passes.factor_search import Search

__all__ = ["Factorize"]


@dataclass(frozen=True)
class Factorize(Pass):
    """Split weighted operators into two of low rank, where multiplications and measured time (or bytes) fall.

    One budget: `ratio` (rank, as share of the full rank, the same for all), `macs` or `params` (share of the model's
    that stays), `drop` (quality that may be lost; by default the pipeline's). `goal` latency asks for less time of each
    pair, size for fewer parameters. `sensitivity` measures each operator alone. `only` and `skip` are globs of nodes or
    weights.
    """

    name: ClassVar[str] = "factorize"
    effect: ClassVar[Effect] = "lossy"
    after: ClassVar[tuple[str, ...]] = ("cleanup", "fold-constants", "fuse", "prune-channels")

    ratio: float | None = None
    macs: float | None = None
    params: float | None = None
    drop: float | None = None
    goal: Literal["latency", "size"] = "latency"
    sensitivity: bool = True
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = [n for n in ("ratio", "macs", "params", "drop") if getattr(self, n) is not None]
        if len(given) > 1:
            raise UsageError(f"pass 'factorize' takes one budget, not {' and '.join(given)}")
        for name in given:
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"option {name!r} of pass 'factorize' must be a share from 0 to 1")

    @property
    def searching(self) -> bool:
        """Whether the drop decides how much goes."""
        return self.ratio is None and self.macs is None and self.params is None

    @property
    def needs_data(self) -> bool:
        return True

    def run(self, model: Model, ctx: Context) -> Mapping[str, Any]:
        if ctx.data is None:
            raise UsageError("pass 'factorize' needs calibration data; give them with --calib")
        details = Search(model, self, ctx).run()
        remove_dead(model, Context())  # the weights that factors replaced
        return details

