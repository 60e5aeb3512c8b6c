"""The parent's side of a benchmark: start the child processes within the budget and collect what they
measure.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp import child
from onnxcomp.engines import Engine
from onnxcomp.errors import ModelError, OnnxcompError, ResourceError
from onnxcomp.timing import PairedRatio, paired_ratio

__all__ = ["Job", "Measured", "Progress", "measure"]

Progress = Callable[[float, str], None]

_ALONE_SHARE = 0.2  # of the progress bar: every model alone, before the rounds
_MOST_ROUNDS = 8  # planned; Student's factor falls little beyond
_TIMED_SHARE = 0.5  # of a round at least: no more rounds than leave as much for timing as for starting
_SHORTEST_SECONDS = 0.4  # of timing in a round
_PATIENCE_SECONDS = 15.0  # of starting processes, beyond the time asked for


@dataclass(frozen=True)
class Job:
    """What to measure. `files` holds (path, label) of each model, `feeds` the path of an npz, `folder`
    takes results; `engines` are TensorRT's, by model, None elsewhere.
    """

    files: Sequence[tuple[str, str]]
    feeds: str
    provider: str
    threads: int
    streams: int
    engines: Sequence[Engine | None]
    allow_fallback: bool
    folder: str
    seed: int
    precision: float
    progress: Progress

    def message(self, **more: Any) -> dict[str, Any]:
        """What every child needs to know, and `more`."""
        setup = {"provider": self.provider, "threads": self.threads, "streams": self.streams}
        return {"feeds": self.feeds, **setup, **more}

    @property
    def provider_options(self) -> list[dict[str, str] | None]:
        """By model."""
        return [None if engine is None else engine.options for engine in self.engines]


@dataclass(frozen=True)
class Measured:
    """What the children found. The second session of the first model counts as one model more, the last.

    `alone` holds the answers of `bench_child.measure_alone` by model, `rounds` those of `measure_round`;
    `ratios` and `times` are lists by model of arrays by round: log ratios to the first model, and nanoseconds
    of single runs.
    """

    seed: int
    alone: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    ratios: list[list[npt.NDArray[np.float64]]] = field(default_factory=list)
    times: list[list[npt.NDArray[np.int64]]] = field(default_factory=list)

    @property
    def build_ms(self) -> list[float | None]:
        """What building each model's engine took, now or earlier; None where there is none."""
        return [a["build_ms"] for a in self.alone]

    @property
    def compared(self) -> list[PairedRatio]:
        """The ratio of the first model to each other one, at the end to its own second session."""
        return [paired_ratio(ratios, np.random.default_rng(self.seed)) for ratios in self.ratios[1:]]

    @property
    def start_seconds(self) -> float:
        """What a round costs before its first warm-up run: the process, and loading every model, the first
        twice.
        """
        loads = [(a["load_ns"] + a["first_ns"]) / 1e9 for a in self.alone]
        return float(np.median([a["start_seconds"] for a in self.alone]) + sum(loads) + loads[0])


def measure(job: Job, seconds: float, rounds: int) -> Measured:
    """Run every model alone, then rounds until they are precise enough or `seconds` are used up.

    At least `rounds` of them, however little time is left for each: processes are what a verdict counts. Two suffice
    where starting `rounds` of them would take longer than `seconds` and _PATIENCE_SECONDS.
    """
    found = Measured(job.seed)
    for i in range(len(job.files)):
        found.alone.append(_alone(job, i))
    found.ratios.extend([] for _ in range(len(job.files) + 1))
    found.times.extend([] for _ in range(len(job.files) + 1))
    start = found.start_seconds
    least = rounds if rounds * start <= max(seconds, _PATIENCE_SECONDS) else min(rounds, 2)
    planned = max(least, min(_MOST_ROUNDS, int(_TIMED_SHARE * seconds / start)))
    begin = perf_counter()
    while True:
        done, now = len(found.rounds), perf_counter()
        left = begin + seconds - now
        if done >= least and left < 1.5 * start:
            return found
        share = max(left / max(1, planned - done), start + _SHORTEST_SECONDS)
        _round(job, found, begin, now + share, seconds)
        if len(found.rounds) >= least:
            compared = found.compared
            if all(r.half_width <= job.precision for r in compared[:-1] or compared):
                return found


def _alone(job: Job, i: int) -> dict[str, Any]:
    path, label = job.files[i]
    engine = job.engines[i]
    shown = _ALONE_SHARE * i / len(job.files)
    job.progress(shown, f"loading {label}")

    def report(event: dict[str, Any]) -> None:
        if "building" in event:
            job.progress(shown, f"building the engine of {label}: {event['building']:.0f} s")

    message = job.message(
        model=path,
        provider_options=job.provider_options[i],
        allow_fallback=job.allow_fallback,
        build=engine is not None and engine.build_ms is None,
    )
    answer = _child(job, "measure_alone", message, i, report)
    if engine is None:
        return answer
    if answer["build_ms"] is not None:
        engine.record(answer["build_ms"])
    return {**answer, "build_ms": engine.build_ms}


def _round(job: Job, found: Measured, begin: float, until: float, seconds: float) -> None:
    number = len(found.rounds)
    output = os.path.join(job.folder, f"round{number}.npz")

    def report(event: dict[str, Any]) -> None:
        part = min(1.0, (perf_counter() - begin) / seconds)
        job.progress(_ALONE_SHARE + (1 - _ALONE_SHARE) * part, f"timing, round {number + 1}")

    message = job.message(
        models=[path for path, _ in job.files],
        provider_options=job.provider_options,
        seed=[job.seed, number],
        precision=job.precision,
        until=until,
        output=output,
    )
    found.rounds.append(_child(job, "measure_round", message, None, report))
    with np.load(output) as stored:
        for i, (ratios, times) in enumerate(zip(found.ratios, found.times, strict=True)):
            ratios.append(stored[f"ratios.{i}"])
            times.append(stored[f"times.{i}"])


def _child(
    job: Job, function: str, message: Mapping[str, Any], model: int | None, report: child.Event | None = None
) -> dict[str, Any]:
    """Call a function of `bench_child` in a process; its failures name the model by its label."""
    at = model

    def on_event(event: dict[str, Any]) -> None:
        nonlocal at
        at = event.get("model", at)
        if report is not None:
            report(event)

    begin = perf_counter()
    try:
        answer = child.run(f"onnxcomp.bench_child:{function}", message, on_event)
    except OnnxcompError as error:
        text = str(error)
        for path, label in job.files:
            text = text.replace(path, label)
        raise type(error)(text) from error
    except child.ChildCrashError as crash:
        where = "one of " + ", ".join(label for _, label in job.files) if at is None else job.files[at][1]
        if crash.killed:
            raise ResourceError(f"the process that ran {where} was killed, most likely for memory") from crash
        raise ModelError(f"ONNX Runtime crashed while running {where} ({crash})") from crash
    return {**answer, "start_seconds": answer["ready"] - begin}
