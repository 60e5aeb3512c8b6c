"""The smallest plan within a drop in quality.

1. By bisection the smallest plan that the judge accepts with every weight fitted on its own.
2. From there with operators fitted in sequence (share_refit.py), to smaller plans as long as the judge and the check
   that counts in the end, on samples that calibration did not see, accept them; to larger ones as long as they do not.
   Steps double until the answer changes, then they halve.

The first plan leaves every weight as it is, so that there always is one that does; what no budget allows to be shared
stays float, and the other weights are shared nevertheless.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnxcomp.graph import Model
from onnxcomp.passes.bit_plan import Plan
from onnxcomp.passes.share_search import Candidate, SharingSearch

__all__ = ["smallest", "turning_point"]

_MOST = 9  # candidates that are fitted in sequence


def smallest(
    search: SharingSearch,
    found: Sequence[Plan],
    allowed: float,
    *,
    refit: bool,
    check: Callable[[Model], bool] | None,
) -> tuple[Plan, Candidate | None]:
    """The last of the plans (the largest first) that does, and its candidate; None if that is the first."""
    known: dict[int, Candidate] = {}

    def fitted(place: int) -> Candidate:
        start = search.candidate(found[place])
        return search.refitted(start, found[place]) if refit else start

    def good(place: int) -> bool:
        candidate = fitted(place)
        if candidate.drop > allowed or (check is not None and not check(search.build(candidate))):
            return False
        known[place] = candidate
        return True

    start = _bisected(lambda place: search.candidate(found[place]).drop <= allowed, 0, len(found))
    best = turning_point(good, start, len(found), most=_MOST)
    return found[best], known.get(best)


def turning_point(good: Callable[[int], bool], start: int, count: int, *, most: int) -> int:
    """The last of `count` places that is good, sought from `start` with at most `most` questions; 0 is taken as good.

    Where goodness goes up and down, a good place next to a bad one, as far as the questions go.
    """
    left = most

    def ask(place: int) -> bool:
        nonlocal left
        left -= 1
        return good(place)

    low, high, step = 0, count, 1  # good, and the first that is known not to be (or the end)
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


def _bisected(good: Callable[[int], bool], low: int, high: int) -> int:
    """The last good place from `low`, which is good, to before `high`."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low
