"""Candidates of an int8 model: what they are built from, and what a judge says of them.

Everything is decided in plain data (candidate.py) about one float model, `Builder.model`, which a search may replace by
one that computes the same.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from onnxcomp.calibration.affine import QuantParameters
from onnxcomp.calibration.data import Dataset
from onnxcomp.calibration.ranges import Method, choose
from onnxcomp.cpu import has_int8_dot_product
from onnxcomp.graph import Model
from onnxcomp.manager import Context
from onnxcomp.passes.candidate import Candidate, Decisions, build, first_decisions
from onnxcomp.passes.judge import Judge
from onnxcomp.passes.layout import CPU, Layout
from onnxcomp.passes.moments import Moments, observe_inputs
from onnxcomp.passes.placement import Placement
from onnxcomp.passes.read_through import read_through
from onnxcomp.passes.round_units import round_units
from onnxcomp.shapes import infer

if TYPE_CHECKING:
    from onnxcomp.passes.quantize import Quantize

__all__ = ["CLEARLY", "Builder"]

CLEARLY = 0.5  # dB by which a choice has to win that may have won by chance
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


class Builder:
    """Observes a model, and builds candidates of a layout. `trail` records what each step brought, in dB.

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
        self.limit = _largest_code(options.weight_bits, layout)

    @property
    def second_order(self) -> bool:
        return self.options.rounding == "second-order"

    def observe(self, skip: frozenset[str], data: Dataset, *, grams: bool = False) -> Moments:
        return self.observe_only(self.place(self.model, skip), data, grams=grams)

    def observe_only(self, plan: Placement, data: Dataset, *, grams: bool = False) -> Moments:
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

    def place(self, model: Model, skip: frozenset[str]) -> Placement:
        return self.layout.place(model, model.graph, infer(model), Context(), keep_float=skip, ops=self.options.ops)

    def build(self, decisions: Decisions, judge: Judge | None = None) -> Candidate:
        """The candidate, and what the judge of this search says of it, or another one."""
        candidate = build(self.model, decisions, self.options.ops, self.layout)
        found = (judge or self.judge).assess(candidate.model)
        return replace(candidate, sqnr=found.sqnr, score=(found.sqnr + found.typical) / 2, drop=found.drop)

    def best_ranges(
        self, seen: Moments, skip: frozenset[str], *, what: str = "", methods: tuple[Method, ...] = ()
    ) -> Candidate:
        """The best candidate of the methods to choose ranges, with weights rounded to nearest."""
        plan = self.place(self.model, skip)
        start = first_decisions(plan, skip, {}, self.limit)
        return self.ranged(start, self.ranges(seen, plan, methods), what)

    def ranges(
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

    def ranged(
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
                found.append(replace(self.build(replace(decisions, chosen=chosen)), ranges=method))
            self.trail[f"{what}ranges {method}"] = found[-1].score
        # What a percentile cuts off may matter on samples that are not here.
        return max(found, key=lambda c: c.score - (CLEARLY if c.ranges == "percentile" else 0.0))

    def rounded(self, decisions: Decisions, seen: Moments, *, noisy: bool = False) -> Candidate:
        self.ctx.progress(0.5, "second-order rounding")
        plan = self.place(self.model, decisions.skip)
        return self.build(round_units(plan, decisions, seen, limit=self.limit, noisy=noisy))

    def second_order_of(self, best: Candidate, seen: Moments, what: str) -> Candidate:
        if not self.second_order:
            return best
        return self.keep_better(f"{what}second-order rounding", best, self.rounded(best.decisions, seen))

    def keep_better(self, what: str, old: Candidate, new: Candidate) -> Candidate:
        self.trail[what] = new.score
        return new if new.score > old.score else old
