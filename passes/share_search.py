"""Search for the codebooks that keep the outputs: options of each weight, candidates from plans, and their score.

1. One pass over the data gives the second moments of what each weight is multiplied with.
2. For each weight the error of each option (form, bits) is estimated: exact k-means, times what second-order
   assignment gains on this weight, measured at 3 bits.
3. What 3 bits in one weight alone do to the outputs gives its factor (`sensitivity`).
4. Plans (bit_plan.py) become candidates: every weight is fitted (codebook.py) and biases take the mean; with `refit`
   once more in sequence, on the inputs that each operator really gets (share_refit.py). The judge decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.data import Dataset
from onnxcomp.calibration.gram import Gram
from onnxcomp.errors import DataError
from onnxcomp.graph import Model
from onnxcomp.manager import Context
from onnxcomp.passes.bit_plan import Form, Option, Plan
from onnxcomp.passes.codebook import Problem, Shared, channel_scales, fit, nearest, shrunk
from onnxcomp.passes.judge import Judge
from onnxcomp.passes.pack_choice import estimated_bytes
from onnxcomp.passes.share_bias import set_bias, takes_bias
from onnxcomp.passes.share_refit import Targets, Task, find_targets, refit, tasks
from onnxcomp.passes.share_sites import Weight, find_weights, moments
from onnxcomp.passes.share_storage import Key, by_key, plain_form

__all__ = ["Candidate", "SharingSearch"]

Array = npt.NDArray[Any]
_PROBE = 3  # bits at which gain and sensitivity are measured
_MEASURED = 5  # bits from which on an error falls to a quarter with each
_INT8 = 127
_JUDGED = 256  # held-out samples that candidates are judged on
_ENOUGH = 1 << 21  # numbers to compare


@dataclass(frozen=True)
class Candidate:
    """Shared rows of each weight and new biases of operators, by key of the weight, and what the judge says.

    `drop` is the larger of the drop seen and the drop to expect (judge.py).
    """

    shared: Mapping[Key, Shared]
    biases: Mapping[Key, Array]
    score: float = float("-inf")
    drop: float = float("inf")
    steps: Mapping[str, float] = field(default_factory=dict)


class SharingSearch:
    """`weights` are those to share, by position; nothing changes `model`."""

    def __init__(
        self,
        model: Model,
        ctx: Context,
        data: Dataset | None,
        held: Dataset | None,
        *,
        only: tuple[str, ...],
        skip: tuple[str, ...],
        second_order: bool = True,
    ) -> None:
        self.ctx = ctx
        self.data = data
        self.second_order = second_order
        self.plain, self.storage = plain_form(model)
        self.scopes = list(model.graph.scopes())
        found = find_weights(self.plain, only, skip)
        self.weights = {w.key: w for w in found if ctx.allow(w.what)}
        self.grams: dict[Key, Gram] = {}
        if data is not None and second_order and self.weights:
            self.grams = moments(
                self.plain, list(self.weights.values()), data,
                threads=ctx.threads, memory=ctx.memory, seed=ctx.seed, progress=ctx.progress,
            )  # fmt: skip
        self.judge = self._judge(held)
        self.biased = {key: takes_bias(model, self.scopes[key[0]], w.site) for key, w in self.weights.items()}
        self._fitted: dict[tuple[Key, Form, int], Shared] = {}

    def _judge(self, held: Dataset | None) -> Judge | None:
        if held is None or not self.weights:
            return None
        threads = self.ctx.threads
        try:
            return Judge(self.plain, held, samples=_JUDGED, threads=threads, enough=_ENOUGH)
        except DataError:  # a stream of unknown length with too few batches to hold one out
            assert self.data is not None
            return Judge(self.plain, self.data, samples=_JUDGED, threads=threads, enough=_ENOUGH)

    # --- problems and options ---

    def problem(self, weight: Weight, form: Form) -> Problem:
        """The weight's own problem: its rows, and the moments of its inputs if they are known."""
        gram = self.grams.get(weight.key)
        moment = None
        if gram is not None:
            moment = gram.covariance if self.biased[weight.key] else gram.products / max(gram.rows, 1)
            moment = shrunk(moment, gram.rows)
        return self.shaped(weight, form, Problem(weight.rows, moment))

    def shaped(self, weight: Weight, form: Form, problem: Problem) -> Problem:
        """A problem with what the form and the zeros of the weight ask for."""
        whole = None if form == "tensor" else _INT8
        if form == "codes":
            codes = weight.layout.rows(np.rint(weight.constant.values.astype(np.float64) / self._scale(weight)))
            whole = max(1, int(np.abs(codes).max()))
        return replace(problem, free=weight.free, whole=whole)

    def scales(self, weight: Weight, form: Form, problem: Problem) -> Array:
        """Scales of the rows, [groups, outputs, 1]."""
        if form == "channels":
            return channel_scales(problem)
        if form == "codes":
            wide = np.broadcast_to(self._scale(weight), weight.constant.shape)
            return np.ascontiguousarray(weight.layout.rows(wide)[:, :, :1])
        return np.ones((*problem.rows.shape[:2], 1))

    def _scale(self, weight: Weight) -> Array:
        return self.storage[weight.key].scale

    def forms(self, weight: Weight, wanted: str) -> list[Form]:
        if weight.key in self.storage:
            return ["codes"]
        if wanted == "channels" or (wanted == "auto" and _one_scale_per_row(weight)):
            return ["channels"] if wanted == "channels" else ["tensor", "channels"]
        return ["tensor"]

    def options(self, weight: Weight, wanted: str, bits: range, *, plain: bool) -> list[Option]:
        """Every way to store the weight, with its estimated error; `plain`: to leave it as it is, too."""
        found = []
        for form in self.forms(weight, wanted):
            problem = self.problem(weight, form)
            scales = self.scales(weight, form, problem)
            gain = 1.0
            if problem.moment is not None:
                probe = nearest(problem, scales, 1 << _PROBE).error
                gain = self.fitted(weight, form, _PROBE).error / max(probe, 1e-30)
            power = max(problem.power, 1e-30)
            measured = {b: nearest(problem, scales, 1 << b).error for b in {min(b, _MEASURED) for b in bits}}
            for b in bits:
                error = gain * measured[min(b, _MEASURED)] / power / 4.0 ** max(b - _MEASURED, 0)
                found.append(Option(form, b, self.size(weight, form, b), error))
        return [*found, self._as_it_is(weight)] if plain else found

    def _as_it_is(self, weight: Weight) -> Option:
        width = 1 if weight.key in self.storage else weight.constant.dtype.itemsize
        return Option("plain", 8 * width, float(width * weight.constant.weight.size), 0.0)

    def size(self, weight: Weight, form: Form, bits: int) -> float:
        """Estimated bytes in the file: codes, a codebook of 2^bits entries, and float32 scales."""
        free = weight.free
        count = weight.constant.weight.size
        used = count if free is None else int(np.count_nonzero(free))
        scales = int(np.prod(weight.rows.shape[:2])) if form == "channels" else 0
        entry = weight.constant.dtype.itemsize if form == "tensor" else 1
        return float(estimated_bytes(count, used, bits) + 2**bits * entry + 4 * scales)

    def fitted(self, weight: Weight, form: Form, bits: int) -> Shared:
        """The weight's own best codebook."""
        key = (weight.key, form, bits)
        if key not in self._fitted:
            self._fitted[key] = self._share(weight, form, bits, self.problem(weight, form))
        return self._fitted[key]

    def _share(self, weight: Weight, form: Form, bits: int, problem: Problem) -> Shared:
        scales = self.scales(weight, form, problem)
        return fit(problem, scales, 1 << bits, rounds=_rounds(problem, bits))

    # --- candidates ---

    def factors(self, options: Mapping[Key, list[Option]]) -> dict[Key, float]:
        """What a unit of relative error in each weight alone adds to noise power / signal power of the outputs."""
        found = {}
        for number, (key, weight) in enumerate(self.weights.items()):
            self.ctx.progress(number / len(self.weights), "sensitivity")
            form = options[key][0].form
            error = next((o.error for o in options[key] if o.bits == _PROBE), options[key][0].error)
            shared = self.fitted(weight, form, _PROBE)
            alone = self.judged(self._candidate({key: shared}))
            found[key] = max(10.0 ** (-alone.score / 10), 1e-12) / max(error, 1e-12)
        return found

    def candidate(self, plan: Plan) -> Candidate:
        """Every weight on its own, biases corrected for the mean of the original's inputs."""
        shared = {}
        for number, (key, option) in enumerate(plan.items()):
            self.ctx.progress(number / len(plan), "codebooks")
            if option.form == "plain":
                continue
            shared[key] = self.fitted(self.weights[key], option.form, option.bits)
        return self.judged(self._candidate(shared))

    def _candidate(self, shared: Mapping[Key, Shared]) -> Candidate:
        biases = {}
        for key, found in shared.items():
            site, gram = self.weights[key].site, self.grams.get(key)
            if gram is not None and site is not None and self.biased[key]:
                change = found.values - self.weights[key].rows
                shift = -site.view.alpha * np.einsum("gok,gk->go", change, gram.mean)
                biases[key] = site.bias() + shift.reshape(-1)
        return Candidate(shared, biases)

    def build(self, candidate: Candidate) -> Model:
        """The plain form with the shared weights in it."""
        copy = self.plain.copy()
        constants = by_key(copy)
        for key, shared in candidate.shared.items():
            constants[key][1].values = self.values(key, shared)
        if candidate.biases:
            for weight in find_weights(copy):
                if weight.key in candidate.biases and weight.site is not None:
                    set_bias(copy, constants[weight.key][0], weight.site, candidate.biases[weight.key])
        return copy

    def values(self, key: Key, shared: Shared) -> Array:
        """Values of the weight in its own shape and type."""
        weight = self.weights[key]
        return np.ascontiguousarray(weight.layout.back(shared.values).astype(weight.constant.dtype))

    def judged(self, candidate: Candidate) -> Candidate:
        if self.judge is None:
            return candidate
        score, drop, expected = self.judge.assess(self.build(candidate))
        return replace(candidate, score=score, drop=max(drop, expected))

    @cached_property
    def _targets(self) -> dict[Key, Targets]:
        assert self.data is not None
        todo = tasks(self.plain, list(self.weights.values()), self.ctx.memory)
        return find_targets(
            self.plain, todo, self.data, threads=self.ctx.threads, memory=self.ctx.memory, seed=self.ctx.seed
        )

    def refitted(self, start: Candidate, plan: Plan) -> Candidate:
        """The candidate with its operators fitted in sequence, if that brings the outputs closer."""
        if self.data is None or not self.second_order:
            return start
        work = self.build(start)
        todo = tasks(work, [w for w in find_weights(work) if w.key in start.shared], self.ctx.memory)
        biases = dict(start.biases)

        def share(key: Key, problem: Problem) -> Shared:
            weight, option = self.weights[key], plan[key]
            return self._share(weight, option.form, option.bits, self.shaped(weight, option.form, problem))

        def write(task: Task, rows: Array, bias: Array) -> None:
            weight = task.weight
            weight.constant.values = np.ascontiguousarray(weight.layout.back(rows).astype(weight.constant.dtype))
            if self.biased[weight.key]:
                set_bias(work, work.graph, task.site, bias)
                biases[weight.key] = bias

        found = refit(
            work, todo, self._targets, share, write,
            {key: w.rows for key, w in self.weights.items()}, self.biased, self.data,
            threads=self.ctx.threads, memory=self.ctx.memory, progress=self.ctx.progress,
        )  # fmt: skip
        steps = {"separate_db": start.score}
        tried = self.judged(Candidate({**start.shared, **found}, biases))
        steps["sequential_db"] = tried.score
        return replace(tried if tried.score > start.score else start, steps=steps)


def _rounds(problem: Problem, bits: int) -> int:
    """Turns of indices and centroids: many small groups take long, and fine codebooks hardly change."""
    if len(problem.rows) > 64:
        return 1
    return 3 if bits <= 4 else 1


def _one_scale_per_row(weight: Weight) -> bool:
    groups, outputs, _ = weight.rows.shape
    different = np.arange(1.0, groups * outputs + 1).reshape(groups, outputs, 1)
    return bool(row_scales(weight, different).size == groups * outputs)


def row_scales(weight: Weight, scales: Array) -> Array:
    """Scales of rows [groups, outputs, 1] as an array that broadcasts to the weight, as small as that is."""
    wide = weight.layout.back(np.broadcast_to(scales, weight.rows.shape))
    for axis in range(wide.ndim):
        first = wide.take([0], axis)
        if np.array_equal(np.broadcast_to(first, wide.shape), wide):
            wide = first
    return wide
