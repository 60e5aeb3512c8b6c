"""quantize: static int8 with calibration data, laid out for the kernels of ONNX Runtime's CPU provider.

Activations are u8 with zero point, weights s8 per output channel, biases int32 with scale s_x s_w[c]. One pass over
the data collects everything (histograms and second moments); then candidates are built from plain data and judged on
calibration samples that were held out:

1. ranges: extremes, least squared error, or percentile, whichever gives the best outputs;
2. second-order rounding of the weights (rounding.py), kept if the outputs get closer;
3. sequential bias correction (bias_correction.py), likewise;
4. float islands: units that go back to float, for accuracy at little cost or to meet the budget (islands.py).
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from onnxcomp.calibration.data import Dataset
from onnxcomp.calibration.ranges import Method, choose
from onnxcomp.calibration.split import hold_out, limited
from onnxcomp.cpu import has_int8_dot_product
from onnxcomp.errors import UsageError
from onnxcomp.graph import Model
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.passes.bias_correction import correct
from onnxcomp.passes.candidate import Candidate, Decisions, build, first_decisions
from onnxcomp.passes.islands import rescue, tail_in_float
from onnxcomp.passes.judge import Judge
from onnxcomp.passes.moments import Moments, observe_inputs
from onnxcomp.passes.placement import Placement, place
from onnxcomp.passes.rounding import round_with
from onnxcomp.passes.weight_only import compress_weights
from onnxcomp.shapes import infer

__all__ = ["Quantize"]

_MIN_OPSET = 13  # DequantizeLinear with a scale per channel
_MARGIN = 0.7  # of the budget: a few held-out samples do not tell all
_MIN_TO_SPLIT = 40  # samples, of which one in five is held out
_CLEARLY = 0.5  # dB by which cutting off the largest values has to be better than keeping them
_METHODS: tuple[Method, ...] = ("mse", "minmax", "percentile")


@dataclass(frozen=True)
class Quantize(Pass):
    """Static int8 quantization, or with `mode` "weights" int8 storage of the weights under float arithmetic.

    `ranges` chooses activation ranges (auto tries mse, minmax and percentile on held-out samples); `rounding` is
    second-order or nearest; `bias_correction` and `islands` switch these steps; `island_cost` is the share of the
    multiplications that may stay in float for accuracy; `weight_bits` is 7 where processors without int8 dot products
    would saturate (auto: if this one is such); `ops` are the operators to quantize, `skip` names nodes that stay in
    float.
    """

    name: ClassVar[str] = "quantize"
    effect: ClassVar[Effect] = "lossy"
    after: ClassVar[tuple[str, ...]] = (
        *("cleanup", "fold-constants", "fuse", "factorize", "equalize"),
        *("prune-channels", "prune-weights"),
    )

    mode: Literal["static", "weights"] = "static"
    ranges: Literal["auto", "minmax", "percentile", "mse", "entropy"] = "auto"
    rounding: Literal["second-order", "nearest"] = "second-order"
    bias_correction: bool = True
    islands: bool = True
    island_cost: float = 0.02
    weight_bits: Literal["auto", "8", "7"] = "auto"
    ops: tuple[str, ...] = ("Conv", "Gemm", "MatMul")
    skip: tuple[str, ...] = ()

    @property
    def needs_data(self) -> bool:
        return self.mode == "static"

    def run(self, model: Model, ctx: Context) -> Mapping[str, Any]:
        if self.mode == "weights":
            return {"mode": "weights", "stored_as_int8": compress_weights(model, ctx.allow)}
        if ctx.data is None:
            raise UsageError("pass 'quantize' needs calibration data; give them with --calib")
        plan = place(model, model.graph, infer(model), ctx, keep_float=self.skip, ops=self.ops)
        skip = set(self.skip)
        skip |= {u.key for u in plan.units if u.view is not None and not ctx.allow(f"{u.label} to int8")}
        if not any(u.view is not None and u.key not in skip for u in plan.units):
            return {"quantized": 0}
        if model.opset < _MIN_OPSET:
            from onnxcomp.opset import upgrade

            upgrade(model, _MIN_OPSET)
        fit, held = _parts(ctx.data)
        search = _Search(model, ctx, self, Judge(model, held, threads=ctx.threads), fit)
        best = search.run(frozenset(skip))
        if not any(u.view is not None for u in best.units):
            ctx.rewrites.clear()
            return {"quantized": 0, "reason": "8 bits cost more than the budget allows in every part of the model"}
        model.become(best.model)
        return search.account(best)


def _parts(data: Dataset) -> tuple[Dataset, Dataset]:
    """What statistics are taken from, and what candidates are judged on; the same if there is too little to split.

    A handful of held-out samples chooses by chance; rounding decisions hardly overfit.
    """
    if data.length is not None and data.length < _MIN_TO_SPLIT:
        return data, data
    return hold_out(data)


def _largest_code(bits: str) -> int:
    """Largest weight code.

    Where the processor has no int8 dot product, pairs of u8 x s8 are summed in 16 bits: 2 * 255 * 64 fits,
    2 * 255 * 127 does not. ARM has other instructions, and None means unknown: both take all 8 bits.
    """
    saturates = platform.machine().lower() in ("x86_64", "amd64") and has_int8_dot_product() is False
    return 64 if bits == "7" or (bits == "auto" and saturates) else 127


class _Search:
    """Builds candidates and keeps the best. `trail` records what each step brought, in dB."""

    def __init__(self, model: Model, ctx: Context, options: Quantize, judge: Judge, fit: Dataset) -> None:
        self.model = model
        self.ctx = ctx
        self.options = options
        self.judge = judge
        self.fit = fit
        self.trail: dict[str, float] = {}
        self.limit = _largest_code(options.weight_bits)

    def run(self, skip: frozenset[str]) -> Candidate:
        seen = self._observe(skip)
        best = self._best_ranges(seen, skip)
        if self.options.rounding == "second-order":
            best = self._keep_better("second-order rounding", best, self._rounded(best, seen))
        if self.options.bias_correction:
            best = self._corrected(best)
        if self.options.islands:
            best = self._with_islands(best)
        return best

    def _observe(self, skip: frozenset[str]) -> Moments:
        plan = self._place(self.model, skip)
        self.ctx.progress(0.0, "calibrating")
        return observe_inputs(
            self.model,
            plan,
            self.fit,
            grams=self.options.rounding == "second-order",
            threads=self.ctx.threads,
            memory=self.ctx.memory,
            seed=self.ctx.seed,
            progress=self.ctx.progress,
        )

    def _place(self, model: Model, skip: frozenset[str]) -> Placement:
        return place(model, model.graph, infer(model), Context(), keep_float=skip, ops=self.options.ops)

    def _build(self, decisions: Decisions) -> Candidate:
        candidate = build(self.model, decisions, self.options.ops)
        score, drop = self.judge.score(candidate.model)
        return replace(candidate, score=score, drop=drop)

    def _best_ranges(self, seen: Moments, skip: frozenset[str]) -> Candidate:
        methods: tuple[Method, ...] = _METHODS if self.options.ranges == "auto" else (self.options.ranges,)
        plan = self._place(self.model, skip)
        found: list[Candidate] = []
        for number, method in enumerate(methods):
            self.ctx.progress(number / len(methods), f"ranges: {method}")
            chosen = {name: choose(s, method) for name, s in seen.statistics.items()}
            built = self._build(first_decisions(plan, skip, chosen, self.limit))
            found.append(replace(built, ranges=method))
            self.trail[f"ranges {method}"] = found[-1].score
        # What a percentile cuts off may matter on samples that are not here.
        return max(found, key=lambda c: c.score - (_CLEARLY if c.ranges == "percentile" else 0.0))

    def _rounded(self, best: Candidate, seen: Moments) -> Candidate:
        decisions = best.decisions
        weights, biases = dict(decisions.weights), dict(decisions.biases)
        units = [u for u in self._place(self.model, decisions.skip).units if u.view is not None]
        for number, unit in enumerate(units):
            self.ctx.progress(number / len(units), "second-order rounding")
            gram = seen.grams.get(unit.key)
            if gram is not None and unit.view is not None:
                weights[unit.key], shift = round_with(
                    unit.view, decisions.weights[unit.key], gram, centered=unit.takes_bias, limit=self.limit
                )
                if unit.takes_bias:
                    biases[unit.key] = biases[unit.key] + shift
        return self._build(replace(decisions, weights=weights, biases=biases))

    def _corrected(self, best: Candidate) -> Candidate:
        for sweep in range(3):
            self.ctx.progress(sweep / 3, "bias correction")
            biases = correct(self.model, best, limited(self.fit, 64), threads=self.ctx.threads)
            tried = self._build(replace(best.decisions, biases=biases))
            self.trail[f"bias correction {sweep + 1}"] = tried.score
            if tried.score <= best.score:
                break
            best = tried
        return best

    def _with_islands(self, best: Candidate) -> Candidate:
        best = tail_in_float(best, self._build, self.model, self.options.island_cost)
        allowed = self.ctx.max_drop * _MARGIN
        if best.drop > allowed:
            best = rescue(best, self._build, allowed, self.ctx.progress)
        if best.decisions.skip:
            self.trail["float islands"] = best.score
        return best

    def _keep_better(self, what: str, old: Candidate, new: Candidate) -> Candidate:
        self.trail[what] = new.score
        return new if new.score > old.score else old

    def account(self, best: Candidate) -> dict[str, Any]:
        """Details for the report."""
        units = [u for u in best.units if u.view is not None]
        left = {u.key: u.label for u in self._place(self.model, frozenset(self.options.skip)).units}
        return {
            "quantized": len(units),
            "float_islands": sorted(left.get(k, k) for k in best.decisions.skip - set(self.options.skip)),
            "sqnr_db": round(best.score, 2),
            "steps_db": {k: round(v, 2) for k, v in self.trail.items()},
        }
