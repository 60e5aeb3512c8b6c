"""The search for the best 8-bit model: one pass over the data, then candidates built from plain data.

Histograms and second moments are collected once. Candidates are judged on calibration samples that were held out:

1. ranges: extremes, least squared error, or percentile, whichever gives the best outputs;
2. channels rescaled by smoothing (smooth.py), where that clearly wins;
3. second-order rounding of the weights (rounding.py), kept if the outputs get closer, also of the model with channels
   rescaled by equalization (equalize.py); the ranges again, and one scale for values that meet in a sum
   (common_grids.py), likewise;
4. the first layers in float, where that is worth their time (islands.py), or with finer inputs (finer_inputs.py); then
   weights re-solved for the noise that rounding adds to their inputs, likewise;
5. sequential bias correction (bias_correction.py), likewise;
6. other float islands: units that go back to float, for accuracy at little cost or to meet the budget (islands.py);
7. with `latency`: groups of units that are no faster in 8 bits go back to float (latency.py).
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from onnxcomp.calibration.affine import QuantParameters
from onnxcomp.calibration.data import Dataset
from onnxcomp.calibration.ranges import Method, choose
from onnxcomp.calibration.split import limited
from onnxcomp.cpu import has_int8_dot_product
from onnxcomp.graph import Model
from onnxcomp.manager import Context
from onnxcomp.passes.bias_correction import Corrector
from onnxcomp.passes.candidate import Candidate, Decisions, build, first_decisions, updated
from onnxcomp.passes.common_grids import on_common_grids
from onnxcomp.passes.finer_inputs import readers_of_inputs, with_finer_inputs
from onnxcomp.passes.islands import Price, first_in_float, heads_in_float, rescue, tail_in_float
from onnxcomp.passes.judge import Judge
from onnxcomp.passes.latency import drop_slow_groups, speed_ratio
from onnxcomp.passes.layout import CPU, Layout
from onnxcomp.passes.moments import Moments, observe_inputs
from onnxcomp.passes.placement import Placement
from onnxcomp.passes.read_through import read_through
from onnxcomp.passes.rescale import equalized, smoothed
from onnxcomp.passes.round_units import round_units
from onnxcomp.shapes import infer

if TYPE_CHECKING:
    from onnxcomp.passes.quantize import Quantize

__all__ = ["Search"]

_MARGIN = 0.7  # of the budget: a few held-out samples do not tell all
_CLEARLY = 0.5  # dB by which a choice has to win that may have won by chance
_CHEAP = 5e9  # multiplications up to which rounding is done a second time
_RESCALE_SAMPLES = 64  # whose largest values per channel the factors follow
_CORRECTION_SAMPLES = 64  # for means
_ENTRIES = (1.0, 8.0)  # weights tried for values at the head of a chain of sums
_METHODS: tuple[Method, ...] = ("mse", "minmax", "percentile")


def _largest_code(bits: str, layout: Layout) -> int:
    """Largest weight code.

    Where the processor has no int8 dot product, pairs of u8 x s8 are summed in 16 bits: 2 * 255 * 64 fits,
    2 * 255 * 127 does not. ARM has other instructions, and None means unknown: both take all 8 bits.
    """
    if layout is not CPU:
        return 64 if bits == "7" else 127
    saturates = platform.machine().lower() in ("x86_64", "amd64") and has_int8_dot_product() is False
    return 64 if bits == "7" or (bits == "auto" and saturates) else 127


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


class Search:
    """Builds candidates of a layout and keeps the best. `trail` records what each step brought, in dB.

    `fit` is what statistics are taken from, `judge` compares on samples held out (`held_out`; on the same where there
    are too few to split), `options` are those of the pass.
    """

    def __init__(
        self,
        model: Model,
        ctx: Context,
        options: Quantize,
        judge: Judge,
        fit: Dataset,
        layout: Layout,
        *,
        held_out: bool = True,
    ) -> None:
        self.model = model
        self.ctx = ctx
        self.options = options
        self.judge = judge
        self.fit = fit
        self.layout = layout
        self.held_out = held_out
        self.trail: dict[str, float] = {}
        self.slow: frozenset[str] = frozenset()  # units that are in float because they are faster so
        self.coarse: _Coarse | None = None  # what `model` was before its first layers got finer inputs
        self.limit = _largest_code(options.weight_bits, layout)

    def run(self, skip: frozenset[str]) -> Candidate:
        seen = self._observe(skip, self.fit, grams=self._second_order)
        best = self._best_ranges(seen, skip)
        if self.options.rescale:
            best, seen = self._smoothed(best, seen, skip)
        best, nearest, seen = self._equalized(best, seen, skip)
        best = self._ranged_again(best, seen)
        price = self._price()
        if self.options.islands:
            self.ctx.progress(0.5, "trying the first layers in float")
            best = first_in_float(best, self._build, price)
        if self.options.finer_inputs and self.layout is CPU and best.decisions.skip == skip:
            best, nearest, seen = self._with_finer_inputs(best, nearest, seen, price)
        # Re-solved weights lose what a few samples did not show, and only samples held out can tell.
        if self._second_order and self.held_out and _rounding_cost(best) <= _CHEAP:
            start = replace(nearest, skip=best.decisions.skip, chosen=best.decisions.chosen)
            tried = self._rounded(start, seen, noisy=True)
            best = self._keep_better("weights for rounded inputs", best, tried)
        if self.options.bias_correction:
            best = self._corrected(best)
        if self.options.islands:
            best = self._with_islands(best, price)
        if self._timed:
            best = self._faster(best)
        return self._without_float_twins(best)

    def _smoothed(self, best: Candidate, seen: Moments, skip: frozenset[str]) -> tuple[Candidate, Moments]:
        """The model with channels evened out by smoothing, if it clearly wins.

        Ranges of a few samples tell whether all of them are worth another pass over the data.
        """
        few = limited(self.fit, _RESCALE_SAMPLES)
        model = smoothed(self.model, few, self.ctx)
        if model is None:
            return best, seen
        methods = (best.ranges,) if best.ranges else ()
        before = self._best_ranges(self._observe(skip, few), skip, what="few samples, ", methods=methods)
        old, self.model = self.model, model
        first = self._best_ranges(self._observe(skip, few), skip, what="smoothing, few samples, ", methods=methods)
        if first.score >= before.score + _CLEARLY / 2:
            new_seen = self._observe(skip, self.fit, grams=self._second_order)
            new = self._best_ranges(new_seen, skip, what="smoothing, ")
            if new.score >= best.score + _CLEARLY:
                return new, new_seen
        self.model = old
        return best, seen

    def _equalized(
        self, best: Candidate, seen: Moments, skip: frozenset[str]
    ) -> tuple[Candidate, Decisions, Moments]:
        """Second-order rounding, of the model with equalized channels if that brings the outputs closer.

        Equalization takes noise from values and adds some to weights, where rounding makes most of it good: what comes
        of it shows behind that only. A channel that few samples hardly show goes beyond a range made for it, so that
        samples held out have to say so. With the candidate come its decisions before rounding, and what was observed.
        """
        rounded = self._second_order_of(best, seen, "")
        unequal = (rounded, best.decisions, seen)
        if not (self.options.rescale and self.held_out and _rounding_cost(best) <= _CHEAP):
            return unequal
        model = equalized(self.model, self.fit, self.ctx)
        if model is None:
            return unequal
        old, self.model = self.model, model
        new_seen = self._observe(skip, self.fit, grams=self._second_order)
        new = self._best_ranges(new_seen, skip, what="equalization, ")
        equal = self._second_order_of(new, new_seen, "equalization, ")
        if equal.score >= rounded.score + _CLEARLY / 2:
            return equal, new.decisions, new_seen
        self.model = old
        return unequal

    def _second_order_of(self, best: Candidate, seen: Moments, what: str) -> Candidate:
        if not self._second_order:
            return best
        return self._keep_better(f"{what}second-order rounding", best, self._rounded(best.decisions, seen))

    def _with_finer_inputs(
        self, best: Candidate, nearest: Decisions, seen: Moments, price: Price
    ) -> tuple[Candidate, Decisions, Moments]:
        """The same candidate with first layers that read their input on two grids (finer_inputs.py), if it is worth
        the time. Nothing else changes.
        """
        units = readers_of_inputs(self.model, self._place(self.model, best.decisions.skip).units)
        keys = frozenset(u.key for u in units if price.affordable(best, u))
        if not keys:
            return best, nearest, seen
        old, self.model = self.model, with_finer_inputs(self.model, keys, best.decisions.chosen)
        own = [u for u in self._place(self.model, best.decisions.skip).units if u.key in keys]
        plan = Placement(own, {u.node.inputs[0]: None for u in own})
        found = self._observe_only(plan, self.fit, grams=self._second_order)
        chosen = self._ranges(found, plan, ("mse",))["mse"]
        start = first_decisions(plan, nearest.skip, chosen, self.limit)
        decisions = updated(best.decisions, start)
        if self._second_order:
            decisions = round_units(plan, decisions, found, limit=self.limit, noisy=False)
        tried = self._build(decisions)
        self.trail["finer inputs"] = tried.score
        if price.buys(best, tried):
            self.coarse = _Coarse(old, keys, best.decisions)
            return tried, updated(nearest, start), seen.with_more(found)
        self.model = old
        return best, nearest, seen

    @property
    def _second_order(self) -> bool:
        return self.options.rounding == "second-order"

    def _observe(self, skip: frozenset[str], data: Dataset, *, grams: bool = False) -> Moments:
        return self._observe_only(self._place(self.model, skip), data, grams=grams)

    def _observe_only(self, plan: Placement, data: Dataset, *, grams: bool = False) -> Moments:
        self.ctx.progress(0.0, "calibrating")
        return observe_inputs(
            self.model,
            plan,
            data,
            grams=grams,
            threads=self.ctx.threads,
            memory=self.ctx.memory,
            seed=self.ctx.seed,
            progress=self.ctx.progress,
        )

    def _place(self, model: Model, skip: frozenset[str]) -> Placement:
        return self.layout.place(model, model.graph, infer(model), Context(), keep_float=skip, ops=self.options.ops)

    def _build(self, decisions: Decisions) -> Candidate:
        candidate = build(self.model, decisions, self.options.ops, self.layout)
        found = self.judge.assess(candidate.model)
        return replace(candidate, sqnr=found.sqnr, score=(found.sqnr + found.typical) / 2, drop=found.drop)

    def _best_ranges(
        self, seen: Moments, skip: frozenset[str], *, what: str = "", methods: tuple[Method, ...] = ()
    ) -> Candidate:
        """The best candidate of the methods to choose ranges, with weights rounded to nearest."""
        plan = self._place(self.model, skip)
        start = first_decisions(plan, skip, {}, self.limit)
        return self._ranged(start, self._ranges(seen, plan, methods), what)

    def _ranges(
        self, seen: Moments, plan: Placement, methods: tuple[Method, ...] = ()
    ) -> dict[Method, dict[str, QuantParameters]]:
        """The parameters of all values by each method."""
        methods = methods or (_METHODS if self.options.ranges == "auto" else (self.options.ranges,))
        functions, signed = read_through(plan), self.layout.signed
        return {
            method: {
                name: choose(found, method, signed=signed, through=functions.get(name))
                for name, found in seen.statistics.items()
            }
            for method in methods
        }

    def _ranged(
        self,
        decisions: Decisions,
        ranges: Mapping[Method, Mapping[str, QuantParameters]],
        what: str,
        known: Candidate | None = None,
    ) -> Candidate:
        """The best of the methods; `known` was built from `decisions` as they are, and need not be built again."""
        found: list[Candidate] = []
        for number, (method, chosen) in enumerate(ranges.items()):
            self.ctx.progress(number / len(ranges), f"ranges: {method}")
            if known is not None and known.decisions.chosen == chosen:
                found.append(replace(known, ranges=method))
            else:
                found.append(replace(self._build(replace(decisions, chosen=chosen)), ranges=method))
            self.trail[f"{what}ranges {method}"] = found[-1].score
        # What a percentile cuts off may matter on samples that are not here.
        return max(found, key=lambda c: c.score - (_CLEARLY if c.ranges == "percentile" else 0.0))

    def _ranged_again(self, best: Candidate, seen: Moments) -> Candidate:
        """The ranges chosen once more, now that the weights add less noise of their own, and common grids."""
        plan = self._place(self.model, best.decisions.skip)
        if self._second_order:
            ranges = self._ranges(seen, plan)
            again = self._ranged(best.decisions, ranges, "second-order rounding, ", known=best)
            best = self._keep_better("ranges again", best, again)
        for entry in _ENTRIES if self.layout is CPU else ():
            shared = on_common_grids(plan, best.decisions.chosen, seen.statistics, entry)
            if shared is not None:
                tried = self._build(replace(best.decisions, chosen=shared))
                best = self._keep_better(f"common grids {entry:g}", best, tried)
        return best

    def _rounded(self, decisions: Decisions, seen: Moments, *, noisy: bool = False) -> Candidate:
        self.ctx.progress(0.5, "second-order rounding")
        plan = self._place(self.model, decisions.skip)
        return self._build(round_units(plan, decisions, seen, limit=self.limit, noisy=noisy))

    def _corrected(self, best: Candidate) -> Candidate:
        self.ctx.progress(0.0, "bias correction")
        few = limited(self.fit, _CORRECTION_SAMPLES)
        corrector = Corrector(self.model, best.decisions.skip, few, threads=self.ctx.threads, layout=self.layout)
        for sweep in range(3):
            self.ctx.progress((sweep + 1) / 4, "bias correction")
            tried = self._build(replace(best.decisions, biases=corrector.correct(best)))
            self.trail[f"bias correction {sweep + 1}"] = tried.score
            if tried.score <= best.score:
                break
            best = tried
        return best

    def _with_islands(self, best: Candidate, price: Price) -> Candidate:
        best = tail_in_float(best, self._build, price)
        rare = self.judge.rare_outputs()
        best = heads_in_float(best, self._build, self.model, rare, self.options.island_cost)
        allowed = self.ctx.max_drop * _MARGIN
        if best.drop > allowed:
            best = rescue(best, self._build, allowed, self.ctx.progress)
        if best.decisions.skip:
            self.trail["float islands"] = best.score
        return best

    def _price(self) -> Price:
        """Islands cost time where it is measured, multiplications elsewhere."""
        if not self._timed:
            return Price(self.model, self.options.island_cost)

        def slowdown(old: Candidate, new: Candidate) -> float:
            return 1 / speed_ratio(old.model, new.model, self._one_sample(), threads=self.ctx.threads)

        return Price(self.model, self.options.island_cost, slowdown)

    @property
    def _timed(self) -> bool:
        return self.options.latency and self.layout is CPU

    def _one_sample(self) -> Mapping[str, Any]:
        return next(iter(self.fit.batches(1))).feeds

    def _faster(self, best: Candidate) -> Candidate:
        """Give back to float what is slower in 8 bits on this machine; see latency.py."""
        if not any(u.view is not None for u in best.units):
            return best
        self.ctx.progress(0.9, "timing groups of layers")
        floats = self.model if self.coarse is None else self.coarse.model
        faster = drop_slow_groups(best, self._build, floats, self._one_sample(), threads=self.ctx.threads)
        self.slow = faster.decisions.skip - best.decisions.skip
        return faster

    def _without_float_twins(self, best: Candidate) -> Candidate:
        """Convolutions that are in float after all read their input once."""
        coarse, decisions = self.coarse, best.decisions
        if coarse is None or not coarse.keys & decisions.skip:
            return best
        self.model = coarse.model
        weights = {k: w for k, w in coarse.decisions.weights.items() if k in coarse.keys}
        biases = {k: b for k, b in coarse.decisions.biases.items() if k in coarse.keys}
        return self._build(updated(decisions, Decisions(decisions.skip, coarse.decisions.chosen, weights, biases)))

    def _keep_better(self, what: str, old: Candidate, new: Candidate) -> Candidate:
        self.trail[what] = new.score
        return new if new.score > old.score else old

    def account(self, best: Candidate) -> dict[str, Any]:
        """Details for the report."""
        units = [u for u in best.units if u.view is not None]
        left = {u.key: u.label for u in self._place(self.model, frozenset(self.options.skip)).units}
        return {
            "quantized": len(units),
            "float_islands": sorted(left.get(k, k) for k in best.decisions.skip - set(self.options.skip) - self.slow),
            **({"float_for_speed": sorted(left.get(k, k) for k in self.slow)} if self.slow else {}),
            "sqnr_db": round(best.sqnr, 2),
            "steps_db": {k: round(v, 2) for k, v in self.trail.items()},
        }
