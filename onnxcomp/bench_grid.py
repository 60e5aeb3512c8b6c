"""Benchmarks over a grid of settings: every provider with every number of threads, streams and batch size."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from onnxcomp.bench import Feeds, benchmark
from onnxcomp.bench_results import Benchmark, Comparison
from onnxcomp.cpu import load_hints
from onnxcomp.environment import environment
from onnxcomp.errors import UsageError
from onnxcomp.providers import CPU
from onnxcomp.runtime import provider_name

__all__ = ["Setting", "compare", "integers", "settings", "words"]

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Setting:
    """What models are timed in. `provider` is ONNX Runtime's name, `batch` None for the model's own or 1."""

    provider: str
    threads: int
    streams: int
    batch: int | None


def settings(provider: Any, threads: Any, streams: Any, batch: Any) -> list[Setting]:
    """Every combination; each argument is one value, a list, or a text with commas.

    Raises UsageError for what is no number or twice there, ProviderError for a provider that is not installed.
    """
    providers = [provider_name(word) for word in words(provider, "provider")]
    if len(set(providers)) < len(providers):
        raise UsageError(f"provider is {provider!r}; name each provider once")
    batches: Sequence[int | None] = [None] if batch is None else integers(batch, "batch", 1)
    return [
        Setting(*one)
        for one in itertools.product(
            providers, integers(threads, "threads", 0), integers(streams, "streams", 1), batches
        )
    ]


def compare(
    models: Sequence[Any],
    grid: Sequence[Setting],
    feeds: Mapping[int | None, Feeds],
    *,
    seconds: float,
    precision: float,
    seed: int,
    allow_fallback: bool,
    progress: Progress | None,
) -> Comparison:
    """Time `models` in each setting for `seconds`; `feeds` are those of each batch size. Errors are `benchmark`'s.

    Providers that may fail to load go before the CPU, so that it is known early.
    """
    begin = perf_counter()
    results: dict[Setting, Benchmark] = {}
    for number, one in enumerate(sorted(grid, key=lambda s: s.provider == CPU)):
        results[one] = benchmark(
            models,
            feeds=feeds[one.batch],
            provider=one.provider,
            threads=one.threads,
            streams=one.streams,
            batch=one.batch,
            seconds=seconds,
            precision=precision,
            seed=seed,
            allow_fallback=allow_fallback,
            progress=None if progress is None else _part(progress, number, len(grid)),
        )
    return Comparison(
        results=tuple(results[one] for one in grid),
        environment=environment(),
        hints=load_hints(),
        seconds=perf_counter() - begin,
    )


def words(given: Any, what: str) -> list[str]:
    """A list from one value, a list, or a text with commas. Raises UsageError for an empty one."""
    parts = given if isinstance(given, (list, tuple)) else str(given).split(",")
    found = [str(part).strip() for part in parts]
    if not found or not all(found):
        raise UsageError(f"{what} is {given!r}; give one value, or several with commas")
    return found


def integers(given: Any, what: str, least: int) -> list[int]:
    """The same of different whole numbers, `least` or more."""
    found = words(given, what)
    if not all(word.isdecimal() and int(word) >= least for word in found) or len(set(found)) < len(found):
        raise UsageError(f"{what} is {given!r}; it must be different whole numbers from {least} on, such as 1,8")
    return [int(word) for word in found]


def _part(progress: Progress, number: int, count: int) -> Progress:
    """The progress of one benchmark as a part of that of all."""

    def report(share: float, text: str) -> None:
        where = f"setting {number + 1} of {count}: " if count > 1 else ""
        progress((number + share) / count, where + text)

    return report
