"""What each weight is to be approximated by, and how well each way to store it does that.

The error of an option is estimated from a sample of its weights as if inputs did not correlate (`codebook.estimated`),
times what second-order assignment gains on this weight, measured for one codebook without zeros, for one with each
share of zeros, and for a coarse and a fine grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.calibration.gram import Gram
from onnxcomp.passes.bit_plan import Form, Option, Style
from onnxcomp.passes.codebook import Problem, Shared, channel_scales, estimated, fit, shrunk, support, thinned
from onnxcomp.passes.entropy_grid import estimated_grid, fit_grid, stored_bits
from onnxcomp.passes.pack_choice import estimated_bytes
from onnxcomp.passes.share_sites import Weight
from onnxcomp.passes.share_storage import Key, Storage

__all__ = ["Problems", "row_scales"]

Array = npt.NDArray[Any]
_PROBE = 3  # bits at which gain and sensitivity are measured
_MEASURED = 5  # bits from which on an error falls to a quarter with each
_INT8 = 127
_ZEROS = (0.5, 0.65, 0.8, 0.9)
_BITS_BESIDE_ZEROS = range(1, 6)
_SPARSE_PROBE = 2  # bits at which the gain of codebooks with zeros is measured
_STEPS = tuple(3.0 * 2.0 ** (-j / 6) for j in range(31))  # of grids, relative to the root of the mean square
_SAMPLED = range(0, len(_STEPS), 2)  # for which error and bits are estimated, those between lie between
_FITTED, _FITTED_SPARSE = (0, 6, 14), (0, 8)  # those that are fitted; the finest of the first takes about 2.7 bits


class Problems:
    """Of the weights of one model. `biased` says which operators can have a bias, which takes the mean of the error."""

    def __init__(self, storage: Mapping[Key, Storage], grams: Mapping[Key, Gram], biased: Mapping[Key, bool]) -> None:
        self._storage = storage
        self._grams = grams
        self._biased = biased
        self._fitted: dict[tuple[Key, Style], Shared] = {}
        self._supports: dict[tuple[Key, float], Array] = {}

    # --- one weight in one style ---

    def own(self, weight: Weight) -> Problem:
        """The weight's own problem: its rows, and the moments of its inputs if they are known."""
        gram = self._grams.get(weight.key)
        moment = None
        if gram is not None:
            moment = gram.covariance if self._biased[weight.key] else gram.products / max(gram.rows, 1)
            moment = shrunk(moment, gram.rows)
        return Problem(weight.rows, moment)

    def styled(self, weight: Weight, style: Style, problem: Problem) -> Problem:
        """A problem with what the form, the zeros of the weight and those of the style ask for."""
        whole = None if style.form == "tensor" else _INT8
        if style.form == "codes":
            codes = weight.layout.rows(np.rint(weight.constant.values.astype(np.float64) / self._scale(weight)))
            whole = max(1, int(np.abs(codes).max()))
        found = replace(problem, free=weight.free, whole=whole)
        return thinned(found, self._support(weight, style.zeros)) if style.zeros else found

    def _support(self, weight: Weight, zeros: float) -> Array:
        """Which entries of a weight stay, found once: for a fit in sequence, whose rows differ a little, as well."""
        key = (weight.key, zeros)
        if key not in self._supports:
            self._supports[key] = support(replace(self.own(weight), free=weight.free), zeros)
        return self._supports[key]

    def share(self, weight: Weight, style: Style, problem: Problem) -> Shared:
        """The best codebook of a style for a problem."""
        return self._fit(weight, style, self.styled(weight, style, problem))

    def _fit(self, weight: Weight, style: Style, asked: Problem) -> Shared:
        if style.step:
            return fit_grid(asked, style.step)
        return fit(asked, self._scales(weight, style.form, asked), style.levels, rounds=_rounds(style.bits))

    def fitted(self, weight: Weight, style: Style) -> Shared:
        """The weight's own best codebook."""
        known = self._fitted.get((weight.key, style))
        return known or self._once(weight, style, self.styled(weight, style, self.own(weight)))

    def _once(self, weight: Weight, style: Style, asked: Problem) -> Shared:
        """The best codebook for the weight's own problem, as the style asks for it."""
        key = (weight.key, style)
        if key not in self._fitted:
            self._fitted[key] = self._fit(weight, style, asked)
        return self._fitted[key]

    def _scales(self, weight: Weight, form: Form, problem: Problem) -> Array:
        """Scales of the rows, [groups, outputs, 1]."""
        if form == "channels":
            return channel_scales(problem)
        if form == "codes":
            wide = np.broadcast_to(self._scale(weight), weight.constant.shape)
            return np.ascontiguousarray(weight.layout.rows(wide)[:, :, :1])
        return np.ones((*problem.rows.shape[:2], 1))

    def _scale(self, weight: Weight) -> Array:
        return self._storage[weight.key].scale

    # --- options ---

    def options(self, weight: Weight, wanted: str, bits: range, *, zeros: bool, grids: bool) -> list[Option]:
        """Ways to store the weight with `bits` each, of the form that is `wanted` or of both, with `zeros` sparse ones
        as well; or `grids` of float values, where it is known what they do to outputs.
        """
        problem = self.own(weight)
        if grids and wanted != "channels" and problem.moment is not None and weight.key not in self._storage:
            return [o for z in (0.0, *self._more_zeros(weight)) for o in self._grids(weight, z, problem)]
        found = [self._dense(weight, form, bits, problem) for form in self._forms(weight, wanted)]
        options = [option for row in found for option in row]
        if zeros:
            best = min(found, key=lambda row: _at_equal_bytes(row, weight.constant.weight.size))
            options += self._sparse(weight, best[0].style.form, problem)
        return options

    def as_it_is(self, weight: Weight) -> Option:
        """To leave the weight alone."""
        width = 1 if weight.key in self._storage else weight.constant.dtype.itemsize
        return Option(Style("plain", 8 * width), float(width * weight.constant.weight.size), 0.0)

    def _forms(self, weight: Weight, wanted: str) -> list[Form]:
        if weight.key in self._storage:
            return ["codes"]
        if wanted == "channels" or (wanted == "auto" and _one_scale_per_row(weight)):
            return ["channels"] if wanted == "channels" else ["tensor", "channels"]
        return ["tensor"]

    def probe(self, options: Sequence[Option]) -> Option:
        """The one of the options that has been fitted, to see what it does to the model."""
        grids = [o for o in options if o.style.step and not o.style.zeros]
        if grids:
            return grids[_FITTED[-1]]
        return next((o for o in options if o.style.bits == _PROBE and not o.style.zeros), options[0])

    def _grids(self, weight: Weight, zeros: float, problem: Problem) -> list[Option]:
        """Grids with the same zeros. What some gain by assignment, and how many bits that takes, is measured."""
        size, power = weight.constant.weight.size, max(problem.power, 1e-30)
        spread = max(float(np.sqrt(np.square(problem.rows).mean())), 1e-30)
        styles = [Style("tensor", 0, zeros, spread * relative) for relative in _STEPS]
        asked = self.styled(weight, styles[0], problem)
        estimates = np.log(np.maximum([estimated_grid(asked, styles[place].step) for place in _SAMPLED], 1e-30))
        errors, bits = (np.exp(np.interp(range(len(styles)), _SAMPLED, row)) for row in estimates.T)
        places, gains, ratios = _FITTED_SPARSE if zeros else _FITTED, [], []
        for place in places:
            found = self._once(weight, styles[place], asked)
            gains.append(np.log(max(found.error - asked.lost, 1e-30) / max(errors[place], 1e-30)))
            ratios.append(stored_bits(found) / bits[place])
        errors = (asked.lost + errors * np.exp(np.interp(range(len(styles)), places, gains))) / power
        bits *= np.interp(range(len(styles)), places, ratios)
        return [Option(s, float(b * size / 8), float(e)) for s, b, e in zip(styles, bits, errors, strict=True)]

    def _dense(self, weight: Weight, form: Form, bits: range, problem: Problem) -> list[Option]:
        measured = {min(b, _MEASURED) for b in bits}
        row = self._row(weight, form, 0.0, measured, _PROBE, problem)
        found = {o.style.bits: o.error for o in row}
        return [
            self._option(weight, Style(form, b), found[min(b, _MEASURED)] / 4.0 ** max(b - _MEASURED, 0)) for b in bits
        ]

    def _sparse(self, weight: Weight, form: Form, problem: Problem) -> list[Option]:
        rows = (
            self._row(weight, form, z, _BITS_BESIDE_ZEROS, _SPARSE_PROBE, problem) for z in self._more_zeros(weight)
        )
        return [option for row in rows for option in row]

    def _more_zeros(self, weight: Weight) -> list[float]:
        """Shares of zeros that are more than the weight has."""
        there = 0.0 if weight.free is None else 1 - np.count_nonzero(weight.free) / weight.free.size
        return [z for z in _ZEROS if z > there]

    def _row(
        self, weight: Weight, form: Form, zeros: float, bits: Iterable[int], probe: int, problem: Problem
    ) -> list[Option]:
        """Options with the same zeros. The codebook of `probe` bits is fitted: what it gains, all are taken to gain."""
        asked = self.styled(weight, Style(form, probe, zeros), problem)
        scales, power = self._scales(weight, form, asked), max(problem.power, 1e-30)
        probed = Style(form, probe, zeros)
        estimate = estimated(asked, scales, probed.levels)
        gain = (self._once(weight, probed, asked).error - asked.lost) / max(estimate, 1e-30)
        styles = [Style(form, b, zeros) for b in bits]
        return [
            self._option(weight, s, (asked.lost + gain * estimated(asked, scales, s.levels)) / power) for s in styles
        ]

    def _option(self, weight: Weight, style: Style, error: float) -> Option:
        return Option(style, self._size(weight, style), error)

    def _size(self, weight: Weight, style: Style) -> float:
        """Estimated bytes in the file: codes, the codebook, and float32 scales."""
        free, count = weight.free, weight.constant.weight.size
        used = round(count * (1 - style.zeros))
        if free is not None:
            used = min(used, int(np.count_nonzero(free)))
        scales = int(np.prod(weight.rows.shape[:2])) if style.form == "channels" else 0
        entry = weight.constant.dtype.itemsize if style.form == "tensor" else 1
        dense = (count * (style.levels - 1).bit_length() + 7) // 8
        codes = min(dense, estimated_bytes(count, used, style.bits))
        return float(codes + style.levels * entry + 4 * scales)


def _rounds(bits: int) -> int:
    """Turns of indices and centroids: fine codebooks hardly change."""
    return 3 if bits <= 4 else 1


def _at_equal_bytes(row: list[Option], count: int) -> float:
    """The error of a form, at 3 bits if it has them, were it of the size of the others: a bit is a factor of 4."""
    option = next((o for o in row if o.style.bits == _PROBE), row[0])
    return float(option.error * 4.0 ** (8 * option.size / count))


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
