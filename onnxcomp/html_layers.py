"""The layers and tensors of a report as tables and plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnxcomp import html_plots
from onnxcomp.html_text import count, dimensions, name, number, percent, size, text

__all__ = ["histograms", "layers"]

Data = Mapping[str, Any]

_BARS = 150  # layers in a plot
_TABLE_BINS = 16  # of a histogram as a table


def _microseconds(value: float | None) -> str:
    return "-" if value is None else f"{number(value)} µs"


def _bits(value: float | None) -> str:
    return "-" if value is None else number(value)


def _share(value: float | None) -> str:
    return percent(value, 1) if value is not None else "-"


# Key in the JSON, heading of the columns, title of the plot, how a number is written, what a sum over layers means.
_METRICS: tuple[tuple[str, str, str, Callable[[Any], str], bool], ...] = (
    ("bytes", "Bytes", "Bytes of weights", size, True),
    ("bits_per_weight", "Bits per weight", "Bits per weight", _bits, False),
    ("sparsity", "Zeros", "Share of zeros", _share, False),
    ("macs", "MACs", "Multiplications (MACs)", count, True),
    ("us", "Time", "Time per run", _microseconds, True),
    ("time_share", "Share of time", "", _share, False),
    ("parameters", "Parameters", "", count, True),
)


def layers(data: Data, most: int) -> dict[str, Any] | None:
    """The table of layers, at most so many, those that compute and weigh most; and the plots."""
    found: Sequence[Data] = data.get("layers") or ()
    if not found:
        return None
    chosen = _largest(found, most, _weight)
    shown = [m for m in _METRICS if any(_value(row, side, m[0]) is not None for row in chosen for side in _SIDES)]
    errors = any(row.get("error") is not None for row in chosen)
    return {
        "metrics": [heading for _, heading, *_ in shown],
        "errors": errors,
        "rows": [_row(number, row, shown, errors=errors) for number, row in enumerate(chosen, 1)],
        "omitted": count(len(found) - len(chosen) + (data.get("layers_omitted") or 0)),
        "complete": len(found) == len(chosen) and not data.get("layers_omitted"),
        "plots": [p for m in shown if m[2] and (p := _plot(chosen, m)) is not None] + _error_plot(chosen),
    }


_SIDES = ("original", "optimized")


def _value(row: Data, side: str, key: str) -> Any:
    return None if row[side] is None else row[side].get(key)


def _weight(row: Data) -> tuple[float, float]:
    """What a layer computes and holds: the larger of before and after."""
    macs, stored = ([_value(row, side, key) or 0 for side in _SIDES] for key in ("macs", "bytes"))
    return max(macs), max(stored)


def _largest(rows: Sequence[Data], most: int, key: Callable[[Data], Any]) -> list[Data]:
    if len(rows) <= most:
        return list(rows)
    kept = set(sorted(range(len(rows)), key=lambda i: key(rows[i]), reverse=True)[:most])
    return [row for i, row in enumerate(rows) if i in kept]


def _row(place: int, row: Data, shown: Sequence[tuple[Any, ...]], *, errors: bool) -> dict[str, Any]:
    cells = []
    for key, _, _, form, _ in shown:
        for side in _SIDES:
            value = _value(row, side, key)
            cells.append({"text": "" if row[side] is None else form(value), "value": value})
    if errors:
        error, decibels = row.get("error"), row.get("sqnr_db")
        cells.append({"text": "" if error is None else percent(error, 3), "value": error})
        equal = error is not None and decibels is None
        cells.append({"text": "equal" if equal else _bits(decibels) if error is not None else "", "value": decibels})
    before, after = row["original"], row["optimized"]
    return {
        "place": place,
        "name": name(row["name"]),
        "sort": text(row["name"], 120),
        "op": _operator(before, after),
        "shape": _shape(before, after),
        "cells": cells,
    }


def _operator(before: Data | None, after: Data | None) -> str:
    names = [text(side["op"], 60) for side in (before, after) if side is not None]
    if len(names) < 2:
        return f"{names[0] if names else ''} ({'new' if before is None else 'merged or removed'})"
    return " → ".join(dict.fromkeys(names))


def _shape(before: Data | None, after: Data | None) -> str:
    """Shape and element type of the weight, as they are or from what to what."""
    sides = [side for side in (before, after) if side is not None]
    shapes = dict.fromkeys(dimensions(side["weight_shape"][:12], " × ") for side in sides if side["weight_shape"])
    types = dict.fromkeys(text(side["dtype"], 20) for side in sides if side["dtype"])
    return ", ".join(" → ".join(parts) for parts in (shapes, types) if parts) or "-"


# --- plots -------------------------------------------------------------------------------------------------------


def _plot(rows: Sequence[Data], metric: tuple[Any, ...]) -> dict[str, Any] | None:
    key, _, title, form, additive = metric
    chosen = _largest(rows, _BARS, lambda row: max((_value(row, s, key) or 0) for s in _SIDES))
    before, after = ([_value(row, side, key) for row in chosen] for side in _SIDES)
    top = max((v for v in (*before, *after) if v is not None), default=0)
    if not top > 0:
        return None
    names = [text(row["name"], 80) for row in chosen]
    hints = [f"{n}: original {form(x)}, optimized {form(y)}" for n, x, y in zip(names, before, after, strict=True)]
    peak = max(range(len(chosen)), key=lambda i: max(before[i] or 0, after[i] or 0))
    summary = f"Largest: {hints[peak]}."
    if additive:
        totals = [form(sum(_value(row, side, key) or 0 for row in rows)) for side in _SIDES]
        summary = f"In all {totals[0]} in the original, {totals[1]} in the optimized model. {summary}"
    return {
        "title": title,
        "summary": summary,
        "top": form(top),
        "partial": len(chosen) < len(rows),
        "paired": True,
        "svg": html_plots.paired_bars(f"{title}, layer by layer. {summary}", hints, before, after),
    }


def _error_plot(rows: Sequence[Data]) -> list[dict[str, Any]]:
    measured = [row for row in rows if row.get("error") is not None and (row.get("sqnr_db") or 0) > 0]
    if not measured:
        return []
    chosen = _largest(measured, _BARS, lambda row: row["error"])
    values = [row["sqnr_db"] for row in chosen]
    hints = [f"{text(row['name'], 80)}: {number(row['sqnr_db'])} dB" for row in chosen]
    worst = min(range(len(chosen)), key=lambda i: values[i])
    summary = f"Furthest from the original: {hints[worst]}."
    plot = {
        "title": "Output of each layer: SQNR, higher is closer",
        "summary": summary,
        "top": f"{number(max(values))} dB",
        "partial": len(chosen) < len(measured),
        "paired": False,
        "svg": html_plots.paired_bars(f"SQNR of each layer's output. {summary}", hints, None, values),
    }
    return [plot]


# --- histograms --------------------------------------------------------------------------------------------------


def histograms(found: Sequence[Data]) -> list[dict[str, Any]]:
    """One figure and one table of numbers for each tensor."""
    return [_histogram(i, one) for i, one in enumerate(found[:64], 1)]


def _histogram(place: int, one: Data) -> dict[str, Any]:
    low, high, kept, steps = one["low"], one["high"], one["range"], one.get("steps")
    before, after = one["original"], one["optimized"]
    weight = one["kind"] == "weight"
    sentences = [f"Values from {number(one.get('minimum'))} to {number(one.get('maximum'))}."]
    if kept is not None:
        step = "" if steps is None else f" in steps of {number(steps[0])}"
        if steps is not None and steps[1] > 1.001 * steps[0]:
            step += f" to {number(steps[1])}, depending on the channel"
        sentences.append(f"Its codes cover {number(kept[0])} to {number(kept[1])}{step}.")
    if one.get("outside") is not None:
        sentences.append(f"{percent(one['outside'], 3)} of the values lie outside and are cut off.")
    if one.get("samples"):
        sentences.append(f"Seen on {count(one['samples'])} samples.")
    title = text(one["tensor"], 120)
    summary = " ".join(sentences)
    return {
        "place": place,
        "title": name(one["tensor"]),
        "option": f"{'weights of' if weight else 'activation'} {title}",
        "kind": "Weights of" if weight else "Activation",
        "summary": summary,
        "low": number(low),
        "high": number(high),
        "rows": _table(low, high, before, after),
        "after": after is not None,
        "svg": html_plots.histogram(f"Histogram of {title}. {summary}", low, high, before, after, kept),
    }


def _table(low: float, high: float, before: Sequence[int], after: Sequence[int] | None) -> list[list[str]]:
    """The counts in fewer, wider bins."""
    bins = len(before)
    step = max(1, bins // _TABLE_BINS)
    edges = [low + (high - low) * min(i, bins) / bins for i in range(0, bins + step, step)]
    rows = []
    for k, start in enumerate(range(0, bins, step)):
        sums = [sum(c[start : start + step]) for c in (before, after) if c is not None]
        rows.append([f"{number(edges[k])} to {number(edges[k + 1])}", *map(count, sums)])
    return rows
