"""How the results of `optimize` and `verify` are printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from onnxcomp.cli_layout import remarks, say, table, verdict
from onnxcomp.cli_tables import int8_text, speed_text
from onnxcomp.metrics import FLOATS
from onnxcomp.mixed_outputs import NOISE_PER_DROP
from onnxcomp.wording import (
    count,
    interval,
    milliseconds,
    number,
    percent,
    plain,
    ratio,
    size,
    summarize,
    tally,
)

if TYPE_CHECKING:
    from onnxcomp.manager import PassRecord
    from onnxcomp.quality import Quality
    from onnxcomp.report import Report
    from onnxcomp.verdict import Verification

__all__ = ["show_report", "show_verification"]


def show_report(console: Console, report: Report, *, verbose: bool = False) -> None:
    """What each pass did, both models side by side, the verdict, and what was written."""
    console.print(_passes(report.passes, verbose=verbose))
    for record in report.passes:
        if record.details.get("plan") and (verbose or report.options.get("dry_run")):
            say(console)
            console.print(_plan(record))
            console.print(_left_alone(record))
    if report.options.get("dry_run"):
        say(console)
        return remarks(console, report.notes)
    say(console)
    console.print(_comparison(report))
    if report.options.get("goal") == "size" and (stored := _storage(report.passes)) is not None:
        say(console)
        console.print(stored)
    say(console)
    found = report.verification
    if found is not None:
        verdict(console, found.verdict, f", {_samples(found)}")
        remarks(console, found.reasons)
    remarks(console, report.notes)
    written = f"wrote {report.path} ({size(report.optimized['file_bytes'])})"
    return say(console, plain(f"{written} in {report.seconds:.1f} s"), "bold")


def _passes(records: tuple[PassRecord, ...], *, verbose: bool) -> Table:
    shown = table("<pass", ">rewrites", ">drop", ">seconds", "what it did")
    for record in records:
        drop = "" if record.drop is None else percent(record.drop)
        lines = _account(record, verbose=verbose)
        shown.add_row(
            plain(record.name), count(record.rewrites), drop, f"{record.seconds:.2f}", "\n".join(lines)
        )
    return shown


def _account(record: PassRecord, *, verbose: bool) -> list[str]:
    """What a pass did, what it left alone, and whether it was taken back."""
    lines = [text] if (text := summarize(record.details)) else []
    if record.reverted is not None:
        lines.append(plain(f"taken back: {record.reverted}"))
    if record.dropped:
        names = ", ".join(r.where for r in record.dropped)
        lines.append(plain(f"taken back alone: {names}: {record.dropped[0].reason}"))
    if record.refused and verbose:
        lines += [plain(f"left alone: {r.where}: {r.reason}") for r in record.refused]
    elif record.refused:
        lines.append(tally(r.reason for r in record.refused))
    return lines or ["nothing to do"]


def _plan(record: PassRecord) -> Table:
    """What a pass that removes channels plans, group by group."""
    shown = table("group", ">width", ">kept", ">predicted error", ">MACs saved alone", "importance")
    for row in record.details["plan"]:
        shown.add_row(
            plain(row["group"]),
            count(row["width"]),
            count(row["kept"]),
            number(row["predicted_error"]),
            count(row["macs_saved"]),
            plain(row["importance"]),
        )
    return shown


def _left_alone(record: PassRecord) -> Table:
    shown = table("left alone", "why")
    for refused in record.refused:
        shown.add_row(plain(refused.where), plain(refused.reason))
    return shown


def _storage(records: tuple[PassRecord, ...]) -> Table | None:
    """How many bits each packed weight takes, largest first; None if none is packed."""
    kept = [r for r in records if r.name == "pack" and r.reverted is None]
    rows = [row for record in kept for row in record.details.get("tensors", ())]
    if not rows:
        return None
    shown = table("weight", "<stored as", ">bits per weight", ">bytes")
    for row in sorted(rows, key=lambda r: -r["bytes"]):
        shown.add_row(
            plain(row["name"]), plain(row["encoding"]), f"{row['bits per weight']:.2f}", size(row["bytes"])
        )
    return shown


def _comparison(report: Report) -> Table:
    before, after = report.original, report.optimized
    shown = table("", ">original", ">optimized", "")
    a_bytes, b_bytes = before["file_bytes"], after["file_bytes"]
    change = f"{ratio(a_bytes / b_bytes)} smaller" if b_bytes < a_bytes else ""
    change = f"{ratio(b_bytes / a_bytes)} larger" if b_bytes > a_bytes else change
    shown.add_row("file", size(a_bytes), size(b_bytes), change)
    for label, key in (("parameters", "parameters"), ("non-zero", "nonzero_parameters"), ("MACs", "macs")):
        shown.add_row(label, count(before[key]), count(after[key]), "")
    shown.add_row("nodes", count(before["nodes"]), count(after["nodes"]), "")
    if report.benchmark is not None:
        a, b = report.benchmark.models[:2]
        speed = speed_text(b, report.benchmark.noise_floor)
        shown.add_row("latency", milliseconds(a.ms["p50"]), milliseconds(b.ms["p50"]), speed)
        shown.add_row("loading", milliseconds(a.load_ms), milliseconds(b.load_ms), "")
        shown.add_row("peak memory", size(a.peak_memory_bytes), size(b.peak_memory_bytes), "")
        shown.add_row("int8 kernels", count(a.int8_kernels), count(b.int8_kernels), int8_text(b))
    if report.verification is not None:
        for row in _quality_rows(report.verification):
            shown.add_row(*row)
    return shown


def _quality_rows(found: Verification) -> list[tuple[str, str, str, str]]:
    """The quality that decided, then agreement and SQNR of the worst output where these are not it."""
    rows = [] if found.quality is None else [_quality_row(found.quality, found)]
    kind = found.quality.kind if found.quality is not None else ""
    decided = {
        name: s.classes for name, s in found.outputs.items() if s.classes is not None and s.classes.rows
    }
    if decided and kind != "agreement":
        name, worst = min(decided.items(), key=lambda item: item[1].top1 / item[1].rows)
        rows.append(("same decision", "", percent(worst.top1 / worst.rows), _of(name, len(found.outputs))))
    floats = {n: s.errors for n, s in found.outputs.items() if s.role in FLOATS}
    if floats:
        name, errors = min(floats.items(), key=lambda item: item[1].sqnr_db)
        text = f"largest error {number(errors.max_abs)}{_of(name, len(found.outputs), ', ')}"
        rows.append(("SQNR", "", f"{number(errors.sqnr_db)} dB", text))
    return rows


def _quality_row(quality: Quality, found: Verification) -> tuple[str, str, str, str]:
    """Name, value of the original, value of the candidate, drop in words."""
    if quality.kind in ("accuracy", "agreement"):
        before, after = percent(quality.original), percent(quality.optimized)
        sure = f" (95 %: {interval(quality.ci, 100)})" if quality.ci is not None else ""
        return quality.kind, before, after, f"drop {100 * quality.drop:.2f} points{sure}"
    if quality.kind == "custom":
        return (
            "metric",
            number(quality.original, 4),
            number(quality.optimized, 4),
            f"drop {number(quality.drop)}",
        )
    if quality.output in found.outputs and found.outputs[quality.output].role in ("predictions", "discrete"):
        return "changes", "", "", f"{percent(quality.drop, 3)} of the elements"
    if quality.output in found.outputs and found.outputs[quality.output].role == "scores":
        return "noise", "", "", f"{percent(NOISE_PER_DROP * quality.drop, 3)} of the scores' power, counts a third"
    share = f"{percent(quality.drop, 3)} of the signal's power"
    return "noise", "", "", share if quality.drop < 1 else f"{number(quality.drop)} times the signal's power"


def _of(output: str, outputs: int, lead: str = "") -> str:
    """Which output, where there are several."""
    return f"{lead}output {plain(output)}" if outputs > 1 else ""


def _samples(found: Verification) -> str:
    if not found.samples:
        return "nothing could be compared"
    left_out = f", {found.excluded} left out that calibration had used" if found.excluded else ""
    return f"{count(found.samples)} samples of {found.data}{left_out}"


def show_verification(console: Console, found: Verification) -> None:
    """Errors of each output, the quality that decided, the verdict and its reasons."""
    if found.outputs:
        console.print(_outputs(found))
        say(console)
    if found.quality is not None:
        name, before, after, text = _quality_row(found.quality, found)
        change = " -> ".join(v for v in (before, after) if v not in ("", "-"))
        where = f" of output {plain(found.quality.output)}" if found.quality.output else ""
        say(console, f"{name}{where}: {', '.join(v for v in (change, text) if v)}")
    verdict(console, found.verdict, f", {_samples(found)}")
    remarks(console, found.reasons, "reason" if not found.passed else "note")


def _outputs(found: Verification) -> Table:
    """One row per output; columns for class decisions only where an output makes any."""
    decides = any(s.classes is not None and s.classes.rows for s in found.outputs.values())
    extra = (">top-1 %", ">top-5 %", ">KL") if decides else ()
    shown = table("output", "<kind", ">max abs", ">max rel", ">cosine", ">SQNR dB", *extra)
    for name, stats in found.outputs.items():
        e, c = stats.errors, stats.classes
        numbers = (number(e.max_abs), number(e.max_rel), f"{e.cosine:.5f}", number(e.sqnr_db))
        if stats.role in ("predictions", "discrete"):
            numbers = (f"{count(e.unequal)} differ", "", "", "")
        cells: tuple[str, ...] = ()
        if decides and c is not None and c.rows:
            top5 = f"{100 * c.top5 / c.rows:.2f}" if c.classes > 5 else ""
            cells = (f"{100 * c.top1 / c.rows:.2f}", top5, number(c.kl / c.rows) if c.classes else "")
        shown.add_row(plain(name), stats.role, *numbers, *cells)
    return shown
