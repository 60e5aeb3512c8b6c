"""From a budget to a sparse model: moments, curves, plan, candidates, and the account of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.gram import Gram
from onnxcomp.calibration.split import hold_out
from onnxcomp.errors import UsageError
from onnxcomp.graph import Model
from onnxcomp.manager import Context
from onnxcomp.pass_options import matches
from onnxcomp.passes.dim_recurrent import expose_states
from onnxcomp.passes.judge import Judges, acceptable
from onnxcomp.passes.pack_choice import estimated_bytes
from onnxcomp.passes.sparse_moments import collect_moments, second_moment
from onnxcomp.passes.sparse_operands import Operand, operands, rewrite
from onnxcomp.passes.sparse_patterns import Pattern
from onnxcomp.passes.sparse_plan import LEVELS, Curve, allocate, uniform
from onnxcomp.passes.sparse_sequence import Recipe, prune_in_order
from onnxcomp.passes.sparse_update import ROUGH, ROUNDS, Form, Method, select, solve_on

if TYPE_CHECKING:
    from onnxcomp.passes.prune_weights import PruneWeights

__all__ = ["Search"]

Array = npt.NDArray[Any]
_PROBES = (0.3, 0.5, 0.8, 0.9)  # sparsities at which a weight is measured alone
_MOST_WORK = 4e8  # multiplications of a step of admm for all weights, about 20 ms
_SHARES = tuple(s / 100 for s in range(10, 100, 5))  # zeros in all, tried for a drop


@dataclass(frozen=True)
class _Candidate:
    model: Model
    plan: Mapping[str, float]
    errors: Mapping[str, float]
    score: tuple[float, float] | None


class Search:
    """One run of the pass on a model."""

    def __init__(self, model: Model, options: PruneWeights, ctx: Context) -> None:
        self.model = model
        self.options = options
        self.ctx = ctx
        self.pattern = Pattern.parse(options.pattern)
        self.operands = [o for o in operands(model, ctx.refuse) if self._wanted(o)]
        parts: tuple[Any, Any] = (None, None) if ctx.data is None else hold_out(ctx.data)
        self.fit, held = parts
        self.judges = Judges(model, held, threads=ctx.threads)

    def _wanted(self, operand: Operand) -> bool:
        names = [operand.key, *(n.label for n in operand.nodes)]
        if self.options.only and not matches(names, self.options.only):
            return False
        if matches(names, self.options.skip):
            return False
        _, length, outputs = operand.shape
        why = self.pattern.misfit(outputs, length // operand.taps)
        if self.pattern != Pattern() and (why or operand.misfit):
            self.ctx.refuse(operand.label, operand.misfit or why or "")
            return False
        return True

    # --- budget ---

    def run(self) -> dict[str, Any]:
        """Prune `model` in place; details for the report."""
        given = self._given()
        free = [c for c in self.curves if c.key not in given]
        best = self._sparsest(free, given) if self.options.searching else self._planned(free, given, None)
        plan = {} if best is None else dict(best.plan)
        refused = [o.key for o in self.operands if plan.get(o.key) and not self.ctx.allow(_rewrite(o, plan[o.key]))]
        if best is not None and refused:
            best = self._built({**plan, **dict.fromkeys(refused, 0.0)})
        if best is None or not any(best.plan.values()):
            return {"sparsity": 0.0, "reason": "no sparsity keeps the drop within the budget"}
        self.model.become(best.model)
        return self._account(best)

    def _given(self) -> dict[str, float]:
        """Sparsities that the options give by name."""
        found: dict[str, float] = {}
        for glob, ratio in self.options.per_weight().items():
            hits = [o for o in self.operands if matches([o.key, *(n.label for n in o.nodes)], (glob,))]
            if not hits:
                raise UsageError(f"pass 'prune-weights': no weight or node that can be pruned is called {glob!r}")
            found.update((o.key, self.pattern.fixed or ratio if ratio else 0.0) for o in hits)
        return found

    def _sparsest(self, free: Sequence[Curve], given: Mapping[str, float]) -> _Candidate | None:
        """By bisection the largest share of zeros that keeps the drop."""
        best: _Candidate | None = None
        low, high = 0, len(_SHARES)  # shares before `low` are fine, those from `high` on are not
        while low < high:
            middle = (low + high) // 2
            candidate = self._planned(free, given, _SHARES[middle])
            if candidate.score is not None and acceptable(candidate.score, self._drop):
                low, best = middle + 1, candidate
            else:
                high = middle
        return best

    @property
    def _drop(self) -> float:
        return self.ctx.max_drop if self.options.drop is None else self.options.drop

    def _planned(self, free: Sequence[Curve], given: Mapping[str, float], share: float | None) -> _Candidate:
        ratio = self.options.ratio if share is None else share
        if ratio is None:
            return self._built(given)
        spread = uniform if self.options.allocation == "uniform" else allocate
        return self._built({**given, **spread(free, ratio)})

    # --- curves ---

    @property
    def method(self) -> Method:
        if self.options.method != "auto":
            return self.options.method
        return "magnitude" if self.fit is None else "admm"

    @cached_property
    def grams(self) -> Mapping[str, Sequence[Gram]]:
        if self.fit is None or (self.method == "magnitude" and not self.options.update):
            return {}
        self.ctx.progress(0.0, "calibrating")
        exposed = self.model.copy()
        expose_states(exposed)
        keys = {o.key for o in self.operands}
        return collect_moments(
            exposed,
            [o for o in operands(exposed) if o.key in keys],
            self.fit,
            threads=self.ctx.threads,
            memory=self.ctx.memory,
            seed=self.ctx.seed,
            progress=self.ctx.progress,
        )

    @cached_property
    def curves(self) -> list[Curve]:
        if not (self.options.searching or self.options.ratio is not None):
            return []
        levels = LEVELS if self.pattern.fixed is None else (self.pattern.fixed,)
        if self.options.allocation == "uniform":
            return [Curve.through(o.key, o.size, levels, [1.0] * len(levels)) for o in self.operands]
        found = []
        for number, operand in enumerate(self.operands):
            self.ctx.progress(number / len(self.operands), f"sensitivity of {operand.label}")
            found.append(self._curve(operand, levels))
        return found

    def _curve(self, operand: Operand, levels: Sequence[float]) -> Curve:
        """Errors of the operator alone, scaled to the noise that they put on the model's outputs."""
        solved = [self._solved(operand, Recipe(s, self.pattern, self._quick), rounds=ROUGH) for s in levels]
        curve = Curve.through(operand.key, operand.size, levels, [error for _, error in solved])
        judge = self.judges.probing if self.options.sensitivity else None
        if judge is None:
            return curve
        probes = [s for s in levels if s in _PROBES or len(levels) == 1]
        factors = []
        for sparsity in probes:
            copy = self.model.copy()
            twin = next(o for o in operands(copy) if o.key == operand.key)
            matrix, error = solved[list(levels).index(sparsity)]
            rewrite(copy, twin, matrix, self.grams.get(operand.key, ()) if self.options.update else ())
            noise = 10 ** (-judge.score(copy)[0] / 10)
            factors.append(min(noise, 1e6) / max(error, 1e-12))
        return curve.scaled(probes, factors)

    @cached_property
    def _quick(self) -> Method:
        """The method of the curves: the one of the masks, unless that would take minutes for the sake of shares."""
        shapes = (o.shape for o in self.operands if o.key in self.grams)
        work = sum(groups * length**2 * outputs for groups, length, outputs in shapes)
        return "wanda" if self.method in ("obs", "admm") and work > _MOST_WORK else self.method

    # --- candidates ---

    def _built(self, plan: Mapping[str, float]) -> _Candidate:
        copy = self.model.copy()
        twins = {o.key: o for o in operands(copy)}
        in_order = self.options.sequential and self.options.update and self.fit is not None
        recipes = {o.key: Recipe(plan.get(o.key, 0.0), self.pattern, self.method) for o in self.operands}
        errors: dict[str, float] = {}
        pairs = []
        for operand in self.operands:
            if in_order and operand.site is not None and operand.key in self.grams:
                pairs.append((operand, twins[operand.key]))
            elif recipes[operand.key].sparsity:
                matrix, errors[operand.key] = self._solved(operand, recipes[operand.key])
                used = self.grams.get(operand.key, ()) if self.options.update else ()
                rewrite(copy, twins[operand.key], matrix, used)
        if pairs and self.fit is not None:
            errors |= prune_in_order(
                self.model,
                copy,
                pairs,
                recipes,
                self.fit,
                threads=self.ctx.threads,
                seed=self.ctx.seed,
                memory=self.ctx.memory,
                progress=self.ctx.progress,
            )
        score = None if self.judges.whole is None else self.judges.whole.score(copy)
        return _Candidate(copy, plan, errors, score)

    def _solved(self, operand: Operand, recipe: Recipe, *, rounds: int = ROUNDS) -> tuple[Array, float]:
        """The matrix from the original's moments, and its relative error (of the weight itself without moments)."""
        start = operand.read()
        grams = self.grams.get(operand.key)
        if grams is None:
            mask = recipe.pattern.choose(np.square(start), operand.taps, recipe.sparsity)
            total = max(float(np.square(start).sum()), 1e-30)
            return start * mask, float(np.square(start[~mask]).sum()) / total
        form = Form.of_itself(second_moment(operand, grams), start)
        mask = select(form, recipe.method, recipe.pattern, operand.taps, recipe.sparsity)
        matrix = solve_on(form, mask, rounds=rounds) if self.options.update else start * mask
        return matrix, form.error(matrix)

    # --- account ---

    def _account(self, best: _Candidate) -> dict[str, Any]:
        after = {o.key: o for o in operands(self.model)}
        rows = [self._row(after[o.key], best) for o in self.operands]
        zeros, total = sum(r["zeros"] for r in rows), sum(r["elements"] for r in rows)
        details: dict[str, Any] = {
            "sparsity": round(zeros / max(total, 1), 4),
            "pattern": str(self.pattern),
            "bytes_dense": sum(r["bytes"] for r in rows),
            "bytes_packed": sum(r["bytes_packed"] for r in rows),
            "weights": rows,
            "notes": self._notes(rows),
        }
        if best.score is not None:
            details["sqnr_db"] = round(best.score[0], 2)
            details["held_out_drop"] = best.score[1]
        return details

    def _row(self, operand: Operand, best: _Candidate) -> dict[str, Any]:
        values = operand.constant.values
        zeros = int(np.count_nonzero(values == 0))
        pruned = best.plan.get(operand.key, 0.0) > 0
        error = best.errors.get(operand.key)
        with_moments = operand.key in self.grams or self.method == "magnitude"
        return {
            "weight": operand.key,
            "nodes": [n.label for n in operand.nodes],
            "shape": list(values.shape),
            "elements": int(values.size),
            "zeros": zeros,
            "sparsity": round(zeros / max(values.size, 1), 4),
            "method": (self.method if with_moments else "magnitude") if pruned else None,
            "error": None if error is None else round(error, 6),
            "bytes": int(values.nbytes),
            "bytes_packed": estimated_bytes(values.size, values.size - zeros, 8 * values.itemsize),
        }

    def _notes(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        notes = [
            "Zeros make the file smaller only once they are packed (bytes_packed: a bit per element and the values "
            "that stay) or compressed; ONNX Runtime's CPU kernels multiply them like any other number."
        ]
        if (self.pattern.kept, self.pattern.channels) == (2, 4) and self.ctx.target == "tensorrt":
            fit = sum(o.nodes[0].op in ("Conv", "Gemm") for o in self.operands)
            notes.append(
                f"{fit} of {len(rows)} weights belong to a Conv or Gemm, for which TensorRT has 2:4 kernels; whether "
                "it picks them shows in the log of an engine built with sparse weights allowed."
            )
        return notes


def _rewrite(operand: Operand, sparsity: float) -> str:
    return f"{operand.key} of {operand.label} to {sparsity:.0%} zeros"
