"""From the JSON of a report to what its page shows: texts, tables and plots, no decisions left for the template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from onnxcomp import html_plots
from onnxcomp.html_layers import histograms, layers
from onnxcomp.html_text import (
    Room,
    cell,
    change,
    count,
    interval,
    milliseconds,
    name,
    number,
    percent,
    size,
    text,
    times,
    verbatim,
)
from onnxcomp.html_verdict import cards, verdict
from onnxcomp.wording import short_names, summarize

__all__ = ["view"]

Data = Mapping[str, Any]

_COLUMNS = 8  # of a table that comes from a pass's own account


def view(data: Data, room: Room) -> dict[str, Any]:
    """The variables of report.html.j2 for a report in the form of its JSON, as far as there is room."""
    source = data["original"]["path"]
    title = text(short_names([source])[0], 100) if source else "a model in memory"
    return {
        "title": title,
        "created": text(data.get("created") or "", 40).replace("T", " ").replace("Z", " UTC"),
        "version": text(data["environment"].get("onnxcomp") or "", 40),
        "verdict": verdict(data, room),
        "cards": cards(data),
        "comparison": _comparison(data),
        "outputs": _outputs(data["verification"], room),
        "verification": _verification(data),
        "speed": _speed(data["benchmark"], room),
        "passes": [_pass(p, room) for p in data["passes"][: room.listed]],
        "passes_omitted": max(0, len(data["passes"]) - room.listed),
        "candidates": _candidates((data.get("candidates") or ())[: room.listed]),
        "layers": layers(data, room.layers),
        "histograms": histograms(data.get("histograms") or ()),
        "environment": _facts(data["environment"], room),
        "options": _facts(data.get("options") or {}, room),
        "files": [_file(label, data[key]) for label, key in (("original", "original"), ("optimized", "optimized"))],
        "command": verbatim(data.get("command") or ""),
        "seconds": number(data.get("seconds")),
    }


def _comparison(data: Data) -> list[list[str]]:
    before, after = data["original"], data["optimized"]
    rows = [["File", size(before["file_bytes"]), size(after["file_bytes"]),
             change(before["file_bytes"], after["file_bytes"])]]  # fmt: skip
    for label, key in (
        ("Parameters", "parameters"),
        ("Parameters that are not zero", "nonzero_parameters"),
        ("MACs per sample", "macs"),
        ("Nodes in the graph", "nodes"),
    ):
        rows.append([label, count(before[key]), count(after[key]), change(before[key], after[key])])
    timed: Sequence[Data] = (data["benchmark"] or {}).get("models") or ()
    if len(timed) == 2:
        a, b = timed
        for label, key in (("Latency, median", "p50"), ("Latency, 90th percentile", "p90"), ("Latency, 99th", "p99")):
            x, y = a["ms"][key], b["ms"][key]
            if x is not None or y is not None:  # few runs have no tail
                noise = b["verdict"] not in ("faster", "slower")
                rows.append([label, milliseconds(x), milliseconds(y), "within noise" if noise else change(x, y)])
        for label, key, form in (("Loading", "load_ms", milliseconds), ("Peak memory", "peak_memory_bytes", size)):
            rows.append([label, form(a[key]), form(b[key]), change(a[key], b[key])])
        rows.append(["Kernels that compute in 8 bits", count(a["int8_kernels"]), count(b["int8_kernels"]), ""])
    return rows


def _verification(data: Data) -> dict[str, Any] | None:
    found = data["verification"]
    if found is None:
        return None
    excluded = found.get("excluded") or 0
    allowed = (data.get("options") or {}).get("max_drop")
    return {
        "samples": count(found["samples"]),
        "data": text(found["data"], 200),
        "excluded": count(excluded) if excluded else "",
        "allowed": percent(allowed) if isinstance(allowed, float) else "",
        "lossy": found.get("effect") == "lossy",
    }


def _outputs(found: Data | None, room: Room) -> dict[str, Any] | None:
    """Errors of every output; columns that no output fills are left out."""
    if found is None or not found["metrics"]:
        return None
    columns: tuple[tuple[str, Callable[[Data], str]], ...] = (
        ("Kind", lambda m: text(m["role"])),
        ("Equal elements", lambda m: percent(m["equal"])),
        ("Largest error", lambda m: number(m.get("max_abs"))),
        ("Largest relative error", lambda m: number(m.get("max_rel"))),
        ("SQNR, dB", lambda m: number(m.get("sqnr_db"))),
        ("Cosine", lambda m: "" if m.get("cosine") is None else f"{m['cosine']:.5f}"),
        ("Same top-1", lambda m: percent(m.get("top1_agreement"))),
        ("its 95 % interval", lambda m: interval(m.get("top1_agreement_ci"), 100)),
        ("Same top-5", lambda m: percent(m.get("top5_agreement"))),
        ("KL divergence", lambda m: number(m.get("kl"))),
        ("Accuracy, original", lambda m: percent(m.get("original_accuracy"))),
        ("Accuracy, optimized", lambda m: percent(m.get("optimized_accuracy"))),
        ("Worst sample", lambda m: count(m["worst_sample"])),
    )
    metrics = list(found["metrics"].items())[: room.listed]
    filled = [(label, form) for label, form in columns if any(form(m) not in ("", "-") for _, m in metrics)]
    return {
        "columns": [label for label, _ in filled],
        "rows": [{"name": name(key), "cells": [form(m) for _, form in filled]} for key, m in metrics],
        "omitted": len(found["metrics"]) - len(metrics),
    }


def _speed(found: Data | None, room: Room) -> dict[str, Any] | None:
    timed = (found or {}).get("models") or ()
    if found is None or len(timed) != 2:
        return None
    before, after = (m["kernels"] for m in timed)
    names = sorted({*before, *after}, key=lambda k: -max(s.get(k, {"us": 0})["us"] for s in (before, after)))
    rows = [
        {"name": name(k), "cells": [c for s in (before, after) for c in _kernel(s.get(k))]} for k in names[: room.rows]
    ]
    placed = ", ".join(f"{percent(v, 0)} {text(k, 60)}" for k, v in list(found["placement"].items())[: room.places])
    return {
        "rows": rows,
        "omitted": len(names) - len(rows),
        "placement": placed,
        "pairs": count(found.get("pairs")),
        "rounds": count(found.get("rounds")),
        "control": interval(found.get("control_ci")),
        "noise": percent(found.get("noise_floor"), 1),
    }


def _kernel(found: Data | None) -> list[str]:
    return ["", ""] if found is None else [cell(float(found["count"])), f"{number(found['us'])} µs"]


def _pass(record: Data, room: Room) -> dict[str, Any]:
    reverted, details = record.get("reverted"), record.get("details") or {}
    state = ("done", "good") if record["rewrites"] else ("nothing to do", "same")
    reasons: dict[str, list[str]] = {}
    for refusal in record["refused"]:
        reasons.setdefault(refusal["reason"], []).append(refusal["where"])
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))[: room.places]
    chosen = {k: v for k, v in record["options"].items() if v not in (None, [], "", "auto")}
    return {
        "name": name(record["name"]),
        "effect": record["effect"],
        "state": "taken back" if reverted else state[0],
        "tone": "bad" if reverted else state[1],
        "rewrites": count(record["rewrites"]),
        "drop": percent(record["drop"]) if record["drop"] is not None else "",
        "seconds": f"{record['seconds']:.2f} s",
        "did": text(summarize(details)),
        "reverted": text(reverted) if reverted else "",
        "options": text(", ".join(f"{k.replace('_', ' ')} {cell(v)}" for k, v in list(chosen.items())[: room.rows])),
        "refused": count(len(record["refused"])) if record["refused"] else "",
        "reasons": [
            {
                "reason": text(reason),
                "count": count(len(where)),
                "where": [name(w) for w in where[: room.places]],
                "more": count(len(where) - room.places) if len(where) > room.places else "",
            }
            for reason, where in ordered
        ],
        "accounts": [a for k, v in list(details.items())[: room.places] if (a := _account(k, v, room)) is not None],
    }


def _account(key: str, value: Any, room: Room) -> dict[str, Any] | None:
    """A table or list in a pass's details. Single values are in its sentence."""
    rows: list[list[Any]] = []
    columns: list[str] = []
    items: list[Any] = []
    plot = None
    if not isinstance(value, (Mapping, list)) or not value:
        return None
    if isinstance(value, Mapping):
        rows = [[name(k), cell(v)] for k, v in list(value.items())[: room.rows]]
        plot = _decibels(value, room) if key.endswith("_db") else None
    elif all(isinstance(v, Mapping) for v in value):
        columns = list(value[0])[:_COLUMNS]
        rows = [[cell(v.get(c)) for c in columns] for v in value[: room.rows]]
    else:
        items = [name(v) if isinstance(v, str) else cell(v) for v in value[: room.rows]]
    return {
        "title": f"{text(key.replace('_', ' '), 80)} ({len(value)})",
        "names": items,
        "columns": [text(c.replace("_", " "), 60) for c in columns],
        "rows": rows,
        "plot": plot,
        "omitted": max(0, len(value) - room.rows),
    }


