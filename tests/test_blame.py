"""Finding what is guilty: prefixes by bisection, sets by delta debugging, within a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcomp.blame import Clock, first_bad, guilty, smallest

LONG = 60.0


@given(st.integers(1, 200), st.data())
def test_bisection_finds_the_only_place_where_good_becomes_bad(count: int, data: st.DataObject) -> None:
    bad = data.draw(st.integers(1, count))
    asked: list[int] = []

    def good(n: int) -> bool:
        asked.append(n)
        return n < bad

    assert first_bad(count, good, Clock(LONG)) == (bad - 1, bad)
    assert len(asked) <= count.bit_length()


@given(st.sets(st.integers(0, 39), min_size=1, max_size=5))
def test_delta_debugging_keeps_exactly_what_has_to_go(culprits: set[int]) -> None:
    found = smallest(range(40), lambda denied: culprits <= denied, Clock(LONG))

    assert found == culprits


@given(st.lists(st.sets(st.integers(0, 15), min_size=1, max_size=4), min_size=1, max_size=4))
def test_no_single_item_of_the_result_can_be_left_out(pairs: list[set[int]]) -> None:
    def good(denied: frozenset[int]) -> bool:  # each set is bad as a whole: one of it has to go
        return all(pair & denied for pair in pairs)

    found = smallest(range(16), good, Clock(LONG))

    assert good(found)
    assert not any(good(found - {item}) for item in found)


def test_one_culprit_among_a_thousand_takes_few_trials() -> None:
    trials = 0

    def good(denied: frozenset[int]) -> bool:
        nonlocal trials
        trials += 1
        return 617 in denied

    assert smallest(range(1000), good, Clock(LONG)) == {617}
    assert trials <= 22


def test_when_the_time_is_up_the_best_so_far_is_returned() -> None:
    assert smallest(range(8), lambda denied: 3 in denied, Clock(0)) == frozenset(range(8))
    assert first_bad(100, lambda n: n < 60, Clock(0)) == (0, 100)


@pytest.mark.parametrize(
    ("rewrites", "culprits", "expected"),
    [
        (["a", "b", "c"], {"b"}, {"b"}),
        (["a", "b", "a"], {"a"}, {"a"}),
        (["a", "b"], {"a", "b"}, None),
        (["a"], {"a"}, None),
        (["a", "b"], {"elsewhere"}, None),
    ],
)
def test_guilty_are_some_rewrites_but_never_all(
    rewrites: list[str], culprits: set[str], expected: set[str] | None
) -> None:
    assert guilty(rewrites, lambda denied: culprits <= denied, Clock(LONG)) == expected
