"""What a benchmark does inside its child processes: measure one model alone, or time several in turn.

Imports only what the measurement needs, so that a child is ready in a fraction of a second and its memory is
the runtime's and the model's.
"""

from __future__ import annotations

import gc
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import DataError, ModelError, ResourceError
from onnxcomp.runtime import executed_nodes, kernels_of, open_session
from onnxcomp.timing import median_half_width

__all__ = ["measure_alone", "measure_round"]

Emit = Callable[[dict[str, Any]], None]
Feeds = list[dict[str, npt.NDArray[Any]]]

BLOCK_NS = 10e6  # one timed block, so that reading the clock is nothing beside it
LONGEST_BLOCK_NS = 30e6  # of the slowest model, where the models differ much
STAMPED_RUN_NS = 350e3  # from here on a clock reading after every run (0.34 µs measured) is below 0.1 %
SINGLE_RUNS = 300  # timed one by one after the pairs where runs are shorter than that; enough for p99
WINDOWS = 20  # of warm-up at most
STABLE = 0.02  # two successive windows of warm-up whose medians differ by less end it
PAIRS = 30  # at least, before a round may end early
CYCLES = 3  # at least, however short the time: six pairs of every model, without which there is no verdict
CONTROL_EVERY = 4  # cycles: the baseline against itself takes this much less time than a model


