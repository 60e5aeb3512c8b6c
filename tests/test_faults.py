"""Injected faults: every one is detected, and the search names the rewrite that made it."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from onnxcomp.bisection import Bisection, bisect
from tests.faults import MODELS, Fault, Rebuild, base, faults, samples

FOUND = {f.what: f for f in faults()}


@functools.cache
def found(what: str) -> Bisection:
    fault: Fault = FOUND[what]
    calib: dict[str, Any] = {}
    if fault.lossy:
        calib = {"calib": MODELS / "data" / f"{fault.model}.calib.npz"}
    return bisect(base(fault.model), passes=[fault.faulty], eval=samples(fault.model), samples=4, **calib)


@pytest.mark.parametrize("what", FOUND)
def test_the_fault_is_detected_and_located(what: str) -> None:
    result = found(what)

    assert result.position == 1, "not detected"
    assert [c.text for c in result.culprits] == [FOUND[what].at]
    assert result.culprits[0].after > result.culprits[0].before


@pytest.mark.parametrize("model", sorted({f.model for f in FOUND.values()}))
def test_the_pass_without_the_fault_is_not_blamed(model: str) -> None:
    result = bisect(base(model), passes=[Rebuild()], eval=samples(model), samples=4)

    assert result.position == 0, result.sentence
