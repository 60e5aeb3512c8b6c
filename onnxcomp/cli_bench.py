"""How the result of `bench` is printed: one row for each model and setting."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from onnxcomp.cli_layout import remarks, say, table
from onnxcomp.cli_tables import int8_text, speed_text
from onnxcomp.providers import short_name
from onnxcomp.wording import count, number, percent, plain, short_names, size

if TYPE_CHECKING:
    from collections.abc import Callable

    from onnxcomp.bench_results import Benchmark, Comparison, ModelTiming

__all__ = ["show_benchmark"]

_UNBOUND = 10_000  # characters
_SETTING = ("provider", "threads", "streams", "batch")


def show_benchmark(console: Console, found: Comparison) -> None:
    """The table, and how far the measurement can be trusted."""
    columns = _columns(found)
    whole = _table(found, columns)
    width = Measurement.get(console, console.options.update_width(_UNBOUND), whole).maximum
    if not console.is_terminal:
        console.width = max(console.width, width)  # a file has no margin
    if width <= console.width:
        console.print(whole)
    else:  # what does not fit beside goes below
        half = next(i for i, (header, _) in enumerate(columns) if header == ">load ms")
        for part in (columns[:half], columns[half:]):
            console.print(_table(found, part))
            say(console)
    say(console)
    for result in found.results:
        _trust(console, result, several=len(found.results) > 1)
    for result in found.results:
        remarks(console, (m.fallback for m in result.models if m.fallback is not None), "fallback")
    remarks(console, found.hints, "hint")


def _columns(found: Comparison) -> list[tuple[str, Callable[[Benchmark, ModelTiming], str]]]:
    """Header and cell of each column. The setting, GPU memory and the like only where there is something to tell."""
    columns: list[tuple[str, Callable[[Benchmark, ModelTiming], str]]] = []
    for what in _SETTING:
        if len({r.setting[what] for r in found.results}) > 1:
            columns.append((f"<{what}", lambda r, m, what=what: plain(r.setting[what])))  # type: ignore[misc]
    columns += [
        (">p50 ms", lambda r, m: number(m.ms["p50"])),
        (">p90 ms", lambda r, m: number(m.ms["p90"])),
        (">p99 ms", lambda r, m: number(m.ms["p99"])),
        ("against the first", lambda r, m: speed_text(m, r.noise_floor)),
        (">samples/s", lambda r, m: number(m.runs_per_second * (r.batch or 1))),
        (">load ms", lambda r, m: number(m.load_ms)),
        (">first ms", lambda r, m: number(m.first_ms)),
        (">peak memory", lambda r, m: size(m.peak_memory_bytes)),
    ]
    if any(m.copy_in_ms is not None for m in found.models):
        columns.append((">copy in ms", lambda r, m: number(m.copy_in_ms)))
        columns.append((">copy out ms", lambda r, m: number(m.copy_out_ms)))
    if any(m.device_bytes is not None for m in found.models):
        columns.append((">GPU memory", lambda r, m: size(m.device_bytes)))
    if any(m.build_ms is not None for m in found.models):
        columns.append((">engine build s", lambda r, m: number(m.build_ms and m.build_ms / 1000)))
    columns += [(">file", lambda r, m: size(m.file_bytes)), ("kernels", lambda r, m: _kernels(m))]
    return columns


def _table(found: Comparison, columns: list[tuple[str, Callable[[Benchmark, ModelTiming], str]]]) -> Table:
    shown = table("model", *(header for header, _ in columns))
    names = short_names([m.path for m in found.results[0].models])
    for result in found.results:
        for name, model in zip(names, result.models, strict=True):
            shown.add_row(name, *(cell(result, model) for _, cell in columns))
    return shown


def _trust(console: Console, found: Benchmark, *, several: bool) -> None:
    """What was run, and what counts as noise."""
    runs = sum(m.runs for m in found.models)
    threads = "all cores" if found.threads == 0 else _times(found.threads, "thread")
    where = [found.provider, threads]
    where += [_times(found.streams, "stream")] if found.streams > 1 or several else []
    where += [f"batch {found.batch}"] if found.batch is not None else []
    done = f"{_times(runs, 'timed run')} in {_times(found.rounds, 'process')}, {found.seconds:.1f} s"
    say(console, plain(f"{', '.join(where)}: {done}"))
    control = f"{found.control:.3f}x (95 %: {found.control_ci[0]:.3f} to {found.control_ci[1]:.3f})"
    noise = percent(found.noise_floor, 1) if found.noise_floor < 1 else f"a factor of {1 + found.noise_floor:.1f}"
    floor = f"differences below {noise} are noise here"
    say(console, f"control: the baseline against itself measured {control}, so {floor}")


def _times(times: int, what: str) -> str:
    """ "1 thread", "3 processes"."""
    plural = "" if times == 1 else "es" if what.endswith("s") else "s"
    return f"{count(times)} {what}{plural}"


def _kernels(timing: ModelTiming) -> str:
    """How many ran, the share of time on each provider where there are several, and int8."""
    ran = count(round(sum(k.count for k in timing.kernels)))
    away = {name: share for name, share in timing.placement.items() if len(timing.placement) > 1}
    placed = [f"{percent(share, 0)} on {plain(short_name(name))}" for name, share in away.items()]
    return ", ".join(text for text in (ran, *placed, int8_text(timing)) if text)
