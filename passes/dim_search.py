"""From coupled dimensions to a pruned model: curves, plan, surgery, proof, repair, and the account of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.split import hold_out
from onnxcomp.errors import VerificationError
from onnxcomp.graph import Model
from onnxcomp.macs import count_macs
from onnxcomp.manager import Context
from onnxcomp.node_times import node_times
from onnxcomp.passes.dim_account import plan_table, prune_map
from onnxcomp.passes.dim_costs import Costs
from onnxcomp.passes.dim_grid import measured_grid, time_ratio
from onnxcomp.passes.dim_plan import Budget, allocate, levels, uniform
from onnxcomp.passes.dim_proof import provable, removal_error
from onnxcomp.passes.dim_readers import Reader
from onnxcomp.passes.dim_recurrent import recurrent_sites
from onnxcomp.passes.dim_sensitivity import Sensitivity, affordable, longest
from onnxcomp.passes.dim_sites import collect_grams, sites
from onnxcomp.passes.dims import Coupling
from onnxcomp.passes.importance import Curve, Method, curves
from onnxcomp.passes.judge import Assessed, Judges, prudent
from onnxcomp.passes.repair import Repaired, compensate, resolve
from onnxcomp.passes.surgery import Cut, remove

if TYPE_CHECKING:
    from onnxcomp.passes.prune_channels import PruneChannels

__all__ = ["Search"]

Array = npt.NDArray[Any]
_PROVEN = 1e-3  # largest difference, relative to the largest output value, that rounding may explain
_FASTER = 0.98  # share of the time below which a model counts as faster
_PROFILED = 30  # runs that times of nodes are the median of
_TRIALS = 6  # measurements for a latency
_SHARES = tuple(s / 100 for s in range(98, 14, -2))  # work that stays, tried for a drop


@dataclass(frozen=True)
class _Candidate:
    cut: Cut
    removed: Sequence[int]
    proof: float | None
    repaired: Repaired
    before: Assessed | None = None
    after: Assessed | None = None


class Search:
    """One run of the pass on a coupled model."""

    def __init__(self, coupling: Coupling, options: PruneChannels, ctx: Context) -> None:
        self.coupling = coupling
        self.options = options
        self.ctx = ctx
        self.grid = options.grid or measured_grid()
        self.sites: list[Reader] = [*sites(coupling.model), *recurrent_sites(coupling.model)]
        self.groups = [g for g in coupling.groups if options.normalized or not g.averaged]
        for group in coupling.groups:
            if group.averaged and not options.normalized:
                ctx.refuse(group.name, "a normalization averages over it; normalized=true prunes it all the same")
        parts: tuple[Any, Any] = (None, None) if ctx.data is None else hold_out(ctx.data)
        self.fit, held = parts
        self._measuring = options.sensitivity and options.ratio is None and self.fit is not None
        if self._measuring and options.repair and options.branches:
            self.groups += coupling.branches  # what a branch is worth can only be measured
        macs = count_macs(coupling.model, known={t.name: dims for t, dims in coupling.probe.shapes.items()}).total
        self._samples = affordable(macs, len(self.groups))
        self.judges = Judges(coupling.model, held, threads=ctx.threads, probed=self._samples)

    def run(self, model: Model) -> dict[str, Any]:
        found = self._curves()
        if self.options.dry_run:
            removed = self._planned(found, self._shares()[-1])
            return self._account(found, removed, None)
        best = self._narrowest(found)
        time = None if best is None else self._time(best.cut)
        if self.options.searching and time is not None and time > _FASTER:
            self.ctx.refuse("the model", f"the narrower model takes {time:.2f} of the time on this machine: no gain")
            best = None
        if best is None or not self.ctx.allow(f"{sum(best.removed)} units of {len(self.groups)} groups"):
            return {**self._account(found, [0] * len(found), None), "reason": "no removal fits the budget and the grid"}
        best = self._refined(found, best)
        model.become(best.cut.model)
        return {**self._account(found, best.removed, best), "time": time}

    def _time(self, cut: Cut) -> float:
        """Share of the time of one run that stays, on this machine."""
        ratio = time_ratio(self.coupling.model, cut.model, self.coupling.probe.feeds, threads=self.ctx.threads)
        return round(ratio, 3)

    def _narrowest(self, found: Sequence[Curve]) -> _Candidate | None:
        """The candidate for the budget; without one, by bisection, the narrowest that keeps the drop."""
        shares = self._shares()
        if self.options.latency is not None:
            shares = [self._share_of_time(found, self.options.latency)]
        best: _Candidate | None = None
        low, high = 0, len(shares)  # shares before `low` are fine, those from `high` on are not
        while low < high:
            middle = (low + high) // 2
            removed = self._planned(found, shares[middle])
            refine = self.options.refine and not self.options.searching
            candidate = self._built(found, removed, refine=refine) if any(removed) else None
            if candidate is not None and self.options.searching and not self._within_drop(candidate):
                high = middle
            else:
                low, best = middle + 1, candidate or best
        return best

    def _share_of_time(self, found: Sequence[Curve], latency: float) -> float:
        """The largest planned share of the time for which the measured one stays within `latency`."""
        share = latency
        for _ in range(_TRIALS):
            cut = remove(self.coupling, _units(found, self._planned(found, share)))
            measured = self._time(cut)
            if measured <= latency:
                break
            share *= 0.98 * latency / measured
        return share

    def _within_drop(self, candidate: _Candidate) -> bool:
        if candidate.after is None or self.judges.whole is None:
            return True
        return prudent(candidate.after, self._drop, self.judges.whole.counted)

    # --- plan ---

    @property
    def _drop(self) -> float:
        return self.ctx.max_drop if self.options.drop is None else self.options.drop

    def _shares(self) -> Sequence[float]:
        options = self.options
        given = [v for v in (options.macs, options.params, options.latency, options.ratio) if v is not None]
        return given or _SHARES

    def _planned(self, found: Sequence[Curve], share: float) -> list[int]:
        grid, least = self.grid, self.options.min_width
        if self.options.ratio is not None:
            removed = uniform(found, share, grid, least)
        else:
            budget = self._budget(share)
            removed = allocate(found, self.costs, budget, grid=grid, least=least)
        return self._without_empty(found, removed)

    def _budget(self, share: float) -> Budget:
        if self.options.params is not None:
            return Budget("params", share, "params")
        if self.options.latency is not None:
            return Budget("time", share, "time")
        return Budget("work" if self.options.macs is None else "macs", share, self.options.price)

    def _without_empty(self, found: Sequence[Curve], removed: list[int]) -> list[int]:
        """No axis of any tensor may lose all of its slices: groups that would do it lose less."""
        removed = list(removed)
        while empty := set(self.coupling.emptied(self.coupling.mask(_units(found, removed)))):
            for g, curve in enumerate(found):
                if empty & set(curve.order[: removed[g]]):
                    less = [n for n in levels(curve.group, self.grid, self.options.min_width) if n < removed[g]]
                    removed[g] = max(less, default=0)
        return removed

    @cached_property
    def costs(self) -> Costs:
        return Costs(self.coupling, self.groups, block=measured_grid(), times=self._times)

    @cached_property
    def _times(self) -> Mapping[Any, float]:
        """Microseconds of each node in one run, where a budget is about time."""
        if self.options.latency is None:
            return {}
        feeds = self.coupling.probe.feeds
        return node_times(self.coupling.model, feeds, threads=self.ctx.threads, runs=_PROFILED).by_node

    # --- curves ---

    @cached_property
    def grams(self) -> Mapping[Any, Any]:
        if self.fit is None or (self.options.importance in ("l1", "l2", "bn") and not self.options.repair):
            return {}
        self.ctx.progress(0.0, "calibrating")
        return collect_grams(
            self.coupling.model,
            self.sites,
            self.fit,
            threads=self.ctx.threads,
            memory=self.ctx.memory,
            seed=self.ctx.seed,
            progress=self.ctx.progress,
        )

    def _curves(self) -> list[Curve]:
        method: Method = "l2" if self.fit is None else "obs"
        if self.options.importance != "auto":
            method = self.options.importance
        channels = [g for g in self.groups if g.axes]
        found = curves(self.coupling, channels, method, self.sites, self.grams)
        if not self._measuring or self.judges.probing is None or self.fit is None:
            return found
        ctx = self.ctx
        sensitivity = Sensitivity(
            self.coupling, self.sites, self.grams, self.fit, self.judges.probing, samples=self._samples,
            longest=longest(len(self.groups)), threads=ctx.threads, memory=ctx.memory, seed=ctx.seed,
            repaired=self.options.repair,
        )  # fmt: skip
        found += [Curve(g, g.units, np.array([0.0, 1.0]), "ablation") for g in self.groups if not g.axes]
        return sensitivity.measure(found, self.grid, self.options.min_width, ctx.progress)

    # --- candidates ---

    def _refined(self, found: Sequence[Curve], best: _Candidate) -> _Candidate:
        """The result of a search, trained at the end: a search with trained candidates would take many times longer."""
        if not (self.options.searching and self.options.refine):
            return best
        trained = self._built(found, best.removed, refine=True)
        before, after = best.after, trained.after
        return trained if before is None or after is None or after[0] > before[0] else best

    def _built(self, found: Sequence[Curve], removed: Sequence[int], *, refine: bool) -> _Candidate:
        units = _units(found, removed)
        cut = remove(self.coupling, units)
        candidate = _Candidate(cut, removed, self._proof(units, cut), Repaired())
        if self.fit is None:
            return candidate
        before = self.judges.whole.assess(cut.model) if self.judges.whole is not None else None
        if self.options.repair:
            compensate(cut, self.sites, self.grams)
            repaired = resolve(
                cut,
                self.fit,
                samples=None,
                threads=self.ctx.threads,
                seed=self.ctx.seed,
                memory=self.ctx.memory,
                refine=refine,
                progress=self.ctx.progress,
            )
            candidate = replace(candidate, repaired=repaired)
        after = self.judges.whole.assess(cut.model) if self.judges.whole is not None else None
        return replace(candidate, before=before, after=after)

    def _proof(self, units: Sequence[int], cut: Cut) -> float | None:
        """The error of the removal against the masked original; None where averages are not known how to mask."""
        if not provable(self.coupling, units):
            return None
        feeds = [f for f in (self.coupling.probe.feeds, self.coupling.probe.larger) if f is not None]
        error = removal_error(self.coupling, units, cut.model, feeds)
        if error > _PROVEN:
            raise VerificationError(
                f"pass 'prune-channels': the pruned model differs from the original without the removed slices by "
                f"{error:.1e} of the largest output value, expected less than {_PROVEN}; a coupling rule is wrong"
            )
        return error

    # --- account ---

    def _account(self, found: Sequence[Curve], removed: Sequence[int], best: _Candidate | None) -> dict[str, Any]:
        details = {
            "plan": plan_table(found, self.costs, removed),
            "grid": self.grid,
            **{kind: self.costs.share(kind, removed) for kind in ("macs", "params", "work")},
            **({"predicted_time": self.costs.share("time", removed)} if self._times else {}),
            "reachable": round(self.coupling.reachable(), 4),
        }
        if best is None:
            return details
        details["zero_slice_error"] = best.proof
        details["prune_map"] = prune_map(best.cut)
        details["removed_branches"] = [residual.name for residual in best.cut.residuals]
        for key, score in (("before_repair", best.before), ("after_repair", best.after)):
            if score is not None:
                details[key] = {"sqnr_db": round(score[0], 2), "drop": score[1], "expected_drop": score[2]}
        details["operator_errors"] = {k: [round(v, 6) for v in pair] for k, pair in best.repaired.errors.items()}
        return details


def _units(found: Sequence[Curve], removed: Sequence[int]) -> list[int]:
    return [unit for curve, count in zip(found, removed, strict=True) for unit in curve.order[:count]]
