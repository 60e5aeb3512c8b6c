"""Bits by price: plans of every size, and what each layer gets."""

from onnxcomp.passes.bit_plan import Option, largest_within, plans, total

FRAGILE, TOUGH = (0, "fragile"), (0, "tough")


def curve(error: float, count: int) -> list[Option]:
    return [Option("tensor", bits, count * bits / 8, error / 4**bits) for bits in range(2, 9)]


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
        assert plan[FRAGILE].bits >= plan[TOUGH].bits
    assert any(p[FRAGILE].bits > p[TOUGH].bits + 2 for p in plans(OPTIONS, FACTORS))


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
