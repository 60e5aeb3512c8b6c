"""Bits by price: plans of every size, and what each layer gets."""

from onnxcomp.passes.bit_plan import Option, Style, largest_within, plans, total

FRAGILE, TOUGH = (0, "fragile"), (0, "tough")


def curve(error: float, count: int) -> list[Option]:
    return [Option(Style("tensor", bits), count * bits / 8, error / 4**bits) for bits in range(2, 9)]


OPTIONS = {FRAGILE: curve(1.0, 800), TOUGH: curve(1.0, 800)}
FACTORS = {FRAGILE: 100.0, TOUGH: 1.0}


def test_plans_go_from_the_most_careful_to_the_smallest() -> None:
    found = plans(OPTIONS, FACTORS)

    sizes = [total(p) for p in found]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 1600
    assert sizes[-1] == 400


def test_bits_go_where_an_error_does_more_harm() -> None:
    for plan in plans(OPTIONS, FACTORS):
        assert plan[FRAGILE].style.bits >= plan[TOUGH].style.bits
    assert any(p[FRAGILE].style.bits > p[TOUGH].style.bits + 2 for p in plans(OPTIONS, FACTORS))


def test_no_other_plan_of_the_size_does_less_harm() -> None:
    harm = {
        (a, b): FACTORS[FRAGILE] * a.error + FACTORS[TOUGH] * b.error
        for a in OPTIONS[FRAGILE]
        for b in OPTIONS[TOUGH]
    }
    for plan in plans(OPTIONS, FACTORS):
        mine = harm[plan[FRAGILE], plan[TOUGH]]
        assert all(h >= mine * (1 - 1e-9) for (a, b), h in harm.items() if a.size + b.size <= total(plan))


def test_a_size_gets_the_largest_plan_that_fits() -> None:
    found = plans(OPTIONS, FACTORS)

    assert total(largest_within(found, 1000)) <= 1000
    assert total(largest_within(found, 1)) == 400


def test_a_model_with_one_large_weight_has_plans_between_those_of_the_hull() -> None:
    large = (0, "large")
    row = [Option(Style("tensor", b), b * 1000.0, 4.0**-b) for b in (8, 2)]
    row += [Option(Style("tensor", b), b * 1000.0, 0.9 * 4.0**-2) for b in (5,)]  # best for no price

    found = plans({large: row}, {large: 1.0})

    assert [p[large].style.bits for p in found] == [8, 5, 2]


def test_an_option_that_another_one_beats_in_size_and_error_is_in_no_plan() -> None:
    key = (0, "w")
    row = [*curve(1.0, 800), Option(Style("tensor", 3, 0.5), 790.0, 1.0)]

    assert all(p[key].style.zeros == 0 for p in plans({key: row}, {key: 1.0}))


def test_zeros_that_are_stored_on_their_own_take_no_code() -> None:
    assert Style("tensor", 2).levels == 4
    assert Style("tensor", 2, 0.5).levels == 5