def _decibels(value: Data, room: Room) -> Markup | None:
    """Bars for what a pass tried step by step, if it is all positive numbers."""
    if len(value) < 2 or not all(isinstance(v, (int, float)) and v > 0 for v in value.values()):
        return None
    steps = list(value.items())[: room.rows]
    hints = [f"{text(k, 80)}: {number(v)} dB" for k, v in steps]
    return html_plots.paired_bars("; ".join(hints), hints, None, [v for _, v in steps])


def _candidates(found: Sequence[Data]) -> dict[str, Any] | None:
    """What was tried, in a table, and size against latency where both are known of two or more."""
    if not found:
        return None
    points = [
        (c["file_bytes"], c["latency_ms"], "kept" if c.get("kept") else "tried",
         f"{text(c['label'], 80)}: {size(c['file_bytes'])}, {milliseconds(c['latency_ms'])}")
        for c in found
        if c.get("file_bytes") is not None and c.get("latency_ms") is not None
    ]  # fmt: skip
    label = "File size (to the right) and latency (upwards): " + "; ".join(p[3] for p in points)
    rows = [
        {
            "name": name(c["label"]),
            "kept": bool(c.get("kept")),
            "cells": [
                size(c.get("file_bytes")),
                milliseconds(c.get("latency_ms")),
                f"{times(c.get('speedup'))} ({interval(c.get('ci'))})" if c.get("speedup") is not None else "-",
                percent(c.get("drop"), 3),
            ],
        }
        for c in found
    ]
    return {
        "rows": rows,
        "plot": html_plots.scatter(label, points) if len(points) > 1 else None,
        "right": size(max((p[0] for p in points), default=0) * 1.1),
        "top": milliseconds(max((p[1] for p in points), default=0.0) * 1.1),
    }


def _facts(found: Data, room: Room) -> list[tuple[str, str | Markup]]:
    rows: list[tuple[str, str | Markup]] = []
    for key, value in list(found.items())[: room.listed]:
        label = text(key.replace("_", " "), 60)
        if key.endswith("_bytes") and isinstance(value, int):
            rows.append((label.removesuffix(" bytes"), size(value)))
        elif isinstance(value, Mapping):
            flags = [k for k, v in value.items() if v is True]
            rows.append((label, text(", ".join(flags)) or "none" if all(isinstance(v, bool) for v in value.values())
                         else cell(value)))  # fmt: skip
        else:
            rows.append((label, cell(value) if not isinstance(value, str) else text(value)))
    return rows


def _file(label: str, found: Data) -> dict[str, Any]:
    return {
        "label": label,
        "path": name(found["path"], 300) if found["path"] else "none",
        "sha256": found["sha256"] or "none",
        "bytes": count(found["file_bytes"]),
    }
