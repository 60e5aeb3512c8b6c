"""share-weights: few distinct values per weight, chosen so that the outputs stay.

Every weight gets a codebook of 2 to 8 bits: float values for the tensor, int8 values with one scale per output
channel, or, in a model with int8 weights, a subset of its codes; or an even grid with codes of variable length
(entropy_grid.py). Exact k-means gives the first codebook (kmeans.py), second-order assignment and closed-form centroids
the rest (codebook.py), and sequential fitting makes errors of earlier operators good (share_refit.py). Bits go where
they matter (bit_plan.py), as few as the drop on held-out samples allows, or as many as fit into a size. Equal tensors
are tied first.

The file gets small when the indices are stored instead of the values; run time stays what it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from onnxcomp.calibration.data import Dataset
from onnxcomp.calibration.split import hold_out
from onnxcomp.errors import UsageError
from onnxcomp.graph import Model
from onnxcomp.manager import Context, Effect, Pass
from onnxcomp.passes.bit_plan import Option, Plan, largest_within, plans, total
from onnxcomp.passes.codebook import Shared
from onnxcomp.passes.dead import remove_dead
from onnxcomp.passes.duplicates import merge_initializers
from onnxcomp.passes.entropy_grid import stored_bits
from onnxcomp.passes.half_vectors import halve_vectors
from onnxcomp.passes.share_bias import store_bias
from onnxcomp.passes.share_budget import smallest
from onnxcomp.passes.share_problems import row_scales
from onnxcomp.passes.share_search import Candidate, SharingSearch
from onnxcomp.passes.share_storage import Key, by_key, store_codes
from onnxcomp.passes.weight_only import rebuild
from onnxcomp.serde import stored_bytes

__all__ = ["ShareWeights"]

_MIN_TO_SPLIT = 20  # samples, of which one in five is held out
_MARGIN = 0.7  # of the budget: held-out samples do not tell all
_CHECKED_MARGIN = 0.9  # where other samples are asked as well
_BITS = range(2, 9)
_SMALLER = 0.98  # of the last plan, where one was too large
_SIZE = re.compile(r"(\d+(?:\.\d*)?)x")


@dataclass(frozen=True)
class ShareWeights(Pass):
    """Few distinct values per weight: codebooks of 2 to 8 bits, fitted to the outputs.

    One budget: `bits` (the same for every weight), `size` (of the file: bytes, or a ratio such as 8x, as estimated for
    indices of so many bits), `drop` (quality that may be lost; by default the pipeline's). `form` is one codebook per
    tensor, int8 codes with a scale per output channel ("channels"), or whichever has the smaller error at equal bytes.
    `assignment` nearest is plain k-means. `refit` fits operators in sequence. With `zeros` a share of a weight's
    entries may become zero, and the others get the values of an even grid, frequent ones shorter codes; with
    `half_vectors` biases and scales are stored in half precision. `only` and `skip` are patterns of names of weights or
    nodes, such as "*fc*".
    """

    name: ClassVar[str] = "share-weights"
    effect: ClassVar[Effect] = "lossy"
    after: ClassVar[tuple[str, ...]] = (
        "cleanup", "fold-constants", "fuse", "equalize", "prune-channels", "prune-weights", "factorize", "quantize"
    )  # fmt: skip

    bits: int | None = None
    size: str | None = None
    drop: float | None = None
    form: Literal["auto", "tensor", "channels"] = "auto"
    assignment: Literal["second-order", "nearest"] = "second-order"
    refit: bool = True
    zeros: bool = False
    half_vectors: bool = False
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = [n for n in ("bits", "size", "drop") if getattr(self, n) is not None]
        if len(given) > 1:
            raise UsageError(f"pass 'share-weights' takes one budget, not {' and '.join(given)}")
        if self.bits is not None and self.bits not in _BITS:
            raise UsageError(f"option 'bits' of pass 'share-weights' is {self.bits}; it must be 2 to 8")
        if self.drop is not None and not 0 <= self.drop <= 1:
            raise UsageError("option 'drop' of pass 'share-weights' must be a share from 0 to 1")
        if self.size is not None and not (self.size.isdigit() or _SIZE.fullmatch(self.size)):
            raise UsageError(
                f"option 'size' of pass 'share-weights' is {self.size!r}; it must be bytes or a ratio, such as 8x"
            )

    @property
    def needs_data(self) -> bool:
        return self.bits is None

    @property
    def _widths(self) -> range:
        return _BITS if self.bits is None else range(self.bits, self.bits + 1)

    def run(self, model: Model, ctx: Context) -> Mapping[str, Any]:
        if ctx.data is None and self.needs_data:
            raise UsageError(
                "pass 'share-weights' finds out with calibration data how few values will do; give them with --calib, "
                "or give a number of bits such as share-weights:bits=4"
            )
        tied = merge_initializers(model, ctx)
        data, held = _parts(ctx.data)
        mark = len(ctx.rewrites)
        search = SharingSearch(
            model, ctx, data, held,
            only=self.only, skip=self.skip, second_order=self.assignment == "second-order",
            half_vectors=self.half_vectors,
        )  # fmt: skip
        if not search.weights:
            return {"shared": 0, "tied": tied}
        before, stored = stored_bytes(model), _stored_now(search)
        free = self.bits is None
        options = search.options(self.form, self._widths, zeros=self.zeros and free, plain=free)
        plan, best = self._choose(search, options, before, ctx)
        if best is None:
            ctx.withdraw(mark)
            return {"shared": 0, "tied": tied, "reason": "no weight can be shared within the budget"}
        for key in search.weights.keys() - best.shared.keys():
            ctx.take_back(search.weights[key].what)
        sizes = {key: _bytes(option, best.shared.get(key)) for key, option in plan.items()}
        total_size, rows = sum(sizes.values()), _account(search, plan, sizes)
        _write(model, search, plan, best)
        remove_dead(model, Context())  # the biases that others replaced
        halved = halve_vectors(model, ctx.allow) if self.half_vectors else 0
        weights = sum(w.constant.weight.nbytes for w in search.weights.values())
        return {
            "shared": len(best.shared),
            **({"half vectors": halved} if halved else {}),
            "tied": tied,
            "bits_per_weight": round(8 * total_size / sum(w.constant.weight.size for w in search.weights.values()), 2),
            "estimated_bytes": int(before - stored + total_size),
            "weight_bytes": weights,
            "sqnr_db": round(best.score, 2) if np.isfinite(best.score) else None,
            "drop": best.drop if np.isfinite(best.drop) else None,
            **{k: round(v, 2) for k, v in best.steps.items()},
            "weights": rows,
        }

    def _choose(
        self, search: SharingSearch, options: Mapping[Key, list[Option]], before: int, ctx: Context
    ) -> tuple[Plan, Candidate | None]:
        if self.bits is not None:
            plan: Plan = {key: _better(row, search.weights[key].constant.weight.size) for key, row in options.items()}
            return plan, self._finish(search, plan, search.candidate(plan))
        found = plans(options, search.factors(options))
        if self.size is not None:
            return self._of_size(search, found, _wanted(self.size, before) - (before - _stored_now(search)))
        margin = _MARGIN if ctx.check is None else _CHECKED_MARGIN
        allowed = margin * (ctx.max_drop if self.drop is None else self.drop)
        return smallest(search, found, allowed, refit=self.refit, check=ctx.check)

    def _of_size(self, search: SharingSearch, found: Sequence[Plan], wanted: float) -> tuple[Plan, Candidate]:
        """The largest plan that comes to `wanted` bytes. How long the codes of a grid are shows in the end."""
        aim = wanted
        while True:
            plan = largest_within(found, aim)
            best = self._finish(search, plan, search.candidate(plan))
            size = sum(_bytes(plan[key], best.shared.get(key)) for key in plan)
            if size <= wanted or plan is found[-1]:
                return plan, best
            aim = min(aim * wanted / size, _SMALLER * total(plan))

    def _finish(self, search: SharingSearch, plan: Plan, start: Candidate) -> Candidate:
        return search.refitted(start, plan) if self.refit else start


def _parts(data: Dataset | None) -> tuple[Dataset | None, Dataset | None]:
    """What statistics are taken from, and what candidates are judged on."""
    if data is None or (data.length is not None and data.length < _MIN_TO_SPLIT):
        return data, data
    return hold_out(data)


def _bytes(option: Option, shared: Shared | None) -> float:
    """Bytes of a weight: where codes have variable length, those that it came to."""
    if shared is None or not option.style.step:
        return option.size
    return stored_bits(shared) * shared.codes.size / 8


def _better(row: list[Option], size: int) -> Option:
    """The option with the smaller error at equal bytes: a bit more per weight is worth a factor of 4."""
    return min(row, key=lambda o: o.error * 4.0 ** (8 * o.size / size))


def _wanted(size: str, before: int) -> float:
    ratio = _SIZE.fullmatch(size)
    return before / float(ratio[1]) if ratio else float(size)


def _stored_now(search: SharingSearch) -> float:
    """Bytes of the weights as they are stored now."""
    return sum(
        w.constant.weight.size * (1 if key in search.storage else w.constant.dtype.itemsize)
        for key, w in search.weights.items()
    )


def _write(model: Model, search: SharingSearch, plan: Plan, best: Candidate) -> None:
    """Put the result into the model, in the form that it has or that was chosen."""
    constants = by_key(model)
    scopes = list(model.graph.scopes())
    for key, bias in best.biases.items():
        site = search.weights[key].site
        if site is not None:
            store_bias(model, scopes[key[0]], site, bias)
    codes = {}
    for key, shared in best.shared.items():
        weight = search.weights[key]
        form = plan[key].style.form
        if form == "codes":
            codes[key] = search.values(key, shared)
        elif form == "channels":
            stored = np.ascontiguousarray(weight.layout.back(shared.codes).astype(np.int8))
            wide = np.float64 if weight.constant.dtype == np.float64 else np.float32
            scope, constant = constants[key]
            rebuild(model, scope, constant, stored, row_scales(weight, shared.scales).astype(wide))
        else:
            constants[key][1].values = search.values(key, shared)
    store_codes(model, codes, search.storage)


def _account(search: SharingSearch, plan: Plan, sizes: Mapping[Key, float]) -> list[dict[str, Any]]:
    """A line per weight for the report."""
    return [
        {
            "weight": search.weights[key].name,
            "form": option.style.form,
            "bits": option.style.bits or None,
            "zeros": option.style.zeros,
            "step": option.style.step or None,
            "bits_per_weight": round(8 * sizes[key] / search.weights[key].constant.weight.size, 2),
            "error": round(option.error, 6),
        }
        for key, option in plan.items()
    ]
