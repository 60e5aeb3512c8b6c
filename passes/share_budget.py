"""The smallest plan within a drop in quality.

1. By bisection the smallest plan that the judge accepts with every weight fitted on its own.
2. That plan with operators fitted in sequence (share_refit.py), which takes longer. Where the check that counts in the
   end, on samples that calibration did not see, does not accept it, step 1 is repeated with that check.
3. If fitting in sequence gains n dB, the smallest plan that is n dB worse on its own should do. From there to smaller
   plans as long as judge and check accept them; to larger ones as long as they do not. Steps double until the answer
   changes, then they halve.

The first plan leaves every weight as it is, so that there always is one that does; what no budget allows to be shared
stays float, and the other weights are shared nevertheless.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from onnxcomp.blame import Clock
from onnxcomp.graph import Model
from onnxcomp.passes.bit_plan import Plan
from onnxcomp.passes.share_search import Candidate, SharingSearch

__all__ = ["smallest", "turning_point"]

_TRUST = 6.0  # of what the judge allows may be lost on its samples where the check has the last word
_SECONDS = 120.0  # for these; a model that takes seconds for a sample would be searched for half an hour
_MOST = 12  # candidates that are fitted in sequence, besides the first


def smallest(
    search: SharingSearch,
    found: Sequence[Plan],
    allowed: float,
    *,
    refit: bool,
    check: Callable[[Model], bool] | None,
) -> tuple[Plan, Candidate | None]:
    """The last of the plans (the largest first) that does, and its candidate; None if that is the first."""
    ladder = _Ladder(search, found, allowed, refit, check)
    start = _last(ladder.acceptable, 0, len(found))
    if refit and start > 0:
        gained = ladder.fitted(start).score - ladder.apart(start).score
        if not ladder.good(start):
            start = _last(ladder.passes, 0, start)
        least = ladder.apart(start).score - gained
        start = _last(lambda place: ladder.apart(place).score >= least, start, len(found))
    best = turning_point(ladder.good, start, len(found), most=_MOST, clock=Clock(_SECONDS))
    return found[best], ladder.fitted(best) if best else None


class _Ladder:
    """Candidates of plans by their place, each made and checked once."""

    def __init__(
        self,
        search: SharingSearch,
        found: Sequence[Plan],
        allowed: float,
        refit: bool,
        check: Callable[[Model], bool] | None,
    ) -> None:
        self._search = search
        self._found = found
        self._allowed = allowed
        self._refit = refit
        self._check = check
        self.apart = functools.cache(self._apart)
        self.fitted = functools.cache(self._fitted)
        self.good = functools.cache(self._good)
        self.passes = functools.cache(self._passes)

    def _apart(self, place: int) -> Candidate:
        """Every weight on its own."""
        return self._search.candidate(self._found[place])

    def _fitted(self, place: int) -> Candidate:
        """In sequence, if that is asked for."""
        return self._search.refitted(self.apart(place), self._found[place]) if self._refit else self.apart(place)

    def acceptable(self, place: int) -> bool:
        return self.apart(place).drop <= self._allowed

    def _passes(self, place: int) -> bool:
        return self._stands(self.apart(place))

    def _good(self, place: int) -> bool:
        most = self._allowed if self._check is None else _TRUST * self._allowed
        return self.fitted(place).drop <= most and self._stands(self.fitted(place))

    def _stands(self, candidate: Candidate) -> bool:
        return self._check is None or self._check(self._search.final(candidate))


def turning_point(
    good: Callable[[int], bool], start: int, count: int, *, most: int, clock: Clock | None = None
) -> int:
    """The last of `count` places that is good, sought from `start` with at most `most` questions; 0 is taken as good.

    When the time is up, a good place that was found does. Where goodness goes up and down, a good place next to a bad
    one, as far as the questions go.
    """
    left = most

    def ask(place: int) -> bool:
        nonlocal left
        left -= 1
        fine = good(place)
        if clock is not None and clock.up and (fine or low > 0):
            left = 0
        return fine

    low, high, step = 0, count, 2  # good, and the first that is known not to be (or the end)
    place = min(max(start, 1), count - 1)
    if place < 1:
        return 0
    upwards = ask(place)
    low, high = (place, count) if upwards else (0, place)
    while left > 0 and high - low > 1:
        next_place = low + step if upwards else high - step
        if not low < next_place < high:
            break
        if ask(next_place) == upwards:
            low, high, step = (next_place, high, 2 * step) if upwards else (low, next_place, 2 * step)
        else:
            low, high = (low, next_place) if upwards else (next_place, high)
            break
    while left > 0 and high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if ask(middle) else (low, middle)
    return low


def _last(good: Callable[[int], bool], low: int, high: int) -> int:
    """The last good place from `low`, which is good, to before `high`."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low
