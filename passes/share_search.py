"""Search for the codebooks that keep the outputs: options of each weight, candidates from plans, and their score.

1. One pass over the data gives the second moments of what each weight is multiplied with.
2. For each weight the error of each option (form, bits, zeros) is estimated (share_problems.py).
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
from onnxcomp.passes.bit_plan import Option, Plan
from onnxcomp.passes.codebook import Problem, Shared
from onnxcomp.passes.codec import MAX_RANKED
from onnxcomp.passes.half_vectors import halve_vectors
from onnxcomp.passes.judge import Judge
from onnxcomp.passes.share_bias import set_bias, takes_bias
from onnxcomp.passes.share_problems import Problems
from onnxcomp.passes.share_refit import Targets, Task, find_targets, refit, tasks
from onnxcomp.passes.share_sites import find_weights, moments
from onnxcomp.passes.share_storage import Key, by_key, plain_form

__all__ = ["Candidate", "SharingSearch"]

Array = npt.NDArray[Any]
_JUDGED, _PROBED = 256, 32  # held-out samples for candidates, and for changes of single weights
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
        half_vectors: bool = False,
    ) -> None:
        self.ctx = ctx
        self.half_vectors = half_vectors
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
        self.judge, self.probing = self._judge(held, _JUDGED), self._judge(held, _PROBED)
        self.biased = {key: takes_bias(model, self.scopes[key[0]], w.site) for key, w in self.weights.items()}
        self.problems = Problems(self.storage, self.grams, self.biased)

    def _judge(self, held: Dataset | None, samples: int) -> Judge | None:
        if held is None or not self.weights:
            return None
        threads = self.ctx.threads
        try:
            return Judge(self.plain, held, samples=samples, threads=threads, enough=_ENOUGH)
        except DataError:  # a stream of unknown length with too few batches to hold one out
            assert self.data is not None
            return Judge(self.plain, self.data, samples=samples, threads=threads, enough=_ENOUGH)

    def options(self, wanted: str, bits: range, *, zeros: bool, plain: bool) -> dict[Key, list[Option]]:
        """Every way to store each weight, with its estimated error; `plain`: to leave it as it is, too."""
        found = {}
        small = sum(w.constant.weight.size for w in self.weights.values()) <= MAX_RANKED
        for number, (key, weight) in enumerate(self.weights.items()):
            self.ctx.progress(number / len(self.weights), "ways to store each weight")
            found[key] = self.problems.options(weight, wanted, bits, zeros=zeros, grids=zeros and small)
            found[key] += [self.problems.as_it_is(weight)] if plain else []
        return found

    # --- candidates ---

    def factors(self, options: Mapping[Key, list[Option]]) -> dict[Key, float]:
        """What a unit of relative error in each weight alone adds to noise power / signal power of the outputs."""
        found = {}
        for number, (key, weight) in enumerate(self.weights.items()):
            self.ctx.progress(number / len(self.weights), "sensitivity")
            probe = self.problems.probe(options[key])
            alone = self._candidate({key: self.problems.fitted(weight, probe.style)})
            noise = self.probing.assess(self.build(alone)).noise if self.probing is not None else 1.0
            found[key] = max(noise, 1e-12) / max(probe.error, 1e-12)
        return found

    def candidate(self, plan: Plan) -> Candidate:
        """Every weight on its own, biases corrected for the mean of the original's inputs."""
        shared = {}
        for number, (key, option) in enumerate(plan.items()):
            self.ctx.progress(number / len(plan), "codebooks")
            if option.style.form != "plain":
                shared[key] = self.problems.fitted(self.weights[key], option.style)
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

    def final(self, candidate: Candidate) -> Model:
        """What becomes of it, for a check: half precision can make the difference."""
        model = self.build(candidate)
        if self.half_vectors:
            halve_vectors(model, lambda what: True)
        return model

    def values(self, key: Key, shared: Shared) -> Array:
        """Values of the weight in its own shape and type."""
        weight = self.weights[key]
        return np.ascontiguousarray(weight.layout.back(shared.values).astype(weight.constant.dtype))

    def judged(self, candidate: Candidate) -> Candidate:
        """With score and drop."""
        if self.judge is None:
            return candidate
        found = self.judge.assess(self.build(candidate))
        return replace(candidate, score=found.sqnr, drop=max(found.drop, found.expected))

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
            return self.problems.share(self.weights[key], plan[key].style, problem)

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
