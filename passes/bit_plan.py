"""How many bits each weight gets: the least total damage for a number of bytes.

Weight l in form f has the error e_l(f) (noise power / signal power of its output) and the size b_l(f). Noise of
different layers adds up at the outputs of the model, each with its own factor s_l, so that for a price of a byte

    f_l = argmin  s_l e_l(f) + price b_l(f)

is the best plan of its size (Lagrange; Shoham and Gersho 1988). Prices from nothing to infinity give the plans on the
lower convex hull, from the most careful to the smallest: each step takes the option of one weight down to the next one
on its own hull, in the order of the damage per byte that is saved.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from onnxcomp.passes.share_storage import Key

__all__ = ["Form", "Option", "Plan", "Style", "largest_within", "plans", "total"]

Form = Literal["tensor", "channels", "codes", "plain"]  # plain: as it is


@dataclass(frozen=True)
class Style:
    """How a weight is stored: the form of its codebook, bits of a code, and the share of zeros besides (0: none).

    With a `step` its values are those of an even grid, with codes of variable length (entropy_grid.py); then `bits`
    is 0.
    """

    form: Form
    bits: int
    zeros: float = 0.0
    step: float = 0.0

    @property
    def levels(self) -> int:
        """Entries of the codebook: zeros that are stored on their own take no code."""
        return (1 << self.bits) + int(self.zeros > 0)


@dataclass(frozen=True)
class Option:
    """One way to store a weight: `size` in bytes, `error` relative to the signal at its output."""

    style: Style
    size: float
    error: float


Plan = Mapping[Key, Option]
_STEP = 0.98  # of the size of a plan: the most that the next one has


def plans(options: Mapping[Key, Sequence[Option]], factors: Mapping[Key, float]) -> list[Plan]:
    """Different plans in order of size, the largest first, each at least 2 % smaller than the one before.

    Where the next plan of the hull is much smaller, as that of a model with one large weight, options that are best for
    no price, but that no other is better than at their size, lie in between.
    """
    fronts = {key: _front(row) for key, row in options.items()}
    steps = [
        (factors[key] * _slope(a, b), key, [o for o in front if b.size <= o.size < a.size])
        for key, front in fronts.items()
        for a, b in itertools.pairwise(_hull(front))
    ]
    plan: Plan = {key: front[0] for key, front in fronts.items()}
    found: list[Plan] = [plan]
    for _, key, smaller in sorted(steps, key=lambda step: step[0]):
        for option in smaller:
            plan = {**plan, key: option}
            if total(plan) < _STEP * total(found[-1]):
                found.append(plan)
    return found if plan == found[-1] else [*found, plan]


def largest_within(found: Sequence[Plan], size: float) -> Plan:
    """The largest plan that fits into `size` bytes, else the smallest one there is."""
    return next((p for p in found if total(p) <= size), found[-1])


def total(plan: Plan) -> float:
    """Bytes of all weights."""
    return sum(option.size for option in plan.values())


def _front(row: Sequence[Option]) -> list[Option]:
    """Options than which none is both smaller and closer, the largest and closest first."""
    found: list[Option] = []
    for option in sorted(row, key=lambda o: (o.size, o.error)):
        if not found or option.error < found[-1].error:
            found.append(option)
    return found[::-1]


def _hull(front: Sequence[Option]) -> list[Option]:
    """Those that are best for some price."""
    found: list[Option] = []
    for option in front:
        while len(found) > 1 and _slope(found[-1], option) <= _slope(found[-2], found[-1]):
            found.pop()
        found.append(option)
    return found


def _slope(larger: Option, smaller: Option) -> float:
    """Damage per byte that is saved."""
    return (smaller.error - larger.error) / (larger.size - smaller.size)
