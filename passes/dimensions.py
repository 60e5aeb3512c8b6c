"""Arithmetic on dimensions that are numbers, symbols, or unknown.

An entry is an int, or a str (a symbolic dimension, or an expression of such in brackets; equal texts are equal
numbers), or None (unknown).
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Entry", "add", "divide", "equal", "extreme", "multiply", "subtract"]

Entry = int | str | None
_MAX_TEXT = 256


def _term(sign: str, x: Entry, y: Entry) -> Entry:
    """An expression as text; sums and products with their terms in order."""
    if x is None or y is None:
        return None
    terms = sorted((str(x), str(y))) if sign in "+*" else [str(x), str(y)]
    text = f"({terms[0]} {sign} {terms[1]})"
    return text if len(text) <= _MAX_TEXT else None


def add(x: Entry, y: Entry) -> Entry:
    if isinstance(x, int) and isinstance(y, int):
        return x + y
    return y if x == 0 else x if y == 0 else _term("+", x, y)


def subtract(x: Entry, y: Entry) -> Entry:
    if isinstance(x, int) and isinstance(y, int):
        return x - y
    if x is not None and x == y:
        return 0
    return x if y == 0 else _term("-", x, y)


def multiply(x: Entry, y: Entry) -> Entry:
    if isinstance(x, int) and isinstance(y, int):
        return x * y
    return y if x == 1 else x if y == 1 else _term("*", x, y)


def divide(x: Entry, y: Entry) -> Entry:
    """ONNX integer division truncates toward zero."""
    if isinstance(x, int) and isinstance(y, int):
        return None if y == 0 else int(abs(x) // abs(y)) * (1 if (x < 0) == (y < 0) else -1)
    return x if y == 1 else _term("/", x, y)


def equal(x: Entry, y: Entry) -> Entry:
    """A plain symbol is a dimension and so never negative; an expression may be."""
    if isinstance(x, int) and isinstance(y, int):
        return int(x == y)
    if x is not None and x == y:
        return 1
    for symbol, number in ((x, y), (y, x)):
        if isinstance(symbol, str) and not symbol.startswith("(") and isinstance(number, int) and number < 0:
            return 0
    return None


def extreme(best: Callable[[int, int], int]) -> Callable[[Entry, Entry], Entry]:
    return lambda x, y: best(x, y) if isinstance(x, int) and isinstance(y, int) else x if x == y else None
