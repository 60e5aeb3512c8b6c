"""The verdict of a report and the three numbers that decide: size, speed and quality, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from onnxcomp import html_plots
from onnxcomp.html_text import Room, count, interval, milliseconds, number, percent, size, text, times

__all__ = ["cards", "verdict"]

Data = Mapping[str, Any]

_TONES = {"equivalent": "good", "within budget": "good", "inconclusive": "warn", "failed": "bad"}
_MADE_UP = "unverified on real data"
_SEEN = 1.005  # times as large: below, two sizes read the same


def cards(data: Data) -> list[dict[str, Any]]:
    """Size, speed and quality: a value, how it came about, its interval, and whether it is good."""
    return [_size_card(data), _speed_card(data), _quality_card(data)]


def verdict(data: Data, room: Room) -> dict[str, Any]:
    """The verdict, its tone (good, warn, bad), one sentence for whoever reads no further, reasons and notes."""
    found = data["verification"]
    word = "not verified" if found is None else found["verdict"]
    tone = _TONES.get(word, "warn")
    unmet = [text(u) for u in (data.get("unmet") or ())[: room.listed]]
    if word == "failed":
        headline = "The optimized model does not do the job of the original. No model was written."
    else:
        parts = [card["headline"] for card in cards(data)]
        sentence = ", ".join(p for p in parts if p)
        headline = f"{sentence[:1].upper()}{sentence[1:]}."
    return {
        "word": word.capitalize(),
        "tone": "warn" if unmet and tone == "good" else tone,
        "headline": headline,
        "unmet": unmet,
        "reasons": [text(r) for r in (() if found is None else found.get("reasons") or ())[: room.listed]],
        "notes": [text(n) for n in (data.get("notes") or ())[: room.listed]],
    }


def _size_card(data: Data) -> dict[str, Any]:
    before, after = data["original"]["file_bytes"], data["optimized"]["file_bytes"]
    value, tone = "Same size", "same"
    if after and before >= _SEEN * after:
        value, tone = f"{times(before / after)} smaller", "good"
    elif before and after >= _SEEN * before:
        value, tone = f"{times(after / before)} larger", "bad"
    if data["verification"] is not None and data["verification"]["verdict"] == "failed":
        tone = "same"  # of a model that does not work
    return {
        "label": "Size",
        "value": value,
        "tone": tone,
        "headline": value[:1].lower() + value[1:],
        "detail": f"{size(before)} → {size(after)}",
        "interval": "exact: bytes of the file and its data",
        "plot": None,
    }


def _speed_card(data: Data) -> dict[str, Any]:
    found = data["benchmark"]
    if found is None or found.get("speedup") is None:
        return {
            "label": "Speed", "value": "Not measured", "tone": "same", "headline": "", "detail": "", "interval": "",
            "plot": None,
        }  # fmt: skip
    speedup, ci, verdict = found["speedup"], found["ci"], found.get("verdict")
    value, tone = "No measurable difference", "same"
    if verdict == "faster":
        value, tone = f"{times(speedup)} faster", "good"
    elif verdict == "slower":
        value, tone = f"{times(1 / speedup)} slower", "bad"
    threads = found["threads"]
    on = f"{text(found['provider'], 40)}, {'all cores' if threads == 0 else f'{threads} thread' + 's' * (threads > 1)}"
    noise = found.get("noise_floor") or 0.0
    sure = f"95 % interval: {interval(ci)} times as fast" if ci else "no interval"
    label = f"speed-up {times(speedup)}, 95 % interval {interval(ci)}; 1 is the original, noise {percent(noise, 1)}"
    return {
        "label": "Speed",
        "value": value,
        "tone": tone,
        "headline": value if tone != "same" else "no measurable difference in speed",
        "detail": f"{milliseconds(found['baseline_ms'])} → {milliseconds(found['optimized_ms'])} per run ({on})",
        "interval": sure,
        "plot": html_plots.interval(label, ci[0], speedup, ci[1], noise) if ci else None,
    }


def _quality_card(data: Data) -> dict[str, Any]:
    found = data["verification"]
    card = {"label": "Quality", "tone": "same", "headline": "", "detail": "", "interval": "", "plot": None}
    if found is None:
        return {**card, "value": "Not verified", "headline": "not verified", "tone": "warn"}
    tone = _TONES.get(found["verdict"], "warn")
    where = f"{count(found['samples'])} {'samples' if found['verdict'] != _MADE_UP else 'made-up inputs'}"
    kind, drop = found.get("metric"), found["drop"]
    if kind is None or drop is None:
        return {**card, "value": found["verdict"].capitalize(), "tone": tone, "detail": where}
    before, after, ci = found.get("original"), found.get("optimized"), found["ci"]
    if kind in ("accuracy", "agreement"):
        if kind == "accuracy":
            value = f"{_points(drop)} points"
            word = "gained" if drop < 0 else "lost"
            card["headline"] = f"{abs(100 * drop):.2f} points of accuracy {word}"
            card["detail"] = f"accuracy {percent(before)} → {percent(after)} on {where}"
        else:
            value = f"{percent(after)} same decisions"
            card["headline"] = f"{value} on {where}" if found["verdict"] == _MADE_UP else value
            card["detail"] = f"top-1 class as in the original, on {where}"
        card["interval"] = "" if ci is None else f"95 % interval of the drop: {interval(ci, 100)} points"
    elif kind == "custom":
        value = f"{number(drop)} lost" if drop > 0 else "nothing lost"
        card["headline"] = f"{value} on your metric"
        card["detail"] = f"{number(before, 4)} → {number(after, 4)} on {where}, your metric"
    else:
        value = "No difference" if drop <= 0 else f"{number(-10 * math.log10(drop))} dB SQNR"
        card["headline"] = f"noise {percent(drop, 3)} of the signal"
        card["detail"] = f"noise is {percent(drop, 3)} of the signal's power on {where}"
        card["interval"] = "of the worst output; a power ratio has no interval"
    return {**card, "value": value, "tone": tone}


def _points(drop: float) -> str:
    """A drop as a change in percentage points, with its sign."""
    points = round(-100 * drop, 2)
    return f"{'+' if points > 0 else '−' if points < 0 else ''}{abs(points):.2f}"
