"""How many bits each weight gets: the least total damage for a number of bytes.

Weight l in form f has the error e_l(f) (noise power / signal power of its output) and the size b_l(f). Noise of
different layers adds up at the outputs of the model, each with its own factor s_l, so that for a price of a byte

    f_l = argmin  s_l e_l(f) + price b_l(f)

is the best plan of its size (Lagrange; Shoham and Gersho 1988). Prices from nothing to infinity give the plans on the
lower convex hull, from the most careful to the smallest.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxcomp.passes.share_storage import Key

__all__ = ["Form", "Option", "Plan", "largest_within", "plans", "total"]

Form = Literal["tensor", "channels", "codes", "plain"]  # plain: as it is


@dataclass(frozen=True)
class Option:
    """One way to store a weight: `size` in bytes, `error` relative to the signal at its output."""

    form: Form
    bits: int
    size: float
    error: float


Plan = Mapping[Key, Option]
_PRICES = 256  # that are tried
_STEP = 0.98  # of the size of a plan: the most that the next one has


def plans(options: Mapping[Key, Sequence[Option]], factors: Mapping[Key, float]) -> list[Plan]:
    """Different plans in order of size, the largest first, each at least 2 % smaller than the one before."""
    slopes = [s for key, row in options.items() for s in _slopes(row, factors[key])]
    if not slopes:
        return [{key: _cheapest(row, factors[key], 0.0) for key, row in options.items()}]
    low, high = np.log(min(slopes)) - 0.1, np.log(max(slopes)) + 0.1
    found: list[Plan] = []
    last: Plan = {}
    for price in np.exp(np.linspace(low, high, _PRICES)):
        last = {key: _cheapest(row, factors[key], float(price)) for key, row in options.items()}
        if not found or total(last) < _STEP * total(found[-1]):
            found.append(last)
    return found if total(found[-1]) <= total(last) else [*found, last]


def largest_within(found: Sequence[Plan], size: float) -> Plan:
    """The largest plan that fits into `size` bytes, else the smallest one there is."""
    return next((p for p in found if total(p) <= size), found[-1])


def total(plan: Plan) -> float:
    """Bytes of all weights."""
    return sum(option.size for option in plan.values())


def _cheapest(row: Sequence[Option], factor: float, price: float) -> Option:
    return min(row, key=lambda o: (factor * o.error + price * o.size, o.size))


def _slopes(row: Sequence[Option], factor: float) -> list[float]:
    """Damage per byte between neighbours in size that are worse and smaller: where the best choice can change."""
    ordered = sorted(row, key=lambda o: -o.size)
    pairs = itertools.pairwise(ordered)
    return [
        factor * (b.error - a.error) / (a.size - b.size) for a, b in pairs if b.error > a.error and b.size < a.size
    ]
