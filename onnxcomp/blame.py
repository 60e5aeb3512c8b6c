"""Which rewrites of a pass spoil a model: search over what `Context.allow` is asked.

`first_bad` is a binary search over prefixes, `smallest` is delta debugging over sets of rewrites to deny (ddmin: Zeller
and Hildebrandt, Simplifying and Isolating Failure-Inducing Input, IEEE TSE 28(2), 2002). Both ask each question at most
once, and end when the time is up with the best that is known.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

__all__ = ["Clock", "first_bad", "guilty", "smallest"]

Item = TypeVar("Item", bound=Hashable)


class Clock:
    """Seconds that a search may take; `up` says that they are over."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def up(self) -> bool:
        return time.monotonic() >= self._end


def first_bad(count: int, good: Callable[[int], bool], clock: Clock) -> tuple[int, int]:
    """(n, m): the first n of `count` rewrites are good and the first m are bad; m = n + 1 unless the time was up.

    No rewrite at all is taken to be good, all of them to be bad. Where goodness goes up and down, one of the places
    where it changes is found.
    """
    low, high = 0, count
    while high - low > 1 and not clock.up:
        middle = (low + high) // 2
        if good(middle):
            low = middle
        else:
            high = middle
    return low, high


def smallest(items: Sequence[Item], good: Callable[[frozenset[Item]], bool], clock: Clock) -> frozenset[Item]:
    """A subset of `items` for which `good` holds, and of which no single item can be left out (1-minimal).

    `good(frozenset(items))` has to hold. Takes about 2 log2(n) trials for one item that matters; when the time is up,
    the smallest subset so far is returned.
    """
    known: dict[frozenset[Item], bool] = {frozenset(items): True}

    def try_out(subset: list[Item]) -> bool:
        key = frozenset(subset)
        if key not in known:
            known[key] = not clock.up and good(key)
        return known[key]

    left, parts = list(items), 2
    while len(left) > 1:
        chunks = [left[i * len(left) // parts : (i + 1) * len(left) // parts] for i in range(parts)]
        without = [[x for other in chunks if other is not chunk for x in other] for chunk in chunks]
        if (found := next((c for c in chunks if try_out(c)), None)) is not None:
            left, parts = found, 2
        elif parts > 2 and (found := next((c for c in without if try_out(c)), None)) is not None:
            left, parts = found, parts - 1
        elif parts == len(left):
            break
        else:
            parts = min(2 * parts, len(left))
    return frozenset(left)


def guilty(rewrites: Sequence[str], good: Callable[[frozenset[str]], bool], clock: Clock) -> frozenset[str] | None:
    """The fewest rewrites (by their texts) without which a model is good: `good(denied)`.

    None if it stays bad without any, or if all of them are guilty, or if there was no time to find out.
    """
    texts = list(dict.fromkeys(rewrites))
    if len(texts) < 2 or clock.up or not good(frozenset(texts)):
        return None
    found = smallest(texts, good, clock)
    return found if len(found) < len(texts) else None
