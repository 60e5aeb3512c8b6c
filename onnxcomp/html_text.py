"""Texts of the HTML report: what comes from a model or a file becomes visible and short in `text` and `name`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from onnxcomp.wording import count, dimensions, interval, milliseconds, number, percent, plain, size

__all__ = [
    "Room", "cell", "change", "count", "dimensions", "interval", "milliseconds", "name", "number", "percent", "shorten",
    "size", "text", "times", "verbatim",
]  # fmt: skip

@dataclass(frozen=True)
class Room:
    """How much a page shows at most: layers, entries of a list, rows of a pass's own table, names under one reason."""

    layers: int
    listed: int
    rows: int
    places: int


_NAME = 120  # characters of a name that are shown
_SENTENCE = 600
_ITEMS = 8  # of a list inside a cell


def shorten(value: str, most: int) -> str:
    """At most so many characters, the middle left out: names differ at their ends."""
    if len(value) <= most:
        return value
    return f"{value[: most * 2 // 3]}…{value[-(most // 3) :]}"


def text(value: Any, most: int = _SENTENCE) -> str:
    """Any value as text: in one line, control characters and directional overrides as escapes."""
    return shorten(plain(shorten(str(value), 2 * most)), most)


def name(value: Any, most: int = _NAME) -> Markup:
    """A name from a model, isolated: letters that run from right to left do not reorder what is around it."""
    shown = text(value, most)
    return Markup("<bdi>{}</bdi>").format(shown if shown else "(no name)")


def verbatim(value: str, most: int = 20_000) -> str:
    """A text to be copied: all of it, line breaks and spaces kept, only what cannot be seen as escapes."""
    kept = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in value[:most])
    return "".join(kept) + ("…" if len(value) > most else "")


def times(value: float | None) -> str:
    """A factor: "3.77×"."""
    return "-" if value is None else f"{number(value) if value < 100 else f'{value:,.0f}'}×"


def change(before: float | None, after: float | None) -> str:
    """The way from one number to another in words: "3.77× less", "1.2× more", "same"."""
    if before is None or after is None or before < 0 or after < 0:
        return ""
    if before == after:
        return "same"
    if min(before, after) == 0:
        return "" if before == 0 else "all gone"
    factor = before / after if before > after else after / before
    return f"{times(factor)} {'less' if before > after else 'more'}" if factor >= 1.005 else "same"


def cell(value: Any) -> str:
    """A value of a pass's own account."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e6 else number(value)
    if isinstance(value, Mapping):
        return text(", ".join(f"{k} {cell(v)}" for k, v in list(value.items())[:_ITEMS]), 200)
    if isinstance(value, Sequence) and not isinstance(value, str):
        more = f", … ({len(value)} in all)" if len(value) > _ITEMS else ""
        return text(", ".join(cell(v) for v in value[:_ITEMS]), 200) + more
    return text(value, 200)
