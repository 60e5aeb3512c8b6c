"""From a budget to a factorized model: options per operator, their measured gain, a plan, and the account of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.split import hold_out
from onnxcomp.concrete import concrete_types
from onnxcomp.graph import Model
from onnxcomp.macs import count_macs
from onnxcomp.manager import Context
from onnxcomp.pass_options import matches
from onnxcomp.passes import dim_grid
from onnxcomp.passes.dim_replay import piece
from onnxcomp.passes.dim_sites import Site, collect_grams, sites
from onnxcomp.passes.factor_sites import Pair, apply, candidates, time_ratio
from onnxcomp.passes.judge import Judges, acceptable
from onnxcomp.passes.sparse_plan import Curve, allocate

if TYPE_CHECKING:
    from onnxcomp.passes.factorize import Factorize

__all__ = ["Search"]

Array = npt.NDArray[Any]
_SHARES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95)  # of an operator's cost, at which ranks are tried
_COMPARED = 0.5  # share of the cost at which schemes are compared
_FASTER = 0.95  # share of the time below which a pair counts as faster
_GAIN = 0.98  # share of the model's time below which it counts as faster
_STEPS = tuple(s / 20 for s in range(1, 21))  # shares of what can be saved, tried for a drop


@dataclass(frozen=True)
class _Choice:
    """One rank of one operator: the relative error of its output, and the time of the pair (None: not measured)."""

    pair: Pair
    rank: int
    error: float
    time: float | None

    @property
    def key(self) -> str:
        return str(self.pair.site.node.outputs[0].name)


@dataclass(frozen=True)
class _Candidate:
    model: Model
    chosen: Sequence[_Choice]
    score: tuple[float, float] | None


class Search:
    """One run of the pass on a model."""

    def __init__(self, model: Model, options: Factorize, ctx: Context) -> None:
        assert ctx.data is not None  # the pass checks
        self.model = model
        self.options = options
        self.ctx = ctx
        self.fit, held = hold_out(ctx.data)
        self.judges = Judges(model, held, threads=ctx.threads)
        self.feeds = next(iter(ctx.data.batches(1))).feeds
        self.known = {name: np.shape(value) for name, value in self.feeds.items()}

    def run(self) -> dict[str, Any]:
        """Factorize `model` in place; details for the report."""
        found = self._choices()
        best = self._best(found) if found else None
        mark = len(self.ctx.rewrites)
        chosen = [] if best is None else [c for c in best.chosen if self.ctx.allow(_rewrite(c))]
        if best is None or not chosen:
            return {"factorized": 0, "reason": "no operator gains enough from being split"}
        if len(chosen) < len(best.chosen):
            best = self._built(chosen)
        time = None
        if self.options.goal == "latency":
            time = dim_grid.time_ratio(self.model, best.model, self.feeds, threads=self.ctx.threads)
            if self.options.searching and time > _GAIN:
                self.ctx.refuse("the model", f"with all pairs it takes {time:.2f} of the time on this machine: no gain")
                self.ctx.withdraw(mark)
                return {"factorized": 0, "reason": "the pairs are faster alone, the model is not"}
        before = self._costs(self.model)
        self.model.become(best.model)
        after = self._costs(self.model)
        details: dict[str, Any] = {
            "factorized": len(chosen),
            "macs": round(after[0] / max(before[0], 1), 4),
            "params": round(after[1] / max(before[1], 1), 4),
            "layers": [_row(c) for c in chosen],
        }
        for kind in ("macs", "params"):
            if details[kind] > (getattr(self.options, kind) or 1.0):
                self.ctx.refuse("the model", f"{details[kind]:.3f} of its {kind} stay, as no other split gains here")
        if time is not None:
            details["time"] = round(time, 3)
        if best.score is not None:
            details["sqnr_db"], details["held_out_drop"] = round(best.score[0], 2), best.score[1]
        return details

    def _costs(self, model: Model) -> tuple[int, int]:
        weights = {id(s.view.weight): s.view.weight.weight.size for s in sites(model)}
        return count_macs(model, known=self.known).total, sum(weights.values())

    # --- budget ---

    def _best(self, found: Sequence[Sequence[_Choice]]) -> _Candidate | None:
        options = self.options
        if options.ratio is not None:
            return self._built([choices[0] for choices in found])
        curves = [self._curve(choices) for choices in found]
        if options.searching:
            return self._furthest(found, curves)
        total = self._costs(self.model)[0 if options.params is None else 1]
        share = (1 - float(options.params if options.macs is None else options.macs)) * total  # type: ignore[arg-type]
        return self._built(_planned(found, curves, share / sum(c.size for c in curves)))

    def _furthest(self, found: Sequence[Sequence[_Choice]], curves: Sequence[Curve]) -> _Candidate | None:
        """By bisection the largest saving that keeps the drop."""
        budget = self.ctx.max_drop if self.options.drop is None else self.options.drop
        most = sum(c.size * float(c.levels[-1]) for c in curves) / sum(c.size for c in curves)
        best: _Candidate | None = None
        low, high = 0, len(_STEPS)
        while low < high:
            middle = (low + high) // 2
            candidate = self._built(_planned(found, curves, most * _STEPS[middle]))
            if candidate.score is not None and acceptable(candidate.score, budget):
                low, best = middle + 1, candidate
            else:
                high = middle
        return best

    def _built(self, chosen: Sequence[_Choice]) -> _Candidate:
        copy = self.model.copy()
        for choice in chosen:
            apply(copy, choice.pair, choice.rank)
        return _Candidate(copy, chosen, None if self.judges.whole is None else self.judges.whole.score(copy))

    def _curve(self, choices: Sequence[_Choice]) -> Curve:
        """Error over the share of the cost that is saved, scaled to the noise on the model's outputs."""
        full = self._cost(choices[0])[1]
        levels = [0.0, *(1 - self._cost(c)[0] / full for c in choices)]
        errors = np.maximum.accumulate([0.0, *(max(c.error, 1e-12) for c in choices)])
        curve = Curve(choices[0].key, full, np.asarray(levels), np.asarray(errors))
        judge = self.judges.probing if self.options.sensitivity else None
        if judge is None:
            return curve
        probe = choices[len(choices) // 2]
        copy = self.model.copy()
        apply(copy, probe.pair, probe.rank)
        noise = min(10 ** (-judge.score(copy)[0] / 10), 1e6)
        return Curve(curve.key, curve.size, curve.levels, curve.errors * noise / max(probe.error, 1e-12))

    def _cost(self, choice: _Choice) -> tuple[int, int]:
        """What the plan saves: parameters or multiplications of the pair, and of the operator."""
        pair = choice.pair
        if self._saves_params:
            return pair.params_at(choice.rank), pair.params
        return pair.macs_at(choice.rank), pair.macs

    @property
    def _saves_params(self) -> bool:
        return self.options.params is not None or (self.options.goal == "size" and self.options.macs is None)

    # --- options ---

    def _choices(self) -> list[list[_Choice]]:
        """For each operator that gains from it the ranks that do, from the largest to the smallest."""
        chosen = [s for s in sites(self.model) if self._wanted(s)]
        self.ctx.progress(0.0, "calibrating")
        grams = collect_grams(
            self.model,
            chosen,
            self.fit,
            threads=self.ctx.threads,
            memory=self.ctx.memory,
            seed=self.ctx.seed,
            progress=self.ctx.progress,
        )
        types = concrete_types(self.model, known=self.known)
        tensors = {t for node in self.model.graph.nodes for t in (*node.inputs, *node.outputs)}
        shapes = {t: tuple(map(int, types[t].shape or ())) for t in tensors if types[t].size is not None}  # type: ignore[arg-type]
        found = []
        for pairs in candidates(self.model, self._wanted, grams, shapes, self.ctx.refuse):
            self.ctx.progress(0.5, f"splitting {pairs[0].site.node.label}")
            if options := self._gaining(self._closest(pairs)):
                found.append(options)
        return found

    def _wanted(self, site: Site) -> bool:
        given = [site.view.weight.name, site.node.label]
        if self.options.only and not matches(given, self.options.only):
            return False
        return not matches(given, self.options.skip)

    def _closest(self, pairs: Sequence[Pair]) -> Pair:
        """The scheme that loses least at the same cost."""

        def error(pair: Pair) -> float:
            rank = min(max(1, int(_COMPARED * self._full(pair) / self._at(pair, 1))), pair.split.rank)
            return pair.split.error(pair.split.product(*pair.split.factors(rank)))

        return pairs[0] if len(pairs) == 1 else min(pairs, key=error)

    def _at(self, pair: Pair, rank: int) -> int:
        return pair.params_at(rank) if self._saves_params else pair.macs_at(rank)

    def _full(self, pair: Pair) -> int:
        return pair.params if self._saves_params else pair.macs

    def _gaining(self, pair: Pair) -> list[_Choice]:
        shares = {max(1, int(s * self._full(pair) / self._at(pair, 1))) for s in _SHARES}
        if self.options.ratio is not None:
            shares = {max(1, round(self.options.ratio * pair.split.rank))}
        value = None
        reason, found = "", []
        for rank in sorted((r for r in shares if r <= pair.split.rank), reverse=True):
            macs, params = pair.macs_at(rank) / pair.macs, pair.params_at(rank) / pair.params
            small = f"rank {rank} of {pair.split.rank} ({pair.split.scheme}) takes {macs:.2f} of the multiplications"
            time = None
            if self.options.goal == "size":
                gains, reason = params < 1, f"{small} and {params:.2f} of the parameters"
            elif macs >= 1:
                gains, reason = False, small
            else:
                value = self._input(pair) if value is None else value
                time = time_ratio(self.model, pair, rank, value, self.ctx.threads)
                gains, reason = time < _FASTER, f"{small} but {time:.2f} of the time"
            if gains:
                error = pair.split.error(pair.split.product(*pair.split.factors(rank)))
                found.append(_Choice(pair, rank, error, time))
        if not found:
            self.ctx.refuse(pair.site.node.label, reason or "it is too small to be split")
        return found

    def _input(self, pair: Pair) -> Array:
        name = pair.site.node.inputs[0].name
        if name in self.feeds:
            return np.asarray(self.feeds[name])
        session = piece(self.model, {}, [name], self.ctx.threads)
        return np.asarray(session.run({spec.name: self.feeds[spec.name] for spec in session.inputs}, [name])[0])


def _planned(found: Sequence[Sequence[_Choice]], curves: Sequence[Curve], saving: float) -> list[_Choice]:
    """The choices that save this share of the cost in all, or as much as they can, at least error."""
    plan = allocate(curves, saving)
    chosen = []
    for choices, curve in zip(found, curves, strict=True):
        place = int(np.searchsorted(curve.levels, plan[curve.key] - 1e-9))
        if place:
            chosen.append(choices[place - 1])
    return chosen


def _rewrite(choice: _Choice) -> str:
    return f"{choice.pair.site.node.label} to rank {choice.rank}"


def _row(choice: _Choice) -> Mapping[str, Any]:
    pair = choice.pair
    return {
        "node": pair.site.node.label,
        "scheme": pair.split.scheme,
        "rank": choice.rank,
        "full_rank": pair.split.rank,
        "macs_before": pair.macs,
        "macs_after": pair.macs_at(choice.rank),
        "params_before": pair.params,
        "params_after": pair.params_at(choice.rank),
        "predicted_error": round(choice.error, 6),
        "time": None if choice.time is None else round(choice.time, 3),
    }