class Runner:
    """A resident session together with the feeds it runs on in turn."""

    def __init__(self, path: str, feeds: Feeds, provider: str, threads: int) -> None:
        begin = perf_counter_ns()
        session = open_session(path, provider=provider, threads=threads)
        self.load_ns = perf_counter_ns() - begin
        self._path = path
        self._feeds = feeds
        self._run = session.native.run  # without the wrapper: its microsecond is not the model's
        self.first_ns = self.block(0, 1)
        self.run_ns = float(self.first_ns)  # the typical duration of one run, as far as known
        self.warmup_runs = 1

    def block(self, start: int, count: int) -> int:
        """Nanoseconds of `count` runs on the feeds from number `start` on."""
        run, feeds = self._run, self._taken(start, count)
        with _explained(self._path):
            begin = perf_counter_ns()
            for feed in feeds:
                run(None, feed)
            return perf_counter_ns() - begin

    def singles(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Nanoseconds (count,) of each of `count` runs on the feeds from number `start` on."""
        run, feeds = self._run, self._taken(start, count)
        with _explained(self._path):
            stamps = [perf_counter_ns()]
            for feed in feeds:
                run(None, feed)
                stamps.append(perf_counter_ns())
        taken = np.asarray(stamps, np.int64)
        return taken[1:] - taken[:-1]

    def warm_up(self, until: float) -> None:
        """Run until two successive windows agree, for WINDOWS windows at most and not beyond `until`."""
        previous = math.inf
        for _ in range(WINDOWS):
            window = max(3, math.ceil(BLOCK_NS / self.run_ns))
            times: list[int] = []
            while len(times) < window and perf_counter() < until:
                times.append(self.block(len(times), 1))
            if not times:
                return
            self.warmup_runs += len(times)
            self.run_ns = float(np.median(times))
            if abs(self.run_ns / previous - 1) < STABLE:
                return
            previous = self.run_ns

    def _taken(self, start: int, count: int) -> Feeds:
        return [self._feeds[(start + i) % len(self._feeds)] for i in range(count)]


def measure_alone(job: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """Load time, first inference, peak memory and executed kernels of one model in a process of its own.

    `job`: model (path), feeds (npz), provider, threads. Memory is in bytes; kernels come from a profiled
    session that is opened after memory was read.
    """
    ready = perf_counter()
    feeds = _load_feeds(job["feeds"])
    _reset_peak_resident()
    before = _resident("VmRSS")
    runner = Runner(job["model"], feeds, job["provider"], job["threads"])
    until = perf_counter() + 0.2
    for index in range(
        1, max(2, len(feeds))
    ):  # memory depends on shapes, and the second run adds its own buffers
        runner.run_ns = float(runner.block(index, 1))
        if perf_counter() > until:
            break
    peak = _resident("VmHWM")
    runs = max(1, min(4, int(1e9 / runner.run_ns)))
    nodes = executed_nodes(
        job["model"], feeds[0], provider=job["provider"], threads=job["threads"], runs=runs
    )
    return {
        "ready": ready,
        "load_ns": runner.load_ns,
        "first_ns": runner.first_ns,
        "peak_memory_bytes": max(0, peak - before),
        "resident_bytes": peak,
        "kernels": [[k.provider, k.op, k.count, k.microseconds] for k in kernels_of(nodes)],
        "nodes": [[n.name, n.provider, n.op, n.count, n.microseconds] for n in nodes],
    }


def measure_round(job: Mapping[str, Any], emit: Emit) -> dict[str, Any]:
    """Time all models in turn in this process, and the first against a second session of itself.

    `job`: models (paths), feeds (npz), provider, threads, seed, precision, until (`perf_counter` value),
    output (npz). `output` receives `ratios.i`, the log ratios (pairs,) of the first model to model i, and
    `times.i`, nanoseconds of single runs; the last i is the second session of the first model.
    """
    ready, until = perf_counter(), job["until"]
    rng = np.random.default_rng(job["seed"])
    feeds = _load_feeds(job["feeds"])
    paths = [*job["models"], job["models"][0]]
    runners: dict[int, Runner] = {}
    for i in rng.permutation(len(paths)).tolist():  # the first to load pays for what the others find ready
        emit({"model": i % len(job["models"])})
        runners[i] = Runner(paths[i], feeds, job["provider"], job["threads"])
    emit({"model": None})
    warmup_end = perf_counter() + max(0.0, 0.3 * (until - perf_counter()))
    for n, i in enumerate(runners):
        left = warmup_end - perf_counter()
        runners[i].warm_up(perf_counter() + left / (len(runners) - n))
    gc.collect()
    gc.disable()
    trial = Trial([runners[i] for i in range(len(paths))], rng)
    while not trial.settled(job["precision"]):
        trial.cycle(until)
        emit({"cycles": trial.cycles})
        if perf_counter() >= until and trial.cycles >= CYCLES:
            break
    trial.finish()
    trial.save(job["output"])
    return {
        "ready": ready,
        "load_ns": [runners[i].load_ns for i in range(len(paths))],
        "first_ns": [runners[i].first_ns for i in range(len(paths))],
        "warmup_runs": [runners[i].warmup_runs for i in range(len(paths))],
    }


class Trial:
    """The pairs of one round: the first runner against each other one, the last being its own double."""

    def __init__(self, runners: list[Runner], rng: np.random.Generator) -> None:
        self.runners = runners
        self.rng = rng
        times = [max(1.0, r.run_ns) for r in runners]
        self.stamped = min(times) >= STAMPED_RUN_NS
        # As many runs of every model, so that both sides of a pair see the same feeds.
        self.count = max(1, min(math.ceil(BLOCK_NS / min(times)), int(LONGEST_BLOCK_NS / max(times))))
        self.start = 0
        self.cycles = 0
        self.ratios: list[list[float]] = [[] for _ in runners]
        self.times: list[list[npt.NDArray[np.int64]]] = [[] for _ in runners]

    def cycle(self, until: float) -> None:
        """Two pairs for every model, in random order of models and with a coin deciding ABBA or BAAB."""
        control = len(self.runners) - 1
        rivals = list(range(1, control))
        if self.cycles % CONTROL_EVERY == 0 or not rivals:
            rivals.append(control)
        for rival in self.rng.permutation(rivals).tolist():
            if self.cycles >= CYCLES and perf_counter() >= until:
                return
            first, second = (0, rival) if self.rng.random() < 0.5 else (rival, 0)
            for pair in ((first, second), (second, first)):
                took = {i: self._block(i) for i in pair}
                # Run by run on the same feed; the median ignores a run that lost the core.
                self.ratios[rival].append(float(np.median(np.log(took[0] / took[rival]))))
                self.start += self.count
        self.cycles += 1

    def settled(self, precision: float) -> bool:
        """Whether every model's median log ratio is known to ±precision."""
        compared = self.ratios[1:-1] or self.ratios[-1:]
        return all(len(r) >= PAIRS and median_half_width(r) <= precision for r in compared)

    def finish(self) -> None:
        """Time single runs where the blocks could not: reading the clock would have been a part of them."""
        if not self.stamped:
            for part, i in itertools.product(range(3), range(len(self.runners))):
                self.times[i].append(self.runners[i].singles(part * SINGLE_RUNS // 3, SINGLE_RUNS // 3))

    def save(self, path: str) -> None:
        arrays: dict[str, npt.NDArray[Any]] = {}
        for i, (ratios, times) in enumerate(zip(self.ratios, self.times, strict=True)):
            arrays[f"ratios.{i}"] = np.asarray(ratios, np.float64)
            arrays[f"times.{i}"] = np.concatenate(times) if times else np.empty(0, np.int64)
        np.savez(path, **arrays)  # type: ignore[arg-type]

    def _block(self, index: int) -> npt.NDArray[np.int64]:
        """Nanoseconds of the runs of one block, or of the block as a whole where the runs are too short."""
        runner = self.runners[index]
        if not self.stamped:
            return np.asarray([max(1, runner.block(self.start, self.count))], np.int64)
        self.times[index].append(runner.singles(self.start, self.count))
        return np.maximum(1, self.times[index][-1])


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn what `session.run` raises into the error that names the model."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        if "bad allocation" in text or "Failed to allocate memory" in text:
            raise ResourceError(f"out of memory while running {path}: {text}") from error
        if type(error).__name__ in ("InvalidArgument", "ValueError"):
            raise DataError(f"{path} does not take the inputs given: {text}") from error
        raise ModelError(f"ONNX Runtime fails while running {path}: {text}") from error


def _load_feeds(path: str) -> Feeds:
    """Feeds as `bench` wrote them: array "i.j" is input names[j] of feed i."""
    with np.load(path) as stored:
        names = stored["names"].tolist()
        count = int(stored["count"])
        return [{name: stored[f"{i}.{j}"] for j, name in enumerate(names)} for i in range(count)]


def _reset_peak_resident() -> None:
    """Make VmHWM start anew from the present (Linux; elsewhere the peak includes the imports)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _resident(field: str) -> int:
    """Resident memory of this process in bytes: now ("VmRSS") or at its highest ("VmHWM")."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    import psutil

    memory = psutil.Process().memory_info()
    if field == "VmRSS":
        return int(memory.rss)
    if os.name == "nt":
        return int(memory.peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
