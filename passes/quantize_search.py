"""The search for the best 8-bit model: one pass over the data, then candidates built from plain data.

Histograms and second moments are collected once. Candidates are judged on calibration samples that were held out:

1. ranges: extremes, least squared error, or percentile, whichever gives the best outputs;
2. channels rescaled by smoothing (smooth.py), where that clearly wins;
3. second-order rounding of the weights (rounding.py), kept if the outputs get closer, also of the model with channels
   rescaled by equalization (equalize.py); the ranges again, one scale for values that meet in a sum
   (common_grids.py), and wider ranges (wider_ranges.py), likewise;
4. the first layers in float, where that is worth their time (islands.py), or with finer inputs (finer_inputs.py); then
   weights re-solved for the noise that rounding adds to their inputs, likewise;
5. other float islands: units that go back to float, for accuracy at little cost or to meet the budget (islands.py),
   together with sequential bias correction (bias_correction.py), which depends on what is in float;
6. with `latency`: groups of units that are no faster in 8 bits go back to float (latency.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from onnxcomp.calibration.split import limited
from onnxcomp.graph import Model
from onnxcomp.macs import count_with_run
from onnxcomp.passes.bias_correction import Corrector
from onnxcomp.passes.builder import CLEARLY, Builder
from onnxcomp.passes.candidate import Candidate, Decisions, first_decisions, updated
from onnxcomp.passes.common_grids import on_common_grids
from onnxcomp.passes.finer_inputs import readers_of_inputs, with_finer_inputs
from onnxcomp.passes.islands import Finish, Price, first_in_float, heads_in_float, rescue, tail_in_float
from onnxcomp.passes.latency import drop_slow_groups, speed_ratio
from onnxcomp.passes.layout import CPU
from onnxcomp.passes.moments import Moments
from onnxcomp.passes.placement import Placement
from onnxcomp.passes.rescale import equalized, smoothed
from onnxcomp.passes.round_units import round_units
from onnxcomp.passes.wider_ranges import asking, cut_off, redrawn, with_wider_ranges

__all__ = ["Search"]

_MARGIN = 0.7  # of the budget: a few held-out samples do not tell all
_CHEAP = 5e9  # multiplications up to which rounding is done a second time
_RESCALE_SAMPLES = 64  # whose largest values per channel the factors follow
_CORRECTION_SAMPLES = 64  # for means
_SWEEPS = 3  # of bias correction, at most
_ENTRIES = (1.0, 8.0)  # weights tried for values at the head of a chain of sums


def _rounding_cost(candidate: Candidate) -> float:
    """Multiplications of rounding all weights, about: weights times inputs of each."""
    views = [u.view for u in candidate.units if u.view is not None]
    return float(sum(v.weight.weight.size * v.weight.weight.size / max(v.outputs, 1) for v in views))


@dataclass(frozen=True)
class _Coarse:
    """The float model before some convolutions, by key, got finer inputs, and what had been decided for it."""

    model: Model
    keys: frozenset[str]
    decisions: Decisions


class Search(Builder):
    """Builds candidates and keeps the best."""

    slow: frozenset[str] = frozenset()  # units that are in float because they are faster so
    coarse: _Coarse | None = None  # what `model` was before its first layers got finer inputs

    def run(self, skip: frozenset[str]) -> Candidate:
        seen = self.observe(skip, self.fit, grams=self.second_order)
        best = self.best_ranges(seen, skip)
        if self.options.rescale:
            best, seen = self._smoothed(best, seen, skip)
        best, nearest, seen = self._equalized(best, seen, skip)
        best = self._ranged_again(best, seen)
        price = self._price()
        if self.options.islands:
            self.ctx.progress(0.5, "trying the first layers in float")
            best = first_in_float(best, self.build, price)
        if self.options.finer_inputs and self.layout is CPU and best.decisions.skip == skip:
            best, nearest, seen = self._with_finer_inputs(best, nearest, seen, price)
        # Re-solved weights lose what a few samples did not show, and only samples held out can tell.
        if self.second_order and self.held_out and _rounding_cost(best) <= _CHEAP:
            start = replace(nearest, skip=best.decisions.skip, chosen=best.decisions.chosen)
            tried = self.rounded(start, seen, noisy=True)
            best = self.keep_better("weights for rounded inputs", best, tried)
        if self.options.islands:
            best = tail_in_float(best, self.build, price)
            rare = self.judge.rare_outputs()
            best = heads_in_float(best, self.build, self.model, self._work, rare, self.options.island_cost)
        finish = self._correction(best.decisions)
        if self.options.islands:
            others = self._redrawn(best)
            found = rescue(best, self.build, finish, self._work, self._enough, self.ctx.progress, others)
        else:
            found = finish(best)
        if found.decisions.skip:
            self.trail["float islands"] = found.score
        if self._timed:
            found = self._faster(found, finish)
        return self._without_float_twins(found)

    def _smoothed(self, best: Candidate, seen: Moments, skip: frozenset[str]) -> tuple[Candidate, Moments]:
        """The model with channels evened out by smoothing, if it clearly wins.

        Ranges of a few samples tell whether all of them are worth another pass over the data.
        """
        few = limited(self.fit, _RESCALE_SAMPLES)
        model = smoothed(self.model, few, self.ctx)
        if model is None:
            return best, seen
        methods = (best.ranges,) if best.ranges else ()
        before = self.best_ranges(self.observe(skip, few), skip, what="few samples, ", methods=methods)
        old, self.model = self.model, model
        first = self.best_ranges(self.observe(skip, few), skip, what="smoothing, few samples, ", methods=methods)
        if first.score >= before.score + CLEARLY / 2:
            new_seen = self.observe(skip, self.fit, grams=self.second_order)
            new = self.best_ranges(new_seen, skip, what="smoothing, ")
            if new.score >= best.score + CLEARLY:
                return new, new_seen
        self.model = old
        return best, seen

    def _equalized(self, best: Candidate, seen: Moments, skip: frozenset[str]) -> tuple[Candidate, Decisions, Moments]:
        """Second-order rounding, of the model with equalized channels if that brings the outputs closer.

        Equalization takes noise from values and adds some to weights, where rounding makes most of it good: what comes
        of it shows behind that only. A channel that few samples hardly show goes beyond a range made for it, so that
        samples held out have to say so. With the candidate come its decisions before rounding, and what was observed.
        """
        rounded = self.second_order_of(best, seen, "")
        unequal = (rounded, best.decisions, seen)
        if not (self.options.rescale and self.held_out and _rounding_cost(best) <= _CHEAP):
            return unequal
        model = equalized(self.model, self.fit, self.ctx)
        if model is None:
            return unequal
        old, self.model = self.model, model
        new_seen = self.observe(skip, self.fit, grams=self.second_order)
        new = self.best_ranges(new_seen, skip, what="equalization, ")
        equal = self.second_order_of(new, new_seen, "equalization, ")
        if equal.score >= rounded.score + CLEARLY / 2:
            return equal, new.decisions, new_seen
        self.model = old
        return unequal

    def _with_finer_inputs(
        self, best: Candidate, nearest: Decisions, seen: Moments, price: Price
    ) -> tuple[Candidate, Decisions, Moments]:
        """The same candidate with first layers that read their input on two grids (finer_inputs.py), if it is worth
        the time. Nothing else changes.
        """
        units = readers_of_inputs(self.model, self.place(self.model, best.decisions.skip).units)
        keys = frozenset(u.key for u in units if price.affordable(best, u))
        if not keys:
            return best, nearest, seen
        old, self.model = self.model, with_finer_inputs(self.model, keys, best.decisions.chosen)
        own = [u for u in self.place(self.model, best.decisions.skip).units if u.key in keys]
        plan = Placement(own, {u.node.inputs[0]: None for u in own})
        found = self.observe_only(plan, self.fit, grams=self.second_order)
        chosen = self.ranges(found, plan, ("mse",))["mse"]
        start = first_decisions(plan, nearest.skip, chosen, self.limit)
        decisions = updated(best.decisions, start)
        if self.second_order:
            decisions = round_units(plan, decisions, found, limit=self.limit, noisy=False)
        tried = self.build(decisions)
        self.trail["finer inputs"] = tried.score
        if price.buys(best, tried):
            self.coarse = _Coarse(old, keys, best.decisions)
            return tried, updated(nearest, start), seen.with_more(found)
        self.model = old
        return best, nearest, seen

    def _ranged_again(self, best: Candidate, seen: Moments) -> Candidate:
        """The ranges chosen once more, now that the weights add less noise of their own; common grids; wider ranges."""
        plan = self.place(self.model, best.decisions.skip)
        if self.second_order:
            ranges = self.ranges(seen, plan)
            again = self.ranged(best.decisions, ranges, "second-order rounding, ", known=best)
            best = self.keep_better("ranges again", best, again)
        for entry in _ENTRIES if self.layout is CPU else ():
            shared = on_common_grids(plan, best.decisions.chosen, seen.statistics, entry)
            if shared is not None:
                tried = self.build(replace(best.decisions, chosen=shared))
                best = self.keep_better(f"common grids {entry:g}", best, tried)
        return self._widened(best, plan, seen) if self.options.ranges == "auto" else best

    def _widened(self, best: Candidate, plan: Placement, seen: Moments) -> Candidate:
        """Wider ranges where they bring the outputs closer, those of calibration samples as well: no range was chosen
        by its outputs yet, and large values are rare, so that more samples tell more.
        """
        if self.ctx.data is None or not cut_off(best, plan, seen.statistics):
            return best
        judge = asking(self.model, self.ctx.data, sum(self._work.values()), threads=self.ctx.threads)
        start = self.build(best.decisions, judge)
        found = with_wider_ranges(start, plan, seen.statistics, lambda d: self.build(d, judge), self.ctx.progress)
        if found is start:
            return best
        found = self.build(found.decisions)
        self.trail["wider ranges"] = found.score
        return found

    def _correction(self, start: Decisions) -> Finish:
        """What corrects the biases of a candidate with the units of `start`, or some of them in float, from scratch."""
        if not self.options.bias_correction:
            return lambda candidate: candidate
        self.ctx.progress(0.0, "bias correction")
        few = limited(self.fit, _CORRECTION_SAMPLES)
        corrector = Corrector(self.model, start.skip, few, threads=self.ctx.threads, layout=self.layout)

        def corrected(best: Candidate) -> Candidate:
            if best.decisions.biases is not start.biases:
                best = self.build(replace(best.decisions, biases=start.biases))
            for sweep in range(_SWEEPS):
                self.ctx.progress((sweep + 1) / (_SWEEPS + 1), "bias correction")
                tried = self.build(replace(best.decisions, biases=corrector.correct(best)))
                self.trail.setdefault(f"bias correction {sweep + 1}", tried.score)
                if tried.score <= best.score:
                    break
                best = tried
            return best

        return corrected

    def _redrawn(self, best: Candidate) -> Iterable[Candidate]:
        """Others of the kind of `best`, where the samples held out are content with that."""
        if best.drop > self.ctx.max_drop * _MARGIN:
            return ()
        # Inputs that are read on two grids need just these.
        names = (best if self.coarse is None else self.coarse).decisions.chosen.keys() & best.decisions.chosen.keys()
        return redrawn(best, names, self.build)

    def _enough(self, candidate: Candidate) -> bool:
        """What the check that comes later says; without one, the few samples that are held out from calibration."""
        check = self.ctx.check
        return candidate.drop <= self.ctx.max_drop * _MARGIN if check is None else check(candidate.model)

    def _price(self) -> Price:
        """Islands cost time where it is measured, multiplications elsewhere."""
        if not self._timed:
            return Price(self._work, self.options.island_cost)

        def slowdown(old: Candidate, new: Candidate) -> float:
            return 1 / speed_ratio(old.model, new.model, self._one_sample(), threads=self.ctx.threads)

        return Price(self._work, self.options.island_cost, slowdown)

    @property
    def _timed(self) -> bool:
        return self.options.latency and self.layout is CPU

    @cached_property
    def _work(self) -> Mapping[str, int]:
        """Multiplications for one sample, by the unit's key: shapes of many models are open until it runs."""
        counted = count_with_run(self.model, feeds=self._one_sample())[1]
        return {node.outputs[0].name: macs for node, macs in counted.nodes.items()}

    def _one_sample(self) -> Mapping[str, Any]:
        return next(iter(self.fit.batches(1))).feeds

    def _faster(self, best: Candidate, finish: Finish) -> Candidate:
        """Give back to float what is slower in 8 bits on this machine; see latency.py."""
        if not any(u.view is not None for u in best.units):
            return best
        self.ctx.progress(0.9, "timing groups of layers")
        floats = self.model if self.coarse is None else self.coarse.model
        faster = drop_slow_groups(best, self.build, floats, self._one_sample(), threads=self.ctx.threads)
        self.slow = faster.decisions.skip - best.decisions.skip
        return max(faster, finish(faster), key=lambda c: c.score) if self.slow else best

    def _without_float_twins(self, best: Candidate) -> Candidate:
        """Convolutions that are in float after all read their input once."""
        coarse, decisions = self.coarse, best.decisions
        if coarse is None or not coarse.keys & decisions.skip:
            return best
        self.model = coarse.model
        weights = {k: w for k, w in coarse.decisions.weights.items() if k in coarse.keys}
        biases = {k: b for k, b in coarse.decisions.biases.items() if k in coarse.keys}
        return self.build(updated(decisions, Decisions(decisions.skip, coarse.decisions.chosen, weights, biases)))

    def account(self, best: Candidate) -> dict[str, Any]:
        """Details for the report."""
        units = [u for u in best.units if u.view is not None]
        left = {u.key: u.label for u in self.place(self.model, frozenset(self.options.skip)).units}
        return {
            "quantized": len(units),
            "float_islands": sorted(left.get(k, k) for k in best.decisions.skip - set(self.options.skip) - self.slow),
            **({"float_for_speed": sorted(left.get(k, k) for k in self.slow)} if self.slow else {}),
            "sqnr_db": round(best.sqnr, 2),
            "steps_db": {k: round(v, 2) for k, v in self.trail.items()},
        }
